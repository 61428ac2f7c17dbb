"""Perplexity against a loop that a reader can check, and against what must not matter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.calibration.text import TextData
from compress.errors import ArtifactError, UsageError
from compress.model.decoder import ProcrustesForCausalLM
from tests import tiny
from tests.validate.perplexity.windows import windows_of
from validate.perplexity.scores import Comparison, TorchLogits, compare
from validate.perplexity.windows import Windows, make_windows

MakeModel = Callable[..., ProcrustesForCausalLM]


def by_hand(a: ProcrustesForCausalLM, b: ProcrustesForCausalLM, windows: Windows) -> dict[str, float]:
    """One token after the other, in float64."""
    seen: set[int] = set()
    nll_a = nll_b = kl = same = 0.0
    for w in range(windows.count):
        start = w * windows.stride
        ids = windows.ids[start : start + windows.length][None]
        p, q = (m.double()(ids, use_cache=False).logits[0].log_softmax(-1) for m in (a, b))
        for t in range(1, windows.length):
            if start + t in seen:
                continue
            seen.add(start + t)
            token = int(ids[0, t])
            nll_a -= float(p[t - 1, token])
            nll_b -= float(q[t - 1, token])
            kl += sum(math.exp(x) * (x - y) for x, y in zip(p[t - 1].tolist(), q[t - 1].tolist(), strict=True))
            same += int(p[t - 1].argmax() == q[t - 1].argmax())
    n = len(seen)
    return {"a": math.exp(nll_a / n), "b": math.exp(nll_b / n), "kl": kl / n, "same": same / n, "tokens": n}


@pytest.mark.parametrize(("length", "stride"), [(16, None), (16, 5), (150, None), (150, 130)])
def test_equals_a_loop_in_float64(make_model: MakeModel, length: int, stride: int | None) -> None:
    """150 positions cross the slices of the head; strides overlap the windows."""
    a, b = make_model("llama"), make_model("llama-kron", seed=1)
    windows = windows_of(460 if length > 100 else 71, length, stride)
    result = compare(TorchLogits(a), TorchLogits(b), windows)
    expected = by_hand(a, b, windows)
    assert result.dense.tokens == windows.predicted() == expected["tokens"]
    assert result.dense.perplexity == pytest.approx(expected["a"], rel=1e-5)
    assert result.compressed.perplexity == pytest.approx(expected["b"], rel=1e-5)
    assert result.relative_increase == pytest.approx(expected["b"] / expected["a"] - 1, rel=1e-4)
    assert result.kl == pytest.approx(expected["kl"], rel=1e-4)
    assert result.top1_agreement == pytest.approx(expected["same"])


def test_leaves_gradients_as_they_were(make_model: MakeModel) -> None:
    compare(TorchLogits(make_model("llama")), TorchLogits(make_model("llama", seed=1)), windows_of(40, 10))
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_does_not_depend_on_the_batch_size(make_model: MakeModel) -> None:
    a, b = make_model("opt"), make_model("opt-kron", seed=1)
    windows = windows_of(100, 12, 7)
    one, three = (compare(TorchLogits(a), TorchLogits(b), windows, batch_size=n) for n in (1, 3))
    assert one.dense.mean_nll == pytest.approx(three.dense.mean_nll, rel=1e-6)
    assert one.compressed.standard_error == pytest.approx(three.compressed.standard_error, rel=1e-4)
    assert one.kl == pytest.approx(three.kl, rel=1e-5)


def test_a_model_does_not_differ_from_itself(make_model: MakeModel) -> None:
    model = TorchLogits(make_model("llama"))
    result = compare(model, model, windows_of(64, 16))
    assert result.relative_increase == 0
    assert result.increase_standard_error == 0
    assert result.kl == pytest.approx(0, abs=1e-7)
    assert result.top1_agreement == 1


def test_standard_error_is_that_of_the_mean_over_windows(make_model: MakeModel) -> None:
    model = TorchLogits(make_model("llama"))
    windows = windows_of(16 * 6, 16)
    each = [
        compare(model, model, Windows(windows.ids[i * 16 : (i + 1) * 16], 16, 16, 1, False)).dense.mean_nll
        for i in range(6)
    ]
    expected = float(torch.tensor(each, dtype=torch.float64).std()) / math.sqrt(6)
    assert compare(model, model, windows).dense.standard_error == pytest.approx(expected, rel=1e-5)


def test_one_window_has_no_standard_error(make_model: MakeModel) -> None:
    model = TorchLogits(make_model("llama"))
    assert compare(model, model, windows_of(16, 16)).dense.standard_error is None


class _Constant:
    """Logits that are the same everywhere."""

    runtime = "test"

    def __init__(self, value: float) -> None:
        self.value = value

    def slices(self, ids: Tensor) -> Iterator[Tensor]:
        yield torch.full((*ids.shape, 199), self.value)


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    result = compare(_Constant(3.0), _Constant(-1.0), windows_of(64, 16))
    assert result.dense.perplexity == pytest.approx(199, rel=1e-5)
    assert isinstance(result, Comparison)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ArtifactError, match="not finite"):
        compare(_Constant(1.0), _Constant(value), windows_of(64, 16))


# --- Windows ---


def text(content: str) -> TextData:
    return TextData("test", (content,), "test")


def test_windows_tile_the_text_and_leave_out_the_tail() -> None:
    windows = make_windows(text(tiny.TEXT), tiny.tokenizer(), length=50)
    total = len(windows.ids)
    assert windows.count == total // 50
    assert windows.predicted() == windows.count * 49
    batches = list(windows.batches(4))
    assert torch.equal(torch.cat([ids for _, ids in batches]).flatten(), windows.ids[: windows.count * 50])
    assert [first for first, _ in batches] == list(range(0, windows.count, 4))


def test_text_is_tokenised_once_as_a_whole() -> None:
    calls: list[str] = []

    def tokenizer(content: str, verbose: bool) -> dict[str, list[int]]:
        calls.append(content)
        return {"input_ids": [7] * 40}

    rows = TextData("t", ("one\n", "", "two\n"), "test")
    make_windows(rows, tokenizer, length=10)
    assert calls == ["one\n\n\n\n\ntwo\n"]


def test_bos_is_noticed() -> None:
    def tokenizer(content: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [1, 5, 6, 7]}

    tokenizer.bos_token_id = 1  # type: ignore[attr-defined]
    assert make_windows(text("abc"), tokenizer, length=4).begins_with_bos
    assert not make_windows(text(tiny.TEXT), tiny.tokenizer(), length=4).begins_with_bos


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 10_000}, "too short"),
        ({"length": 1}, "at least 2"),
        ({"length": 16, "stride": 17}, "stride"),
        ({"length": 16, "stride": 0}, "stride"),
        ({"length": 16, "max_windows": 0}, "at least 1"),
        ({"length": 16, "vocab_size": 100}, "the tokenizer belongs to another model"),
    ],
)
def test_windows_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_windows(text(tiny.TEXT), tiny.tokenizer(), **options)


def test_max_windows() -> None:
    windows = make_windows(text(tiny.TEXT), tiny.tokenizer(), length=16, stride=8, max_windows=3)
    assert windows.count == 3
    assert windows.predicted() == 15 + 8 + 8
    assert SimpleNamespace(count=windows.count).count == len(list(windows.batches(1)))


def test_a_wide_head_leaves_the_tied_embedding_alone(built: Any) -> None:
    from compress.checkpoint.loading import load_model

    model = load_model(built.out / "checkpoint", torch.bfloat16)
    wide = TorchLogits(model, wide_head=True)
    [logits] = wide.slices(tiny.token_ids(1, 20))
    assert logits.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    [narrow] = TorchLogits(model).slices(tiny.token_ids(1, 20))
    assert narrow.dtype == torch.bfloat16
    assert 0 < float((logits - narrow.float()).abs().max()) < 0.1
