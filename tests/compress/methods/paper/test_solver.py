"""Both stages of the paper, alone and end to end on tiny models."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from compress.architecture import SUB_BLOCKS, WRITERS
from compress.methods.paper.descent import total_norm
from compress.methods.paper.projections import frobenius_factors
from compress.methods.paper.shapes import Kind, paper_structures
from compress.methods.paper.solver import (
    PaperMember,
    PaperMoments,
    PaperPosition,
    frobenius_stage,
    objective,
    orthogonal,
    paper_plan,
    paper_positions,
    position_members,
    project,
    solve_position,
)
from compress.rewrites.folding import folded
from compress.rewrites.rotations import orthogonality_error, rotate_block
from compress.structures import KroneckerStructure, Structure
from compress.structures.gs import GroupShuffleStructure
from tests import tiny
from tests.compress.helpers import TinyModel, tiny_source

CPU = torch.device("cpu")
WIDTH = 16


@dataclass(frozen=True)
class Grams:
    read: Tensor
    inner: Tensor


def falling(width: int, generator: torch.Generator) -> Tensor:
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    return (basis * 0.9 ** torch.arange(width, dtype=torch.float64)) @ basis.T


def random_moments(name: str, tiny_model: TinyModel) -> PaperMoments:
    arch, generator = tiny_source(tiny_model, name).architecture(), torch.Generator().manual_seed(0)
    return {
        (layer, sub): Grams(falling(arch.hidden_size, generator), falling(arch.linears()[WRITERS[sub]][1], generator))
        for layer in range(arch.num_layers)
        for sub in SUB_BLOCKS
    }


def some_members(kind: Kind) -> list[PaperMember]:
    """Two readers with one Gram matrix, and a writer."""
    generator = torch.Generator().manual_seed(1)
    shared = falling(WIDTH, generator)
    shapes: list[tuple[str, int, int, Tensor]] = [
        ("out", WIDTH, 24, falling(24, generator)),
        ("in", 8, WIDTH, shared),
        ("in", 24, WIDTH, shared),
    ]
    members = []
    for i, (side, n, m, gram) in enumerate(shapes):
        structure: Structure = GroupShuffleStructure(m, n, 2, 2, 3)
        if kind == "kron":
            structure = KroneckerStructure(m, n, 4, 3, "out" if side == "out" else "in")
        weight = torch.randn(n, m, generator=generator, dtype=torch.float64)
        members.append(PaperMember(str(i), weight, gram, side, structure))
    return members


@pytest.mark.parametrize("kind", ["kron", "gs"])
def test_stage_one_never_raises_the_error(kind: Kind) -> None:
    members = some_members(kind)
    q, errors = frobenius_stage(members, torch.zeros(WIDTH, WIDTH, dtype=torch.float64), 30)
    assert len(errors) == 30
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]
    torch.testing.assert_close(q.T @ q, torch.eye(WIDTH, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["kron", "gs"])
def test_stage_one_counts_its_errors_right(kind: Kind) -> None:
    """The first error is that of the projections at Q = I, the second that at the Q of one iteration."""
    members, exact = some_members(kind), torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    q, _ = frobenius_stage(members, exact, 1)
    _, errors = frobenius_stage(members, exact, 2)
    for at, seen in zip((torch.eye(WIDTH, dtype=torch.float64), q), errors, strict=True):
        expected = 0.0
        for m in members:
            target = m.rotated(at)
            expected += float((target - m.structure.dense(frobenius_factors(m.structure, target))).square().sum())
        assert seen == pytest.approx(expected)


def test_what_stays_dense_holds_the_rotation_back() -> None:
    """An exact term W^T W Q pulls each step towards where Q already is; it never changes what is projected."""
    members, free = some_members("kron"), torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    moved = [float((frobenius_stage(members, free + pin * torch.eye(WIDTH), 3)[0] - torch.eye(WIDTH)).norm())
             for pin in (0.0, 100.0, 1e5)]  # fmt: skip
    assert moved[0] > 2 * moved[1] > 20 * moved[2] > 0


@pytest.mark.parametrize("kind", ["kron", "gs"])
def test_a_position_gains_at_each_stage(kind: Kind) -> None:
    exact = torch.zeros(WIDTH, WIDTH)
    done = solve_position(3, some_members(kind), exact, 10, 300)
    record = done.record
    assert record.stage_one_error > record.error_before > record.error_after > 0
    assert record.error_after == pytest.approx(sum(done.errors.values()))
    assert orthogonality_error([done.q]) < 1e-12
    assert record.steps > 10
    assert min(record.stage_one_seconds, record.rotation_seconds, record.projection_seconds) > 0
    # Position 0 is left where stage 1 put it.
    first = solve_position(0, some_members(kind), exact, 10, 300)
    assert (first.record.steps, first.record.error_after) == (0, first.record.error_before)


def test_the_writer_weighs_as_much_as_the_mean_of_the_readers() -> None:
    members = some_members("kron")
    q = torch.eye(WIDTH, dtype=torch.float64)
    terms = objective(members, q, project(members, q))
    sizes = [float(((m.weight @ m.gram) * m.weight).sum()) ** 0.5 for m in members]
    assert [t.scale for t in terms] == pytest.approx([(sizes[1] + sizes[2]) / 2 / sizes[0], 1, 1])
    assert terms[1].left is terms[2].left
    value, _ = total_norm(terms, torch.zeros(WIDTH, WIDTH))
    factors = project(members, q)
    expected = sum(
        t.scale * s * m.relative_error(q, factors[m.name]) ** 0.5 for t, s, m in zip(terms, sizes, members, strict=True)
    )
    assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["kron", "gs"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_tied", "tiny_opt", "tiny_qwen3"])
def test_end_to_end(name: str, kind: Kind, tiny_model: TinyModel) -> None:
    model, moments = folded(tiny_source(tiny_model, name)), random_moments(name, tiny_model)
    counts = torch.bincount(tiny.token_ids(4, 32).flatten(), minlength=tiny.VOCAB_SIZE)
    seen: list[PaperPosition] = []
    plan = paper_plan(
        model, kind, 0.75, moments, counts, als_iterations=4, gd_iterations=60, device=CPU, on_position=seen.append
    )
    arch = model.arch
    assert [p.position for p in seen] == list(range(2 * arch.num_layers + 1))
    assert plan.rotations.kind == "block"
    assert orthogonality_error(plan.rotations.matrices) < 1e-12
    assert plan.structures == paper_structures(arch, kind, 0.75)
    factors = {linear: parts for p in seen for linear, parts in p.factors.items()}
    assert factors.keys() == plan.structures.keys()
    for layer in range(arch.num_layers):
        rotated = rotate_block(model.block(layer), arch, layer, plan.rotations)
        for role in arch.linears():
            linear = f"layers.{layer}.{role}"
            if linear not in factors:
                continue
            structure, weight = plan.structures[linear], rotated[f"{role}.weight"].double()
            structure.check_factors(factors[linear])
            moment, position = moments[layer, role.split(".")[0]], 2 * layer + role.startswith("mlp")
            q = plan.rotations.matrices[position]
            gram = q.T @ moment.read @ q if arch.side(role) == "in" else moment.inner
            gap = weight - structure.dense(factors[linear]).double()
            error = float(((gap @ gram) * gap).sum() / ((weight @ gram) * weight).sum())
            at = position + (arch.side(role) == "out")
            assert error == pytest.approx(seen[at].errors[linear], rel=1e-3)
    # Better than stage 1 alone, with and without its rotations.
    for record in plan.records:
        assert record.error_after <= record.error_before < record.stage_one_error
    assert sum(r.error_after for r in plan.records) < 0.97 * sum(r.error_before for r in plan.records)


def test_any_range_of_positions_gives_the_same(tiny_model: TinyModel) -> None:
    """Positions are independent, so an interrupted run may go on anywhere."""
    model, moments = folded(tiny_source(tiny_model, "tiny_llama")), random_moments("tiny_llama", tiny_model)
    counts = torch.ones(tiny.VOCAB_SIZE, dtype=torch.int64)

    def positions(start: int, stop: int | None) -> list[PaperPosition]:
        return list(
            paper_positions(
                model, "kron", 0.5, moments, counts,
                als_iterations=2, gd_iterations=5, device=CPU, start=start, stop=stop,
            )
        )  # fmt: skip

    whole = positions(0, None)
    for start, stop in ((0, 3), (3, 4), (4, None), (6, None)):
        part = positions(start, stop)
        assert [p.position for p in part] == list(range(start, 7 if stop is None else stop))
        for p in part:
            assert torch.equal(p.q, whole[p.position].q)
            assert p.factors.keys() == whole[p.position].factors.keys()


def test_members_of_a_position(tiny_model: TinyModel) -> None:
    source = tiny_source(tiny_model, "tiny_llama")
    model, moments = folded(source), random_moments("tiny_llama", tiny_model)
    structures = paper_structures(model.arch, "kron", 0.75)
    counts = torch.zeros(tiny.VOCAB_SIZE, dtype=torch.int64)
    counts[7] = 1000
    found = {p: (m, e) for p, m, e in position_members(model, structures, moments, counts, CPU)}
    names = {p: [m.name for m in members] for p, (members, _) in found.items()}
    assert names[0] == ["layers.0.attn.q", "layers.0.attn.k"]
    assert names[1] == ["layers.0.attn.o", "layers.0.mlp.gate", "layers.0.mlp.up"]
    assert names[2] == ["layers.0.mlp.down", "layers.1.attn.q", "layers.1.attn.k"]
    assert names[6] == ["layers.2.mlp.down"]
    # v is there, dense; the embedding and the head with their tokens' counts.
    v = model.block(1)["attn.v.weight"]
    torch.testing.assert_close(found[2][1], v.T @ v)
    assert not found[1][1].any()
    head = source.reader().get("lm_head.weight") * source.reader().get("model.norm.weight")
    expected = head.T @ head + 1000 * torch.outer(head[7], head[7])
    torch.testing.assert_close(found[6][1], expected, rtol=1e-4, atol=1e-3)
    embedding, v = source.reader().get("model.embed_tokens.weight"), model.block(0)["attn.v.weight"]
    expected = embedding.T @ embedding + 1000 * torch.outer(embedding[7], embedding[7]) + v.T @ v
    torch.testing.assert_close(found[0][1], expected, rtol=1e-4, atol=1e-3)


def test_orthogonal_removes_rounding() -> None:
    q = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))).Q
    assert orthogonality_error([orthogonal(q + 1e-4 * torch.ones_like(q))]) < 1e-14


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["kron", "gs"])
def test_a_gpu_finds_as_much(kind: Kind) -> None:
    members, cuda = some_members(kind), torch.device("cuda")
    there = [PaperMember(m.name, m.weight.to(cuda), m.gram.to(cuda), m.side, m.structure) for m in members]
    here = solve_position(3, members, torch.zeros(WIDTH, WIDTH), 10, 100).record
    found = solve_position(3, there, torch.zeros(WIDTH, WIDTH, device=cuda), 10, 100)
    assert found.q.device.type == "cuda"
    assert found.record.error_before == pytest.approx(here.error_before, rel=1e-2)
    assert found.record.error_after == pytest.approx(here.error_after, rel=5e-2)
