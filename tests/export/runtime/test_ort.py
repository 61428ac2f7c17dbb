"""The ONNX Runtime runner: generation, the cache, and what it refuses."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.errors import ArtifactError, MissingDependencyError, ProcrustesError, UsageError
from export.graph.decoder import export_onnx
from export.runtime import ort
from export.runtime.ort import OrtRunner, executed_nodes
from export.runtime.runner import left_pad
from export.runtime.sampling import Sampler
from tests.export.cases import every, mixed_kron
from tests.export.helpers import llama, opt, write_checkpoint

PROMPTS = ([7, 8, 9, 10], [3], [20, 21])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder, arch = tmp_path_factory.mktemp("model"), llama()
    model = write_checkpoint(folder / "checkpoint", arch, every(arch, mixed_kron))
    return model, export_onnx(folder / "checkpoint", folder / "onnx").path


@pytest.fixture
def runner(exported: tuple[Any, Path]) -> OrtRunner:
    return OrtRunner(exported[1])


def test_greedy_generation_equals_transformers(exported: tuple[Any, Path], runner: OrtRunner) -> None:
    ids, mask = left_pad(PROMPTS, 0)
    with torch.no_grad():
        made = exported[0].generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
    expected = [row.tolist() for row in made[:, ids.shape[1] :]]
    assert runner.generate(PROMPTS, max_new_tokens=12, eos=[]) == expected
    # Each prompt alone gives the same: padding does not leak.
    assert [runner.generate([p], max_new_tokens=12, eos=[])[0] for p in PROMPTS] == expected


def test_generation_stops_at_the_end_token(runner: OrtRunner) -> None:
    free = runner.generate(PROMPTS, max_new_tokens=12, eos=[])
    end = free[0][3]
    stopped = runner.generate(PROMPTS, max_new_tokens=12, eos=end)
    for without, with_end in zip(free, stopped, strict=True):
        length = without.index(end) + 1 if end in without else len(without)
        assert with_end == without[:length]
    assert runner.generate(PROMPTS, max_new_tokens=12) == runner.generate(PROMPTS, max_new_tokens=12, eos=2)


def test_sampling_is_seeded_and_respects_its_limits(runner: OrtRunner) -> None:
    def draw(**options: Any) -> list[list[int]]:
        return runner.generate(PROMPTS, max_new_tokens=10, eos=[], **options)

    assert draw(temperature=2.0, seed=1) == draw(temperature=2.0, seed=1)
    assert draw(temperature=2.0, seed=1) != draw(temperature=2.0, seed=2)
    assert draw(temperature=2.0, top_k=1) == draw()
    assert draw(temperature=2.0, top_p=1e-9) == draw()


def test_sampler_distribution() -> None:
    logits = np.log(np.array([0.4, 0.1, 0.3, 0.2]))
    np.testing.assert_allclose(Sampler(temperature=1.0).probabilities(logits), [0.4, 0.1, 0.3, 0.2])
    np.testing.assert_allclose(Sampler(temperature=1.0, top_k=2).probabilities(logits), [4 / 7, 0, 3 / 7, 0])
    np.testing.assert_allclose(Sampler(temperature=1.0, top_p=0.5).probabilities(logits), [4 / 7, 0, 3 / 7, 0])
    np.testing.assert_allclose(Sampler(temperature=0.5).probabilities(logits), np.array([16, 1, 9, 4]) / 30)
    drawn = Sampler(temperature=1.0, seed=3)(np.tile(logits, (4000, 1)))
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0.4, 0.1, 0.3, 0.2], atol=0.03)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("top_k", [None, 1, 3, 40, 300])
@pytest.mark.parametrize("top_p", [None, 1.0, 0.9, 0.5, 1e-6])
def test_sampler_keeps_what_a_full_sort_would(ties: bool, top_k: int | None, top_p: float | None) -> None:
    """The likeliest top_k, of equals the first; then the shortest beginning that reaches top_p."""
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(size=300) * 3
        logits = np.round(logits) if ties else logits
        p = np.exp(logits / 0.8 - (logits / 0.8).max())
        order = np.argsort(-p, kind="stable")
        p[order[top_k or len(p) :]] = 0
        p /= p.sum()
        p[order[np.cumsum(p[order]) - p[order] >= (top_p or 2)]] = 0
        found = Sampler(temperature=0.8, top_k=top_k, top_p=top_p).probabilities(logits)
        np.testing.assert_allclose(found, p / p.sum(), rtol=1e-9)


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_sampler_refuses_nonsense(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Sampler(**options)


class Letters:
    """A tokenizer of one token a letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def decode(self, token_ids: Any, *, skip_special_tokens: bool) -> str:
        return "".join(chr(token + 96) for token in token_ids if not skip_special_tokens or token > 2)


