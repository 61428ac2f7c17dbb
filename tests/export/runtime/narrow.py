"""An executor without a device, and the models that it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from export.runtime.ort import OrtExecutor
from export.runtime.profiles import Span, Spans, shape_at
from tests.export.cases import CASES, Case, kron
from tests.export.helpers import llama

SPANS = Spans(Span(1, 1, 4), Span(1, 8, 90), Span(1, 64, 150))


class NarrowExecutor(OrtExecutor):
    """ONNX Runtime that refuses what the profiles of an engine would."""

    def __init__(self, path: Path, spans: Spans = SPANS) -> None:
        super().__init__(path)
        self.spans = spans
        self.calls: list[tuple[int, tuple[int, ...]]] = []

    def run(self, profile: int, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        allowed = self.spans.profiles(self.axes)[profile]
        for name, value in feeds.items():
            least, _, most = allowed[name]
            assert all(a <= b <= c for a, b, c in zip(least, value.shape, most, strict=True)), (name, value.shape)
            assert value.dtype == self.types[name]
            assert value.is_contiguous()
        assert set(feeds) == set(self.axes)
        batch, new = feeds["input_ids"].shape
        past = feeds["past_key_values.0.key"].shape[2]
        for name, value in feeds.items():
            assert tuple(value.shape) == shape_at(self.axes[name], batch, new, past)
        self.calls.append((profile, (batch, new, past)))
        return super().run(profile, feeds)


MODELS = {
    "kron": Case(llama(max_positions=512), kron("explicit")),
    "sliding window": Case(llama(max_positions=512, sliding_window=20)),
    "opt mixture": CASES["opt mixture"],
}
