"""The whole compression on tiny models: what OUT holds, how it loads and generates, and what an interrupt leaves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.allocation.size import model_size, overhead_parameters
from compress.artifact.store import Artifact
from compress.calibration.gram import GramSum
from compress.calibration.streams import Runner, torch_device
from compress.checkpoint.loading import load_model
from compress.checkpoint.reader import CheckpointReader
from compress.errors import ArtifactError, UsageError
from compress.pipeline import compress_model
from compress.recipe import parse_recipe, read_yaml
from compress.requests import has_checkpoint
from compress.source.model import ModelSource
from tests import tiny
from tests.compress import helpers
from tests.compress.helpers import (
    TinyModel,
    compressed,
    interrupted_at,
    logits_of,
    once,
    relative,
    same_files,
    text_file,
    tiny_source,
    with_weights,
)

ROOT = Path(__file__).resolve().parents[2]
RATIO = 0.8
VARIANTS = {
    "kron-shared": {"structure": "kron", "rotation": "shared"},
    "kron-block": {"structure": "kron", "rotation": "block"},
    "kron-none": {"structure": "kron", "rotation": "none"},
    "gs": {"structure": "gs"},
    "lowrank": {"structure": "lowrank"},
    "dense": {"structure": "dense"},
}
MODELS = ["tiny_llama_tied", "tiny_opt", "tiny_qwen3"]
Build = Callable[[str, str], Artifact]


@pytest.fixture(scope="module")
def build(tiny_model: TinyModel, shared_folder: Path) -> Build:
    """(model, variant) -> its artefact, made at the first call. Not to be changed."""

    def make(name: str, variant: str) -> Artifact:
        def run(folder: Path) -> None:
            compressed(tiny_source(tiny_model, name), folder, ratio=RATIO, **VARIANTS[variant])

        return Artifact(once(shared_folder / "pipeline" / f"{name}-{variant}", run) / "out")

    return make


def stored(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, read from the files themselves."""
    found: dict[str, tuple[int, ...]] = {}
    for path in checkpoint.glob("model-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    return found


def greedy(model: torch.nn.Module, ids: Tensor, steps: int) -> Tensor:
    """Greedy decoding by a full forward pass a token, no cache."""
    for _ in range(steps):
        ids = torch.cat((ids, logits_of(model, ids)[:, -1:].argmax(-1)), dim=1)
    return ids


# ---- what OUT holds


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_ratio_counts_everything_and_is_kept(name: str, variant: str, build: Build, tiny_model: TinyModel) -> None:
    artifact = build(name, variant)
    artifact.verify()
    facts = artifact.read_manifest()["stages"]["checkpoint"]
    arch, tensors = tiny_source(tiny_model, name).architecture(), stored(artifact.path("checkpoint"))

    def count(wanted: Callable[[str], bool]) -> int:
        return sum(torch.Size(shape).numel() for n, shape in tensors.items() if wanted(n))

    linears = {f"model.layers.{i}.{role}" for i in range(arch.num_layers) for role in arch.linears()}
    projections = count(lambda n: n.rpartition(".")[0] in linears and not n.endswith("bias"))
    head_map = len(tensors.get("model.head_map.weight", ())) == 2  # a vector where nothing is rotated: a norm's scale
    overhead = count(lambda n: "_skip." in n or (head_map and n == "model.head_map.weight"))
    assert facts["projections"] == projections
    assert facts["overhead"] == overhead
    assert facts["dense_projections"] == arch.projection_parameters()
    assert facts["ratio"] == pytest.approx((projections + overhead) / arch.projection_parameters())
    if variant == "dense":
        assert facts["ratio"] == 1
    else:
        assert 0.7 * RATIO < facts["ratio"] <= RATIO
    if variant == "kron-block":  # the skips are paid for
        assert overhead >= 2 * arch.num_layers * arch.hidden_size**2
        assert projections / arch.projection_parameters() < RATIO - 0.1
    dense = tiny_source(tiny_model, name).reference_model(torch.float32)
    others = sum(p.numel() for p in dense.parameters()) - arch.projection_parameters()
    assert facts["embeddings"] == facts["dense_embeddings"] == arch.vocab_size * arch.hidden_size * (2 - arch.tied)
    assert facts["rest"] + facts["embeddings"] == others
    assert facts["structured_linears"] + facts["dense_linears"] == len(linears)


def test_model_size_is_that_of_the_checkpoint(build: Build) -> None:
    for variant in VARIANTS:
        artifact = build("tiny_qwen3", variant)
        reader = CheckpointReader(artifact.path("checkpoint"))
        structures = {n: s for n in reader.linears() if (s := reader.structure(n)).name != "dense"}
        size = model_size(reader.architecture, structures, reader.config.rotation)
        facts = artifact.read_manifest()["stages"]["checkpoint"]
        assert (size.projections, size.overhead) == (facts["projections"], facts["overhead"])
        assert size.overhead == overhead_parameters(reader.architecture, reader.config.rotation)
        # Everything in the files: projections, overhead and the rest, of which the folds removed the norms' scales.
        written = sum(torch.Size(s).numel() for s in stored(artifact.path("checkpoint")).values())
        norms = (2 * reader.architecture.num_layers + 1) * reader.architecture.hidden_size
        assert written == size.parameters - norms


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_structures_are_the_ones_asked_for(name: str, variant: str, build: Build) -> None:
    reader = CheckpointReader(build(name, variant).path("checkpoint"))
    kinds = {reader.structure(linear).name for linear in reader.linears()}
    assert VARIANTS[variant]["structure"] in kinds
    assert kinds <= {VARIANTS[variant]["structure"], "dense"}
    assert reader.config.rotation == VARIANTS[variant].get("rotation", "none")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_the_model_still_speaks(name: str, variant: str, build: Build, tiny_model: TinyModel) -> None:
    """Far closer to the dense model, in KL divergence on calibration text, than a model that knows nothing."""
    source = tiny_source(tiny_model, name)
    ids = torch.tensor([source.tokenizer()(tiny.TEXT)["input_ids"][:100]])
    dense = logits_of(source.reference_model(torch.float32), ids).log_softmax(-1)
    ours = logits_of(load_model(build(name, variant).path("checkpoint")), ids).log_softmax(-1)
    unigram = dense.exp().mean((0, 1)).log().expand_as(dense)

    def divergence(q: Tensor) -> float:
        return float((dense.exp() * (dense - q)).sum(-1).mean())

    assert divergence(ours) < (1e-6 if variant == "dense" else 0.5 * divergence(unigram))


# ---- loading and generating


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained_and_generate(name: str, variant: str, build: Build) -> None:
    folder = build(name, variant).path("checkpoint")
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tiny.token_ids(1, 7)
    torch.testing.assert_close(logits_of(model, ids), logits_of(load_model(folder), ids))
    options = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0}
    alone = model.generate(ids, **options)
    assert torch.equal(alone, greedy(model, ids, 10))
    # The same prompt beside a longer one, padded on the left.
    longer = tiny.token_ids(1, 11, seed=1)
    padded = torch.cat((torch.cat((torch.zeros(1, 4, dtype=torch.int64), ids), dim=1), longer))
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    together = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(together[0, 4:], alone[0])
    assert torch.equal(together[1], model.generate(longer, **options)[0])
    assert AutoTokenizer.from_pretrained(folder)("The mill").input_ids


