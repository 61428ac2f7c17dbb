"""One V for several linears: the joint optimum against brute force, and the factors where they are stored once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from compress.checkpoint.loading import load_model
from compress.checkpoint.reader import CheckpointReader
from compress.errors import ArtifactError, UsageError
from compress.linalg import weighted_error
from compress.model.blocks import Block, StructuredLinear, rotary_for
from compress.model.masks import attention_mask_bool
from compress.structures import LowRankStructure, Structure, structure_from_config
from compress.structures.joint import joint_error_by_rank, joint_fit, joint_ranks, joint_structures, leader_of
from compress.structures.lowrank import error_by_rank
from tests.compress.structures.battery import generator, second_moment
from tests.compress.structures.bounds import square_root
from tests.export.helpers import llama, write_checkpoint

HEIGHTS, WIDTH = (5, 3, 4), 7
SCALES = (1.0, 4.0, 0.3)


def problem(seed: int = 0) -> tuple[list[Tensor], Tensor, list[Tensor | None]]:
    """Three weights that read the same 7 features, their Gram matrix, and metrics of two of them."""
    g = generator(seed)
    weights = [torch.randn(n, WIDTH, generator=g, dtype=torch.float64) for n in HEIGHTS]
    return weights, second_moment(WIDTH, seed + 1), [second_moment(5, seed + 2), None, second_moment(4, seed + 3)]


CASES: list[dict[str, Any]] = [
    {},
    {"gram": True},
    {"metrics": True},
    {"gram": True, "metrics": True},
    {"gram": True, "metrics": True, "scales": SCALES},
]


def arguments(case: dict[str, Any], seed: int = 0) -> tuple[list[Tensor], dict[str, Any]]:
    weights, gram, metrics = problem(seed)
    choices = {"gram": gram, "metrics": metrics, "scales": SCALES}
    return weights, {key: choices[key] for key in case}


def error_of(weights: Sequence[Tensor], V: Tensor, parts: Sequence[Tensor], options: dict[str, Any]) -> Tensor:
    """sum_i s_i tr(H_i E_i G E_i^T), written out."""
    gram = options.get("gram", torch.eye(WIDTH, dtype=torch.float64))
    total = torch.zeros((), dtype=torch.float64)
    metrics = options.get("metrics") or [None] * len(weights)
    for w, u, metric, scale in zip(weights, parts, metrics, options.get("scales", (1.0,) * 3), strict=True):
        E = w - u @ V
        left = E if metric is None else metric @ E
        total = total + scale * ((left @ gram) * E).sum()
    return total


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case) or "frobenius")
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_joint_fit_is_the_optimum(case: dict[str, Any], rank: int) -> None:
    """Eckart-Young in coordinates whitened another way (symmetric roots), and L-BFGS from random starts."""
    weights, options = arguments(case)
    V, parts = joint_fit(weights, rank, **options)
    assert V.shape == (rank, WIDTH)
    assert [u.shape for u in parts] == [(n, rank) for n in HEIGHTS]
    error = float(error_of(weights, V, parts, options))

    metrics = options.get("metrics") or [None] * 3
    scales = options.get("scales", (1.0,) * 3)
    rows = [s**0.5 * square_root(h, len(w)) @ w for w, h, s in zip(weights, metrics, scales, strict=True)]
    whitened = torch.cat(rows) @ square_root(options.get("gram"), WIDTH)
    optimum = float(torch.linalg.svdvals(whitened)[rank:].square().sum())
    assert error == pytest.approx(optimum, rel=1e-8, abs=1e-12)

    for seed in range(3):
        free = [torch.randn(f.shape, generator=generator(seed), dtype=f.dtype).requires_grad_() for f in (V, *parts)]
        optimizer = torch.optim.LBFGS(free, max_iter=500, tolerance_change=1e-14, line_search_fn="strong_wolfe")

        def closure(free: list[Tensor] = free, optimizer: Any = optimizer) -> float:
            optimizer.zero_grad()
            value = error_of(weights, free[0], free[1:], options)
            value.backward()
            return float(value.detach())

        optimizer.step(closure)
        found = float(error_of(weights, free[0].detach(), [u.detach() for u in free[1:]], options))
        assert found >= error * (1 - 1e-7)
        assert found < float(error_of(weights, V, [u * 0 for u in parts], options))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case) or "frobenius")
def test_the_curve_is_the_error_of_every_fit(case: dict[str, Any]) -> None:
    weights, options = arguments(case)
    curve = joint_error_by_rank(weights, **options)
    assert curve.shape == (WIDTH + 1,)
    for rank in range(1, WIDTH + 1):
        V, parts = joint_fit(weights, rank, **options)
        assert float(curve[rank]) == pytest.approx(float(error_of(weights, V, parts, options)), rel=1e-8, abs=1e-12)
    nothing = [u.new_zeros(n, 1) for u, n in zip(weights, HEIGHTS, strict=True)]
    assert float(curve[0]) == pytest.approx(float(error_of(weights, V[:1], nothing, options)))


def test_one_weight_alone_is_plain_low_rank() -> None:
    (weight, *_), gram, (metric, *_) = problem()
    V, (U,) = joint_fit([weight], 2, gram, [metric])
    factors = LowRankStructure(WIDTH, 5, 2).fit(weight, gram, metric)
    torch.testing.assert_close(U @ V, factors["U"] @ factors["V"])
    curve = joint_error_by_rank([weight], gram, [metric])
    torch.testing.assert_close(curve, error_by_rank(weight, gram, metric))
    assert weighted_error(weight, U @ V, gram, metric) == pytest.approx(float(curve[2]))


def test_singular_moments_stay_finite() -> None:
    weights, _, _ = problem()
    V, parts = joint_fit(weights, 3, second_moment(WIDTH, 1, rank=2), [second_moment(5, 2, rank=1), None, None])
    assert all(torch.isfinite(f).all() for f in (V, *parts))
    V, parts = joint_fit([0 * w for w in weights], 3)
    assert all(not f.any() for f in (V, *parts))


def test_what_does_not_match_is_refused() -> None:
    weights, gram, metrics = problem()
    with pytest.raises(UsageError, match="joint rank of 8"):
        joint_fit(weights, 8, gram)
    with pytest.raises(UsageError, match="as many metrics"):
        joint_fit(weights, 2, gram, metrics[:2])
    with pytest.raises(UsageError, match="scales"):
        joint_fit(weights, 2, gram, scales=(1.0, 0.0, 1.0))
    with pytest.raises(UsageError, match="NaN"):
        joint_fit([weights[0], weights[1] / 0, weights[2]], 2)
    with pytest.raises(UsageError, match="at least one"):
        joint_fit([], 2)
    with pytest.raises(UsageError, match=r"shares the V of attn\.q"):
        LowRankStructure(WIDTH, 5, 2, "attn.q").fit(weights[0])


# --- The group as structures. ---


GROUP = {"attn.q": (32, 32), "attn.k": (16, 32), "attn.v": (16, 32)}


def test_a_shared_v_is_counted_once() -> None:
    specs = joint_structures(GROUP, 12)
    assert [spec.shares for spec in specs.values()] == [None, "attn.q", "attn.q"]
    assert sum(spec.parameter_count() for spec in specs.values()) == 12 * (32 + 64)
    assert sum(spec.macs(3) for spec in specs.values()) == 3 * 12 * (32 + 64)
    assert sum(spec.bytes(torch.float16) for spec in specs.values()) == 2 * 12 * (32 + 64)
    for spec in specs.values():
        assert structure_from_config(spec.to_config()) == spec
    assert "shares" not in specs["attn.q"].to_config()


def test_joint_ranks_save_and_fit_the_leader() -> None:
    assert joint_ranks(GROUP, 4) == [4, 8, 12, 16, 20]  # 21 * 96 = 2016 < 2048 <= 22 * 96, in steps of 4
    assert max(joint_ranks({"attn.k": (8, 32), "attn.v": (64, 32)}, 4)) == 8
    # With the rank at out_features or less, the leader is a low-rank structure of its own.
    with pytest.raises(UsageError, match="rank 9"):
        joint_structures({"attn.k": (8, 32), "attn.v": (64, 32)}, 9)
    # A follower may be narrower than the rank: its U is a piece of a taller one.
    assert LowRankStructure(32, 4, 9, "attn.q").shapes() == {"U": (4, 9)}
    with pytest.raises(UsageError, match="rank 33"):
        LowRankStructure(32, 64, 33, "attn.q")


def named(group: dict[str, Any]) -> dict[str, Structure]:
    return {f"layers.0.{role}": spec for role, spec in group.items()}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dense leader": ({"attn.k": LowRankStructure(32, 16, 8, "attn.q")}, "is dense and has none"),
    "another rank": (
        {"attn.q": LowRankStructure(32, 32, 9), "attn.k": LowRankStructure(32, 16, 8, "attn.q")},
        "needs a V of 8 x 32",
    ),
    "a chain": (
        {
            "attn.q": LowRankStructure(32, 32, 8),
            "attn.k": LowRankStructure(32, 16, 8, "attn.q"),
            "attn.v": LowRankStructure(32, 16, 8, "attn.k"),
        },
        "has none",
    ),
    "itself": ({"attn.q": LowRankStructure(32, 32, 8, "attn.q")}, "no earlier reader"),
    "a later one": (
        {"attn.q": LowRankStructure(32, 32, 8, "attn.k"), "attn.k": LowRankStructure(32, 16, 8)},
        "no earlier reader",
    ),
    "another sub-block": (
        {"attn.q": LowRankStructure(32, 32, 8), "mlp.up": LowRankStructure(32, 48, 8, "attn.q")},
        "no earlier reader",
    ),
    "a writer": (
        {"attn.q": LowRankStructure(32, 32, 8), "attn.o": LowRankStructure(32, 32, 8, "attn.q")},
        "no earlier reader",
    ),
    "no role": ({"attn.k": LowRankStructure(32, 16, 8, "magic")}, "no earlier reader"),
}


@pytest.mark.parametrize("name", BAD)
def test_hostile_sharing_is_refused(name: str, tmp_path: Path) -> None:
    group, sentence = BAD[name]
    with pytest.raises(ArtifactError, match=sentence):
        [leader_of(named(group), linear) for linear in named(group)]
    with torch.device("meta"), pytest.raises(ArtifactError, match=sentence):
        Block(llama(), named(group), 0, skips=False)
    write_checkpoint(tmp_path, llama(), named(joint_structures(GROUP, 8)))
    path = tmp_path / "config.json"
    good = CheckpointReader(tmp_path).config
    good.structures = {linear: spec.to_config() for linear, spec in named(group).items()}
    good.save_pretrained(tmp_path)
    assert path.exists()
    with pytest.raises(ArtifactError, match=sentence):
        CheckpointReader(tmp_path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """q, k, v share in layer 0; gate and up in both layers."""
    mlp = joint_structures({"mlp.gate": (48, 32), "mlp.up": (48, 32)}, 10)
    structures = {**named(joint_structures(GROUP, 20)), **named(mlp)}
    structures |= {f"layers.1.{role}": spec for role, spec in mlp.items()}
    write_checkpoint(tmp_path, llama(attention_bias=True), structures)
    return tmp_path


def linear_of(model: torch.nn.Module, linear: str) -> StructuredLinear:
    module = model.get_submodule(f"model.{linear}")
    assert isinstance(module, StructuredLinear)
    return module


def test_v_is_stored_once_and_read_by_all(checkpoint: Path) -> None:
    reader = CheckpointReader(checkpoint)
    stored = [name for name in reader.names() if name.endswith(".V")]
    assert stored == ["model.layers.0.attn.q.V", "model.layers.0.mlp.gate.V", "model.layers.1.mlp.gate.V"]
    model = load_model(checkpoint)
    assert set(model.state_dict()) - {"lm_head.weight"} == set(reader.names())
    assert sum(name.endswith(".V") for name, _ in model.named_parameters()) == 3
    for linear in reader.linears():
        factors, module = reader.factors(linear), linear_of(model, linear)
        assert factors.keys() == module.factors().keys()
        assert all(torch.equal(factors[name], value) for name, value in module.factors().items())
        x = torch.randn(3, module.structure.in_features, generator=generator())
        expected = x @ module.structure.dense(factors).T + (0 if module.bias is None else module.bias)
        torch.testing.assert_close(module(x), expected)


def test_a_copy_of_a_block_has_its_own_v(checkpoint: Path) -> None:
    """The reference to the leader moves with the block: to another type, and into a copy."""
    from copy import deepcopy

    block = load_model(checkpoint).model.layers[0]
    assert isinstance(block, Block)
    copy = deepcopy(block).double()
    assert copy.attn.k.factors()["V"] is copy.attn.q.V
    assert copy.attn.q.V.dtype == torch.float64
    assert block.attn.k.factors()["V"] is block.attn.q.V
    assert block.attn.q.V.dtype == torch.float32


def test_blocks_multiply_v_once(checkpoint: Path) -> None:
    """Counted work of the projections of a block = the stated cost of its structures."""
    model, arch = load_model(checkpoint), llama(attention_bias=True)
    x, positions = torch.randn(1, 6, 32, generator=generator()), torch.arange(6)[None]
    mask = attention_mask_bool(None, 1, 0, 6, None, x.device)
    reader = CheckpointReader(checkpoint)
    for layer in (0, 1):
        with FlopCounterMode(display=False) as counter:
            model.model.layers[layer](x, rotary_for(arch, positions), mask)
        flops = counter.get_flop_counts()["Global"]
        counted = sum(count for op, count in flops.items() if str(op) in ("aten.mm", "aten.addmm"))
        stated = sum(reader.structure(f"layers.{layer}.{role}").macs(6) for role in arch.linears())
        assert counted == 2 * stated


def test_same_logits_with_a_v_each(checkpoint: Path, tmp_path: Path) -> None:
    """The shared model computes what plain low-rank linears with copies of the V compute."""
    model = load_model(checkpoint)
    apart = {
        linear: replace(spec, shares=None)
        for linear, spec in model.config.parsed_structures().items()
        if isinstance(spec, LowRankStructure) and spec.rank <= spec.out_features
    }
    # k and v are narrower than the rank of 20, so that they are dense in the other model.
    state: dict[str, Tensor] = {}
    for linear in CheckpointReader(checkpoint).linears():
        module = linear_of(model, linear)
        if linear in apart:
            state |= {f"model.{linear}.{name}": value for name, value in module.factors().items()}
        else:
            state[f"model.{linear}.weight"] = module.structure.dense(module.factors())
    other = {**model.state_dict(), **state}
    plain = write_checkpoint(tmp_path / "apart", llama(attention_bias=True), apart, override=other)
    ids = torch.arange(1, 20)[None]
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
