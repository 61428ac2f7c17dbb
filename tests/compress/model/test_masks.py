"""Attention masks against transformers' own models with the same masks, with and without caches; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, StaticCache

from compress.checkpoint.loading import load_model
from compress.checkpoint.rewritten import write_rewritten
from compress.errors import UsageError
from compress.model.masks import mask_unless_causal
from compress.rewrites.rotations import Rotations
from tests import tiny
from tests.compress.helpers import TinyModel, relative, tiny_source

BATCH, LENGTH, HEADS = 3, 9, 4
LOWEST = torch.finfo(torch.float32).min
PADDING = torch.tensor([[0] * missing + [1] * (LENGTH - missing) for missing in (0, 2, 5)])
IDS = tiny.token_ids(BATCH, LENGTH)


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_opt", "tiny_mistral"])
def models(request: pytest.FixtureRequest, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(transformers' model, the same one as ours): grouped heads and rotary positions, learned positions, a window."""
    source, folder = tiny_source(tiny_model, request.param), tmp_path_factory.mktemp("masks")
    write_rewritten(source, Rotations.none(), folder)
    return source.reference_model(torch.float32), load_model(folder)


def visible(window: int | None = None) -> Tensor:
    """(batch, 1, length, length): causal, padding hidden, rows of padding with nothing to see."""
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]
    seen = (key <= query) & ((key > query - window) if window else True)
    return seen[None, None] & PADDING.bool()[:, None, None, :]


def additive(lowest: float, window: int | None = None) -> Tensor:
    return torch.zeros(BATCH, 1, LENGTH, LENGTH).masked_fill(~visible(window), lowest)


def biased() -> Tensor:
    """A value for each head and pair, as relative position biases are."""
    biases = torch.randn(BATCH, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0))
    return biases + additive(LOWEST)


MASKS: dict[str, Any] = {
    "2 axes, int": lambda w: PADDING,
    "2 axes, bool": lambda w: PADDING.bool(),
    "2 axes, float": lambda w: PADDING.float(),
    "4 axes, bool": visible,
    "4 axes, lowest": lambda w: additive(LOWEST, w),
    "4 axes, a value for each head": lambda w: biased(),
    "4 axes, one for the batch": lambda w: additive(LOWEST, w)[:1],
}


@torch.no_grad()
def test_logits_are_transformers(models: Any) -> None:
    reference, ours = models
    positions = (PADDING.cumsum(-1) - 1).clamp(min=0)
    for name, make in MASKS.items():
        mask = make(ours.model.arch.sliding_window)
        given = {"input_ids": IDS, "attention_mask": mask, "position_ids": positions, "use_cache": False}
        kept = PADDING.bool()
        expected, found = (model(**given).logits[kept] for model in (reference, ours))
        assert relative(found, expected) < 1e-4, name


@torch.no_grad()
def test_minus_infinity_is_the_lowest_value(models: Any) -> None:
    """transformers itself gives NaN where a row of padding sees nothing; here it is the lowest value's result."""
    _, ours = models
    found, expected = (ours(IDS, additive(v)).logits[PADDING.bool()] for v in (-torch.inf, LOWEST))
    assert torch.isfinite(found).all()
    assert relative(found, expected) < 1e-6


@torch.no_grad()
def test_without_positions(models: Any) -> None:
    """A mask of four axes: counted from the start of the cache. In transformers OPT cannot do without positions."""
    reference, ours = models
    mask = visible(ours.model.arch.sliding_window)
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    expected = reference(input_ids=IDS, attention_mask=mask, position_ids=positions, use_cache=False).logits
    found = ours(IDS, mask, use_cache=False).logits
    assert relative(found[PADDING.bool()], expected[PADDING.bool()]) < 1e-4


@torch.no_grad()
def test_a_hole_without_positions(models: Any) -> None:
    """Rotary positions count what is hidden, learned ones do not: transformers' own rule, for each of both."""
    reference, ours = models
    mask = PADDING.clone()
    mask[:, 6] = 0
    expected, found = (model(input_ids=IDS, attention_mask=mask).logits[mask.bool()] for model in (reference, ours))
    assert relative(found, expected) < 1e-4
    # On from the cache, the hole in what is there already.
    cache, theirs = DynamicCache(), DynamicCache(config=reference.config)
    for start, end in ((0, 7), (7, 9)):
        given = {"input_ids": IDS[:, start:end], "attention_mask": mask[:, :end]}
        found = ours(**given, past_key_values=cache).logits
        expected = reference(**given, past_key_values=theirs).logits
    assert relative(found, expected) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_additive_masks_of_another_type_than_the_model(models: Any, dtype: torch.dtype) -> None:
    _, ours = models
    lowest, window = torch.finfo(dtype).min, ours.model.arch.sliding_window
    expected = ours(IDS, additive(LOWEST, window)).logits[PADDING.bool()]
    for value in (lowest, -torch.inf):
        found = ours(IDS, additive(0.0, window).to(dtype).masked_fill(~visible(window), value)).logits
        assert torch.equal(found[PADDING.bool()], expected)


