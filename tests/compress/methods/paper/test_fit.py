"""A whole model by the paper's method: the files make a checkpoint that runs, and a run can be resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.architecture import SUB_BLOCKS
from compress.calibration.streams import Runner
from compress.checkpoint.loading import load_model
from compress.checkpoint.writer import ShardWriter, config_for, write_config, write_rotations
from compress.errors import UsageError
from compress.methods.paper import solver
from compress.methods.paper.fit import PaperFit, fit_paper
from compress.methods.paper.grams import position_grams
from compress.methods.paper.shapes import Kind
from compress.methods.paper.solver import PaperMember, PaperPosition, position_members
from compress.rewrites.folding import FoldedModel, folded
from compress.rewrites.rotations import Rotations
from tests import tiny
from tests.compress.helpers import TinyModel, kept_in, logits_of, tiny_source

CPU = torch.device("cpu")
TOKENS = tiny.token_ids(8, 32)
COUNTS = TOKENS.flatten().bincount(minlength=tiny.VOCAB_SIZE)


def grams_of(model: FoldedModel) -> solver.PaperMoments:
    runner, found = Runner(model.arch, TOKENS.shape[1], CPU, 3), {}
    for layer in range(model.arch.num_layers):
        found.update(position_grams(model, TOKENS, 2 * layer + 1, runner))
    return found


def fit(model: FoldedModel, folder: Path, kind: Kind = "kron", kept: float = 0.75) -> PaperFit:
    folder.mkdir(exist_ok=True)
    return fit_paper(
        model,
        kind,
        kept,
        grams_of(model),
        COUNTS,
        als_iterations=3,
        gd_iterations=40,
        device=CPU,
        state=kept_in(folder),
    )


def logits_from(model: FoldedModel, done: PaperFit, folder: Path) -> Tensor:
    with ShardWriter(folder, torch.float32) as shards:
        for name, tensor in model.ends(done.rotations).items():
            shards.add(name, tensor)
        for file in done.files:
            for name, tensor in load_file(file).items():
                shards.add(name, tensor)
    write_config(folder, config_for(model.arch, done.structures, done.rotations), torch.float32)
    write_rotations(folder, done.rotations)
    return logits_of(load_model(folder), TOKENS)


@pytest.mark.parametrize("kind", ["kron", "gs"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_tied", "tiny_opt"])
def test_the_checkpoint_runs_and_more_kept_is_closer(
    name: str, kind: Kind, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = folded(tiny_source(tiny_model, name))
    dense = logits_of(tiny.model(name), TOKENS)
    gaps = []
    for kept in (0.75, 0.5):
        done = fit(model, tmp_path / str(kept), kind, kept)
        logits = logits_from(model, done, tmp_path / str(kept))
        gaps.append(float((logits - dense).square().mean()))
        errors = {r.name: r.relative_error for r in done.records}
        assert len(errors) == len(model.arch.linears()) * model.arch.num_layers
        assert all(0 < e < 1 if n in done.structures else e == 0 for n, e in errors.items())
    assert gaps[0] < 0.8 * gaps[1]
    assert gaps[0] < 0.7 * float(dense.square().mean())


def test_nothing_is_lost_but_by_the_structures(tiny_model: TinyModel, tmp_path: Path) -> None:
    """With every factor the exact weight, the files are the dense model in rotated coordinates."""
    model = folded(tiny_source(tiny_model, "tiny_llama"))
    done = fit(model, tmp_path)
    for layer, file in enumerate(done.files):
        entries = load_file(file)
        v = model.block(layer)["attn.v.weight"].double() @ done.rotations.matrices[2 * layer]
        torch.testing.assert_close(entries[f"model.layers.{layer}.attn.v.weight"].double(), v, atol=1e-5, rtol=1e-5)
        q_in, q_out = done.rotations.matrices[2 * layer], done.rotations.matrices[2 * layer + 1]
        skip = entries[f"model.layers.{layer}.attn_skip.weight"].double()
        torch.testing.assert_close(skip, q_out.T @ q_in, atol=1e-6, rtol=1e-5)


def test_an_interrupted_run_goes_on(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = folded(tiny_source(tiny_model, "tiny_llama"))
    whole = fit(model, tmp_path / "whole")
    solved: list[int] = []
    solve = solver.solve_position

    def failing(
        position: int, members: list[PaperMember], exact: Tensor, als_iterations: int, gd_iterations: int
    ) -> PaperPosition:
        if position == 4 and 4 not in solved:
            solved.append(4)
            raise KeyboardInterrupt
        solved.append(position)
        return solve(position, members, exact, als_iterations, gd_iterations)

    monkeypatch.setattr(solver, "solve_position", failing)
    with pytest.raises(KeyboardInterrupt):
        fit(model, tmp_path / "parts")
    resumed = fit(model, tmp_path / "parts")
    assert solved == [0, 1, 2, 3, 4, 4, 5, 6]
    for a, b in zip(whole.files, resumed.files, strict=True):
        left, right = load_file(a), load_file(b)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    assert [r.error_after for r in resumed.positions] == [r.error_after for r in whole.positions]


@pytest.mark.parametrize("position", range(7))
def test_grams_of_a_position_are_enough(position: int, tiny_model: TinyModel) -> None:
    """For its members, and those of a forward pass of the Hugging Face model: RMS-normalised layer inputs."""
    model = folded(tiny_source(tiny_model, "tiny_llama"))
    grams = position_grams(model, TOKENS, position, Runner(model.arch, TOKENS.shape[1], CPU, 3))
    _, members, _ = next(
        position_members(
            model, solver.paper_structures(model.arch, "kron", 0.5), grams, COUNTS, CPU,
            start=position, stop=position + 1,
        )
    )  # fmt: skip
    assert members
    with torch.no_grad():
        hidden = tiny.model("tiny_llama")(TOKENS, output_hidden_states=True).hidden_states
    for layer, sub in grams:
        if sub == SUB_BLOCKS[0]:
            x = hidden[layer].double().flatten(0, 1)
            h = x * torch.rsqrt(x.square().mean(1, keepdim=True) + model.arch.norm_eps)
            torch.testing.assert_close(grams[layer, sub].read, h.T @ h / len(h), rtol=1e-4, atol=1e-4)


def test_positions_that_do_not_exist(tiny_model: TinyModel) -> None:
    model = folded(tiny_source(tiny_model, "tiny_llama"))
    for position in (-1, 7):
        with pytest.raises(UsageError, match="give 0 to 6"):
            position_grams(model, TOKENS, position, Runner(model.arch, TOKENS.shape[1], CPU, 3))


def test_rotations_are_those_of_a_block_model(tiny_model: TinyModel, tmp_path: Path) -> None:
    done = fit(folded(tiny_source(tiny_model, "tiny_llama")), tmp_path)
    assert isinstance(done.rotations, Rotations)
    assert done.rotations.skip_choices()["skip"] == "dense"
    assert len(done.rotations.matrices) == 7