@pytest.mark.parametrize(
    ("start", "works"),
    [
        ("from transformers import AutoModelForCausalLM\nimport compress", True),
        ("import compress\nfrom transformers import AutoModelForCausalLM\ncompress.register()", True),
        ("import compress\nfrom transformers import AutoModelForCausalLM\ncompress.load(sys.argv[1])", True),
        ("import compress\nfrom transformers import AutoModelForCausalLM", False),
    ],
    ids=["transformers first", "register", "load", "neither"],
)
def test_when_transformers_knows_the_checkpoints(start: str, works: bool, build: Build) -> None:
    """Without a hook into imports: transformers that is imported later is told by `register` or `load`; without them it
    says that the checkpoint has Python files, and runs none."""
    folders = [build(name, "kron-shared").path("checkpoint") for name in MODELS]
    script = (
        f"import sys, torch\n{start}\n"
        "for folder in sys.argv[1:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "    print(model.generate(torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=5).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, folders)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if not works:
        assert done.returncode != 0
        assert "trust_remote_code=True" in done.stderr
        assert done.stdout.count("[[") == 0
        return
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(folders)
    for line, folder in zip(lines, folders, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        expected = model.generate(torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=5)
        assert line == str(expected.tolist())


@pytest.mark.parametrize("name", ["tiny_llama_tied", "tiny_opt", "tiny_qwen3"])
def test_saving_the_loaded_model_again(name: str, build: Build, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(build(name, "kron-block").path("checkpoint"))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tiny.token_ids(2, 9)
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == (name != "tiny_qwen3")


def test_loss_of_labels(build: Build) -> None:
    model = AutoModelForCausalLM.from_pretrained(build("tiny_llama_tied", "gs").path("checkpoint"))
    ids = tiny.token_ids(2, 9)
    expected = torch.nn.functional.cross_entropy(logits_of(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)


@pytest.mark.parametrize(("kind", "tolerance"), [("float16", 0.01), ("bfloat16", 0.1)])
@pytest.mark.parametrize("variant", ["kron-shared", "kron-none", "gs"])
def test_checkpoints_of_half_precision(
    kind: str, tolerance: float, variant: str, build: Build, tiny_model: TinyModel, tmp_path: Path
) -> None:
    source, whole = tiny_source(tiny_model, "tiny_llama_tied"), build("tiny_llama_tied", variant).path("checkpoint")
    artifact = compressed(source, tmp_path, ratio=RATIO, checkpoint_dtype=kind, **VARIANTS[variant])
    folder, dtype = artifact.path("checkpoint"), getattr(torch, kind)
    reader = CheckpointReader(folder)
    for name in reader.names():
        tensor = reader.get(name)
        assert tensor.dtype == (torch.float32 if name.endswith(".A") else dtype)
        assert tensor.shape == CheckpointReader(whole).get(name).shape
    ids = tiny.token_ids(2, 16)
    expected = logits_of(load_model(whole), ids)
    assert 0 < relative(logits_of(load_model(folder), ids), expected) < tolerance
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == dtype
    assert relative(logits_of(model, ids), expected) < 2 * tolerance


# ---- again, and after an interrupt


@pytest.fixture
def source(tiny_model: TinyModel) -> Iterator[ModelSource]:
    return tiny_source(tiny_model, "tiny_llama_tied")  # type: ignore[return-value]


# Runner.block is called once a block to calibrate (1-3) and for the sensitivity (4-6), and twice a block to fit (7-12).
@pytest.mark.parametrize(
    ("call", "left"),
    [(2, 11), (5, 8), (7, 6), (9, 4), (12, 2)],
    ids=["calibrate", "sensitivity", "first fit", "second fit", "last fit"],
)
@pytest.mark.parametrize("rotation", ["shared", "block"])
def test_resumed_run_gives_the_same_bytes(
    call: int,
    left: int,
    rotation: str,
    source: ModelSource,
    build: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = build("tiny_llama_tied", f"kron-{rotation}")
    changes = {"ratio": RATIO, "rotation": rotation, "calibration": {"data": str(whole.out.parent / "text.txt")}}
    with monkeypatch.context() as patch:
        interrupted_at(patch, Runner, "block", call)
        with pytest.raises(KeyboardInterrupt):
            compressed(source, tmp_path, **changes)
    assert not (tmp_path / "out" / "checkpoint").exists()
    with monkeypatch.context() as patch:
        calls = interrupted_at(patch, Runner, "block", 0)
        artifact = compressed(source, tmp_path, **changes)
    assert calls[0] == left  # what was done is not done again
    same_files(artifact, whole)
    assert not artifact.path("state").exists()


def test_interrupt_inside_a_block(
    source: ModelSource, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build("tiny_llama_tied", "kron-shared")
    changes = {"ratio": RATIO, "calibration": {"data": str(whole.out.parent / "text.txt")}}
    with monkeypatch.context() as patch:
        calls = interrupted_at(patch, GramSum, "add", 0)
        compressed(source, tmp_path / "count", **changes)
    for share in (0.2, 0.6, 0.1):  # the last counts from where the second stopped
        with monkeypatch.context() as patch:
            interrupted_at(patch, GramSum, "add", int(share * calls[0]))
            with pytest.raises(KeyboardInterrupt):
                compressed(source, tmp_path, **changes)
    same_files(compressed(source, tmp_path, **changes), whole)


def test_another_recipe_does_not_reuse_state(
    source: ModelSource, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build("tiny_llama_tied", "kron-shared")
    text = {"data": str(whole.out.parent / "text.txt")}
    for other in ({"calibration": {**text, "seed": 1}}, {"ratio": 0.6, "calibration": text}):
        with monkeypatch.context() as patch:
            interrupted_at(patch, Runner, "block", 9)
            with pytest.raises(KeyboardInterrupt):
                compressed(source, tmp_path, **other)
        assert (tmp_path / "out" / "state" / "block-0.json").exists()
    same_files(compressed(source, tmp_path, ratio=RATIO, calibration=text), whole)


def test_an_edited_text_does_not_reuse_state(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, out = helpers.recipe(text_file(tmp_path)), tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupted_at(patch, Runner, "block", 9)
        with pytest.raises(KeyboardInterrupt):
            compress_model(source, wanted, out)
    (tmp_path / "text.txt").write_text(tiny.TEXT[500:])
    artifact = compress_model(source, wanted, out)
    same_files(artifact, compress_model(source, wanted, tmp_path / "fresh"))
    assert has_checkpoint(artifact, source, wanted)
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    assert not has_checkpoint(artifact, source, wanted)


def test_a_checkpoint_without_its_recipe_is_made_again(source: ModelSource, tmp_path: Path) -> None:
    """As a kill between the two publications leaves it."""
    wanted = helpers.recipe(text_file(tmp_path))
    first = compress_model(source, wanted, tmp_path / "out")
    assert has_checkpoint(first, source, wanted)
    first.path("recipe.yaml").unlink()
    assert not has_checkpoint(first, source, wanted)
    assert not has_checkpoint(first, source, helpers.recipe(text_file(tmp_path), ratio=0.9))
    assert not has_checkpoint(Artifact(tmp_path / "nothing"), source, wanted)


def test_a_full_disk_can_be_resumed(source: ModelSource, build: Build, tmp_path: Path) -> None:
    import resource

    whole = build("tiny_llama_tied", "kron-shared")
    changes = {"ratio": RATIO, "calibration": {"data": str(whole.out.parent / "text.txt")}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (10_000, 100_000):  # no stream fits; the streams fit and the moments do not
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(OSError, match="File too large") as seen:
                compressed(source, tmp_path, **changes)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "state" in str(seen.value.filename)
    same_files(compressed(source, tmp_path, **changes), whole)


@pytest.mark.parametrize("variant", ["kron-shared", "kron-block", "kron-none", "lowrank"])
def test_the_written_recipe_gives_the_same_checkpoint(
    variant: str, source: ModelSource, build: Build, tmp_path: Path
) -> None:
    whole = build("tiny_llama_tied", variant)
    resolved = parse_recipe(read_yaml(whole.path("recipe.yaml")), "recipe.yaml")
    linears = CheckpointReader(whole.path("checkpoint")).linears()
    assert list(resolved.layers) == linears  # every choice is written out
    assert whole.read_manifest()["recipe_sha256"] == resolved.digest()
    same_files(compress_model(source, resolved, tmp_path / "out"), whole)


def test_another_batch_size_gives_nearly_the_same(source: ModelSource, build: Build, tmp_path: Path) -> None:
    wanted = helpers.recipe(text_file(tmp_path), ratio=RATIO)
    artifact = compress_model(source, wanted, tmp_path / "out", batch=3)
    ids = tiny.token_ids(2, 16)
    seen, expected = (
        logits_of(load_model(a.path("checkpoint")), ids) for a in (artifact, build("tiny_llama_tied", "kron-shared"))
    )
    assert relative(seen, expected) < 1e-2


# ---- refusals


@pytest.mark.parametrize("batch", [0, -1])
def test_batches_of_nothing(batch: int, source: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--calibration-batch {batch} runs nothing"):
        compress_model(source, helpers.recipe(text_file(tmp_path)), tmp_path / "out", batch=batch)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["gpu", "meta", "cpu:x", ""])
def test_devices_that_are_none(device: str) -> None:
    with pytest.raises(UsageError, match="--device"):
        torch_device(device)


def test_impossible_recipes_leave_nothing(source: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        compress_model(source, helpers.recipe(text_file(tmp_path), unit=48), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_in_the_source(tiny_model: TinyModel, tmp_path: Path) -> None:
    def poison(state: dict[str, Tensor]) -> None:
        state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")

    with pytest.raises(ArtifactError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        compressed(with_weights(tiny_source(tiny_model, "tiny_llama"), tmp_path / "model", poison), tmp_path)