def test_text_in_text_out(runner: OrtRunner) -> None:
    ids = runner.generate([[3, 4], [5]], max_new_tokens=6)
    assert runner.generate(["cd", "e"], tokenizer=Letters(), max_new_tokens=6) == ids
    assert runner.generate_text(["cd", "e"], Letters(), max_new_tokens=6) == [
        Letters().decode(row, skip_special_tokens=True) for row in ids
    ]


def test_run_full_leaves_the_cache_alone(runner: OrtRunner) -> None:
    runner.prefill([[3, 4, 5]])
    before = runner.length
    runner.run_full([[9, 9, 9, 9, 9], [1, 2, 3, 4, 5]])
    assert runner.length == before
    step = runner.decode([6])
    np.testing.assert_allclose(step[0, 0], runner.run_full([[3, 4, 5, 6]])[0, 3], rtol=0, atol=1e-5)
    runner.reset()
    assert runner.length == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.decode([1]), "prefill first"),
        (lambda r: (r.prefill([[1], [2]]), r.decode([1])), "1 sequences where the cache holds 2"),
        (lambda r: r.prefill([1, 2]), "must be"),
        (lambda r: r.prefill(np.zeros((1, 0))), "at least one token"),
        (lambda r: r.prefill([[1, 61]]), "0 ... 60"),
        (lambda r: r.prefill([[-1]]), "0 ... 60"),
        (lambda r: r.prefill([[1, 2]], [[1]]), "attention_mask is"),
        (lambda r: r.prefill(np.ones((1, 65))), "64 positions"),
        (lambda r: r.generate([], max_new_tokens=1), "at least one prompt"),
        (lambda r: r.generate([[1], []], max_new_tokens=1), "at least one token"),
        (lambda r: r.generate([[1]], max_new_tokens=0), "at least 1"),
        (lambda r: r.generate([[1]], max_new_tokens=64), "64 positions"),
        (lambda r: r.generate(["a"], max_new_tokens=1), "give a tokenizer"),
    ],
)
def test_wrong_calls_are_refused(runner: OrtRunner, call: Any, message: str) -> None:
    runner.reset()
    with pytest.raises(UsageError, match=message):
        call(runner)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_other_providers_are_not_replaced_by_the_cpu(
    exported: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MissingDependencyError, match="NoSuchProvider"):
        OrtRunner(exported[1], providers=["NoSuchProvider"])
    # A provider that is there but does not come up: ONNX Runtime quietly runs on the CPU.
    import onnxruntime

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises(ProcrustesError, match="CUDAExecutionProvider"):
        OrtRunner(exported[1], providers=["CUDAExecutionProvider"])


def test_bfloat16_is_refused_with_a_reason(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", opt())
    info = export_onnx(tmp_path / "checkpoint", tmp_path / "onnx", dtype="bfloat16")
    with pytest.raises(UsageError, match="bfloat16"):
        OrtRunner(info.path)


@pytest.mark.parametrize("damage", ["no file", "no data", "short data", "junk", "no cache"])
def test_damaged_models_are_refused(exported: tuple[Any, Path], damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(exported[1].parent, folder)
    path, data = folder / "model.onnx", folder / "model.onnx.data"
    if damage == "no file":
        path.unlink()
    elif damage == "no data":
        data.unlink()
    elif damage == "short data":
        data.write_bytes(data.read_bytes()[:-5000])
    elif damage == "junk":
        path.write_bytes(b"\x00junk" * 100)
    else:
        from compress.structures import DenseStructure
        from export.graph.layer import export_linear

        path = export_linear(DenseStructure(4, 4), {"weight": torch.ones(4, 4)}, tmp_path / "linear")
    with pytest.raises(ArtifactError, match=str(path.parent)):
        OrtRunner(path)


def test_executed_nodes_leave_no_profile_behind(
    exported: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ort.executed_nodes(exported[1])["Attention"] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_profile_that_cannot_be_written_is_told(exported: tuple[Any, Path]) -> None:
    """ONNX Runtime goes on as if it had been: what is there is cut off."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, hard))
    try:
        with pytest.raises(ArtifactError, match=r"could not write its profile of .*, or set TMPDIR"):
            executed_nodes(exported[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
