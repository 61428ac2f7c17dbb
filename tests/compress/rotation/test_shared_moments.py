"""Terms of the stream that share a moment are worked on together, and lose what each by itself would."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compress.rotation.nested import Dropped, StreamTerm, dropped_loss, plane_curvatures, summed_loss
from compress.rotation.stream import StreamRotations
from tests.compress.helpers import F64, TinyModel, normal, tiny_source

KEPT = [3, 3, 5, 3, 0]


def moment(size: int, seed: int) -> Tensor:
    root = normal(size, 2 * size, seed=seed)
    return root @ root.T / size


def terms(size: int) -> list[StreamTerm]:
    """The first three share P."""
    p, others = moment(size, 1), [moment(size, 2), moment(size, 3)]
    return [StreamTerm(f"{i}", at, moment(size, 10 + i), 1) for i, at in enumerate((p, p, p, *others))]


def apart(found: list[StreamTerm]) -> list[StreamTerm]:
    return [replace(t, p=t.p.clone()) for t in found]


def test_what_is_summed_is_what_each_loses() -> None:
    found, q = terms(8), torch.linalg.qr(normal(8, 8, seed=0)).Q
    together, alone = (Dropped.of(list(zip(t, KEPT, strict=True)), F64) for t in (found, apart(found)))
    assert [len(group.members) for group in together] == [2, 1, 1]
    assert [len(group.members) for group in alone] == [1] * 5
    (value, slope), (expected, right) = dropped_loss(together, q), dropped_loss(alone, q)
    assert value == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(slope, right, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(plane_curvatures(together, q), plane_curvatures(alone, q), rtol=1e-10, atol=0)
    curves = sum(float(t.curve(q)[k]) for t, k in zip(found, KEPT, strict=True))
    assert summed_loss(list(zip(found, KEPT, strict=True)), q) == pytest.approx(curves, rel=1e-12)
    assert value == pytest.approx(curves, rel=1e-10)


def test_layer_norm_leaves_shared_moments_shared(tiny_model: TinyModel) -> None:
    arch = tiny_source(tiny_model, "tiny_opt").architecture()
    rotations = StreamRotations(arch, "shared")
    assert rotations.basis is not None
    found, known = terms(arch.hidden_size), dict[int, Tensor]()
    inside = [rotations.term(t, known) for t in found]
    assert inside[0].p is inside[1].p is inside[2].p
    assert inside[3].p is not inside[0].p
    for a, b in zip(inside, [rotations.term(t) for t in found], strict=True):
        assert torch.equal(a.p, b.p)
        assert torch.equal(a.m, b.m)
