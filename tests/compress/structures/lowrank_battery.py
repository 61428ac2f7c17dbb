"""Low rank through the battery: a structure whose optimum is known."""

from __future__ import annotations

from hypothesis import strategies as st
from torch import Tensor

from compress.structures import LowRankStructure, Structure
from tests.compress.structures.battery import StructureBattery
from tests.compress.structures.bounds import best_error


@st.composite
def low_rank_specs(draw: st.DrawFn) -> LowRankStructure:
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    return LowRankStructure(m, n, draw(st.integers(1, min(m, n))))


class LowRankBattery(StructureBattery):
    structure = LowRankStructure
    exact = True

    def specs(self) -> st.SearchStrategy[Structure]:
        return low_rank_specs()

    def reference_error(self, spec: Structure, W: Tensor, gram: Tensor | None, metric: Tensor | None) -> float:
        assert isinstance(spec, LowRankStructure)
        return best_error(W, spec.rank, gram, metric)
