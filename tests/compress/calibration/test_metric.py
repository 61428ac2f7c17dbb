"""Loss metrics of the three sensitivities, and the measured one against a whole model that is really truncated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.artifact.ledger import Nowhere
from compress.calibration.measured import measured_losses
from compress.calibration.metric import loss_metric
from compress.calibration.moments import StatisticsFolder, StreamMoments, collect
from compress.calibration.streams import Runner
from compress.checkpoint.loading import load_model
from compress.checkpoint.rewritten import write_dense
from compress.linalg import damped
from compress.recipe import Recipe
from compress.rewrites.folding import folded
from compress.source.model import ModelSource
from tests import tiny
from tests.compress import helpers
from tests.compress.helpers import LENGTH, TinyModel, kept_in, logits_of, tiny_source, with_weights

F64 = torch.float64


def recipe(**changes: Any) -> Recipe:
    return helpers.recipe(Path("unread.txt"), **changes)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def a_moment(inner: int = 8, d: int = 6, out: int = 5) -> StreamMoments:
    halves = [normal(width, width, seed=i) for i, width in enumerate((d, inner, out, d))]
    read, hidden, up, down = (half @ half.T for half in halves)
    return StreamMoments(read, hidden, {"mlp.up": up, "mlp.down": down})


def test_fisher_is_half_the_damped_moment_of_the_gradients() -> None:
    moment = a_moment()
    for role, width in (("mlp.up", 5), ("mlp.down", 6)):
        h = (moment.gradients or {})[role]
        found = loss_metric(recipe(metric_damping=0.1), moment, role, torch.zeros(width, 3))
        expected = (h + 0.1 * h.diagonal().mean() * torch.eye(width)) / 2
        torch.testing.assert_close(found, expected)


def test_a_class_of_linears_counts_as_measured_and_by_relative_error() -> None:
    moment = a_moment()
    for role, gram in (("mlp.up", moment.read), ("mlp.down", moment.inner)):
        weight = normal(4, len(gram), seed=9)
        plain = loss_metric(recipe(sensitivity="none"), moment, role, weight)
        lost = 0.3 * weight
        assert float((plain @ lost @ gram @ lost.T).trace()) == pytest.approx(0.09)  # 0.3 squared
        found = loss_metric(recipe(sensitivity="measured"), moment, role, weight, {role: 2.5})
        torch.testing.assert_close(found, 2.5 * plain)


@pytest.mark.parametrize("sensitivity", ["none", "measured"])
def test_a_linear_that_only_sees_zeros(sensitivity: str) -> None:
    zero = StreamMoments(torch.zeros(4, 4, dtype=F64), torch.zeros(4, 4, dtype=F64), None)
    found = loss_metric(recipe(sensitivity=sensitivity), zero, "mlp.up", normal(3, 4, seed=1), {"mlp.up": 7.0})
    assert torch.equal(found, torch.eye(3, dtype=F64))


def statistics_of(source: ModelSource, tokens: Tensor, folder: Path) -> tuple[StatisticsFolder, Runner]:
    runner = Runner(source.architecture(), tokens.shape[1], torch.device("cpu"), 4)
    found = collect(folded(source), tokens, sensitivity="measured", seed=0, runner=runner, kept=kept_in(folder))
    return found, runner


def truncated(weight: Tensor, gram: Tensor, rank: int) -> Tensor:
    """The best of that rank for inputs of that Gram matrix: an SVD in whitened inputs."""
    root = torch.linalg.cholesky(gram)
    u, s, vh = torch.linalg.svd(weight @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(root)


@pytest.mark.parametrize("name", ["tiny_llama_tied", "tiny_opt"])
@torch.no_grad()
def test_measured_is_the_divergence_of_truncated_models(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source, tokens = tiny_source(tiny_model, name), tiny.token_ids(10, LENGTH)
    arch, wanted = source.architecture(), recipe(sensitivity="measured")
    moments, runner = statistics_of(source, tokens, tmp_path / "moments")
    found = measured_losses(folded(source), tokens, moments, wanted, runner, Nowhere())
    assert list(found) == list(arch.linears())
    write_dense(source, tmp_path / "dense")
    ids = tokens[:8]
    dense = logits_of(load_model(tmp_path / "dense"), ids).double().log_softmax(-1)
    for role, (n, m) in arch.linears().items():
        model, errors = load_model(tmp_path / "dense"), 0.0
        for layer in range(arch.num_layers):
            weight = model.model.layers[layer].get_submodule(role).weight
            sub = role.partition(".")[0]
            gram = damped(moments[layer, sub].gram(role), wanted.gram_damping)
            before = weight.double()
            after = truncated(before, gram, min(n, m) // 2)
            lost = before - after
            errors += float((lost @ gram @ lost.T).trace() / (before @ gram @ before.T).trace())
            weight.copy_(after)
        ours = logits_of(model, ids).double().log_softmax(-1)
        divergence = float((dense.exp() * (dense - ours)).sum() / ids.numel())
        assert found[role] == pytest.approx(divergence / errors, rel=1e-3)
        assert found[role] > 0


def test_measured_without_anything_to_lose(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Linears that half their rank holds without error, or that are zero, still weigh something: none is free."""

    def simplify(state: dict[str, Tensor]) -> None:
        for layer in range(3):
            name = f"model.layers.{layer}.self_attn"
            u, s, vh = torch.linalg.svd(state[f"{name}.q_proj.weight"], full_matrices=False)
            state[f"{name}.q_proj.weight"] = (u[:, :8] * s[:8]) @ vh[:8]
            state[f"{name}.k_proj.weight"].zero_()

    source = with_weights(tiny_source(tiny_model, "tiny_llama"), tmp_path / "model", simplify)
    tokens, wanted = tiny.token_ids(4, LENGTH), recipe(sensitivity="measured")
    moments, runner = statistics_of(source, tokens, tmp_path / "moments")
    found = measured_losses(folded(source), tokens, moments, wanted, runner, Nowhere())
    others = [value for role, value in found.items() if role not in ("attn.q", "attn.k")]
    for role in ("attn.q", "attn.k"):
        assert min(others) <= found[role] <= max(others)
