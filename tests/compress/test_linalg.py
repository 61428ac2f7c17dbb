"""NaN and infinity are found, and large sums of finite values are not taken for them."""

from __future__ import annotations

import pytest
import torch

from compress.linalg import all_finite

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, -2.0], True), ([], True), ([1.0, NAN], False), ([INF, 1.0], False), ([INF, -INF], False), ([-INF], False)],
)
def test_every_entry_counts(values: list[float], expected: bool, dtype: torch.dtype) -> None:
    assert all_finite(torch.tensor(values, dtype=dtype)) is expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_sum_may_overflow(dtype: torch.dtype) -> None:
    assert all_finite(torch.full((8,), torch.finfo(dtype).max, dtype=dtype))
    assert not all_finite(torch.tensor([torch.finfo(dtype).max] * 8 + [NAN], dtype=dtype))
