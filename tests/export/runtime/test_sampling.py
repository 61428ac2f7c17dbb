"""Sampling is total: every setting that a client may send, with any logits that a model may give, yields a token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from compress.errors import UsageError
from export.runtime.sampling import Sampler
from export.triton.settings import LEAST_REPETITION, MOST_PENALTY, MOST_REPETITION, MOST_TEMPERATURE, Settings
from export.triton.steering import log_probabilities, steered

HUGE = float(np.finfo(np.float32).max)
TINY = float(np.finfo(np.float32).smallest_subnormal)


def singles(least: float, most: float, *, exclude_min: bool = False) -> st.SearchStrategy[float]:
    """float32 numbers, as a client's tensors hold them, the ends and subnormal ones included."""
    return st.floats(least, most, width=32, exclude_min=exclude_min)


values = st.one_of(singles(-HUGE, HUGE), st.sampled_from([0.0, 1.0, -1.0, HUGE, -HUGE, TINY]))
logits_of_a_model = st.integers(1, 40).flatmap(lambda n: arrays(np.float32, n, elements=values))


@st.composite
def with_impossible_tokens(draw: st.DrawFn) -> Any:
    """Some tokens at -inf, and at least one that is not."""
    logits = draw(logits_of_a_model)
    impossible = draw(arrays(bool, len(logits)))
    impossible[draw(st.integers(0, len(logits) - 1))] = False
    logits[impossible] = -np.inf
    return logits


@budget(max_examples=100, deadline=None, derandomize=True)
@given(
    logits=with_impossible_tokens(),
    temperature=st.one_of(singles(0, HUGE), st.floats(0, 1.7e308)),
    top_k=st.none() | st.integers(1, 2**31 - 1),
    top_p=st.none() | singles(0, 1, exclude_min=True) | st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**64 - 1),
)
def test_whatever_the_options_a_possible_token_is_drawn(
    logits: Any, temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> None:
    sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    (token,) = sampler(logits[None])
    assert np.isfinite(logits[token])
    assert Sampler(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)(logits[None])[0] == token
    if temperature == 0 or top_k == 1:
        assert logits[token] == logits.max()
    if temperature > 0:
        p = sampler.probabilities(logits)
        assert p.sum() == pytest.approx(1)
        assert (p >= 0).all()
        assert np.count_nonzero(p) <= min(top_k or len(p), np.isfinite(logits).sum())


@budget(max_examples=100, deadline=None, derandomize=True)
@given(
    logits=logits_of_a_model,
    settings=st.builds(
        Settings,
        max_tokens=st.just(64),
        min_tokens=st.integers(0, 64),
        temperature=singles(0, MOST_TEMPERATURE),
        top_k=st.integers(0, 2**31 - 1),
        top_p=singles(0, 1, exclude_min=True),
        repetition_penalty=st.floats(LEAST_REPETITION, MOST_REPETITION),
        frequency_penalty=singles(-MOST_PENALTY, MOST_PENALTY),
        presence_penalty=singles(-MOST_PENALTY, MOST_PENALTY),
        seed=st.integers(0, 2**64 - 1),
    ),
    data=st.data(),
)
def test_whatever_the_settings_a_token_is_chosen(logits: Any, settings: Settings, data: st.DataObject) -> None:
    """The whole way of the batcher: penalties, end tokens that come too early, and the choice."""
    tokens = st.integers(0, len(logits) - 1)
    prompt, made = data.draw(st.lists(tokens, min_size=1, max_size=8)), data.draw(st.lists(tokens, max_size=8))
    ends = data.draw(st.sets(tokens, max_size=len(logits) - 1))
    changed = steered(logits, settings, prompt=prompt, made=made, ends=ends)
    sampler = Sampler(
        temperature=settings.temperature, top_k=settings.top_k or None, top_p=settings.top_p, seed=settings.seed
    )
    (token,) = sampler(changed[None])
    assert 0 <= token < len(logits)
    assert not (len(made) < settings.min_tokens and token in ends)
    ((own,), (places,)) = log_probabilities(logits, token, 3)
    assert own <= 0
    assert list(places.values()) == sorted(places.values(), reverse=True)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e38, "top_p": 1e-30},  # uniform: no token is above (1 - top_p) / vocabulary
        {"temperature": 1.0, "top_p": 1e-45},
        {"temperature": 1e-45},
        {"temperature": 5e-324, "top_k": 2},
    ],
)
def test_options_that_stopped_a_server(options: dict[str, float]) -> None:
    for logits in (np.zeros((1, 50), np.float32), np.linspace(-9, 9, 50, dtype=np.float32)[None], HUGE * np.eye(3)[:1]):
        assert 0 <= Sampler(**options)(logits)[0] < logits.shape[1]  # type: ignore[arg-type]


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    for top_p, kept in ((1e-30, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.71, 3), (0.95, 4), (1.0, 4)):
        p = Sampler(temperature=1.0, top_p=top_p - 1e-12 if top_p > 0.3 else top_p).probabilities(logits)
        assert np.count_nonzero(p) == kept, top_p


@pytest.mark.parametrize("row", [[-np.inf, -np.inf], [np.nan, 1.0], [np.inf, 1.0], [np.inf, -np.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_token_are_refused(row: list[float], temperature: float) -> None:
    with pytest.raises(UsageError, match="NaN or infinite, or no token"):
        Sampler(temperature=temperature)(np.array([[1.0, 2.0], row]))


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_temperatures_that_make_no_sense(temperature: float) -> None:
    with pytest.raises(UsageError, match="temperature must be"):
        Sampler(temperature=temperature)