@torch.no_grad()
@pytest.mark.parametrize("form", [torch.bool, torch.float32], ids=str)
def test_keys_before_the_window_may_be_left_out(models: Any, form: torch.dtype) -> None:
    """transformers' cache of a model with a sliding window keeps window - 1 keys, and its masks have those alone."""
    reference, ours = models
    window = ours.model.arch.sliding_window
    ids, past, length = tiny.token_ids(2, 12), 8, 4
    query, key = torch.arange(past, past + length)[:, None], torch.arange(past + length)[None, :]
    seen = (key <= query) & (key > query - (window or past + length))
    mask = seen[None, None].expand(2, 1, length, past + length)
    mask = mask if form == torch.bool else torch.zeros(mask.shape).masked_fill(~mask, LOWEST)
    found = []
    for model, keys in ((ours, 12), (ours, 11 if window else 12), (reference, 11 if window else 12)):
        cache = DynamicCache(config=reference.config) if model is reference else DynamicCache()
        model(input_ids=ids[:, :past], past_key_values=cache)
        positions = torch.arange(past, past + length).expand(2, length)
        given = {"input_ids": ids[:, past:], "attention_mask": mask[..., -keys:], "position_ids": positions}
        found.append(model(**given, past_key_values=cache).logits)
    assert torch.equal(found[0], found[1])
    assert relative(found[1], found[2]) < 1e-5


@torch.no_grad()
def test_a_window_does_not_make_other_widths_right(models: Any) -> None:
    _, ours = models
    cache = DynamicCache()
    ours(IDS[:, :8], past_key_values=cache)
    wanted = "9 keys, or 8 without those before the window" if ours.model.arch.sliding_window else "9 keys it must"
    with pytest.raises(UsageError, match=wanted):
        ours(IDS[:, 8:], torch.ones(BATCH, 1, 1, 7, dtype=torch.bool), past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_with_a_cache(models: Any, static: bool) -> None:
    """A prefill of 6 tokens and one of 3 more with left padding, then one token: as the whole at once."""
    _, ours = models
    whole = ours(IDS, PADDING, use_cache=False).logits
    cache = StaticCache(config=ours.config, max_cache_len=LENGTH + 4) if static else DynamicCache()
    for start, end in ((0, 5), (5, 8), (8, 9)):
        found = ours(IDS[:, start:end], PADDING[:, :end], past_key_values=cache).logits
        kept = PADDING[:, start:end].bool()
        assert relative(found[kept], whole[:, start:end][kept]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_four_axes_with_a_cache(models: Any, static: bool) -> None:
    _, ours = models
    window = ours.model.arch.sliding_window
    room = LENGTH + 4 if static else LENGTH
    mask = torch.full((BATCH, 1, LENGTH, room), LOWEST)
    mask[..., :LENGTH] = additive(LOWEST, window)
    whole = ours(IDS, mask[..., :LENGTH], use_cache=False).logits
    cache = StaticCache(config=ours.config, max_cache_len=room) if static else DynamicCache()
    for start, end in ((0, 5), (5, 9)):
        keys = room if static else end
        found = ours(IDS[:, start:end], mask[:, :, start:end, :keys], past_key_values=cache).logits
        kept = PADDING[:, start:end].bool()
        assert relative(found[kept], whole[:, start:end][kept]) < 1e-4


def test_generation_with_a_static_cache(models: Any) -> None:
    _, ours = models
    options = {"attention_mask": PADDING, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    growing, static = (ours.generate(IDS, **options, cache_implementation=kind) for kind in (None, "static"))
    assert torch.equal(growing, static)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_lowest_value_of_a_wider_type_stays_finite(dtype: torch.dtype) -> None:
    mask = mask_unless_causal(additive(LOWEST), BATCH, 0, LENGTH, None, torch.device("cpu"), dtype=dtype)
    assert mask is not None
    assert mask.dtype == dtype
    assert torch.isfinite(mask).all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (PADDING[:, 1:], r"attention_mask is \(3, 8\).* must be \(3, 9\)"),
        (PADDING[:2], "for 3 sequences"),
        (PADDING * 2, "values other than 0"),
        (torch.where(PADDING.bool(), 0.0, LOWEST), "values other than 0 .* four axes"),
        (PADDING[:, None], r"shape \(3, 1, 9\): give \(batch, tokens\)"),
        (visible().long(), "is torch.int64: give booleans"),
        (visible().float(), "the floats 0 and 1"),
        (visible()[..., 1:], r"must be \(3, 1, 9, 9\)"),
        (visible()[:2], "must be"),
        (visible().expand(-1, 2, -1, -1), "have 4, a value for each head"),
        (visible().expand(-1, 8, -1, -1).float() - 1, "have 4, a value for each head"),
    ],
)
def test_what_is_not_understood_is_refused(models: Any, mask: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        models[1](IDS, mask)
