"""Final hidden states kept on disk: what the model gives, and only for their own windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compress.model.decoder import ProcrustesForCausalLM
from tests.validate.perplexity.windows import windows_of
from validate.perplexity import hidden
from validate.perplexity.scores import HiddenLogits, TorchLogits, compare

MakeModel = Callable[..., ProcrustesForCausalLM]


@pytest.mark.parametrize("kind", ["llama", "opt", "opt-block"])
def test_kept_hidden_states_give_what_the_model_gives(make_model: MakeModel, kind: str, tmp_path: Path) -> None:
    """150 positions cross the slices of the head; the windows overlap."""
    model, other = make_model(kind), make_model(kind, seed=1)
    windows = windows_of(460, 100, 90) if kind == "llama" else windows_of(200, 50)
    hidden.fill_hidden(model, windows, tmp_path / "hidden.f32")
    kept = hidden.read_hidden(windows, model.config.hidden_size, tmp_path / "hidden.f32")
    source = HiddenLogits(windows, kept, model.lm_head.weight, model.lm_head.bias)
    for batch in (1, 3):
        a, b = (compare(s, TorchLogits(other), windows, batch) for s in (source, TorchLogits(model)))
        assert a == replace(b, dense=a.dense) or a.kl == pytest.approx(b.kl, rel=1e-5)
        assert a.dense.mean_nll == pytest.approx(b.dense.mean_nll, rel=1e-6)
        assert a.top1_agreement == b.top1_agreement


def test_hidden_states_of_other_windows_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    model, windows = make_model("llama"), windows_of(64, 16)
    hidden.fill_hidden(model, windows, tmp_path / "hidden.f32")
    source = HiddenLogits(windows, hidden.read_hidden(windows, 64, tmp_path / "hidden.f32"), model.lm_head.weight)
    with pytest.raises(ValueError, match="not a window"):
        compare(source, TorchLogits(model), windows_of(64, 16, seed=1))


def test_filling_goes_on_where_it_was(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows, path = make_model("llama"), windows_of(64, 16), tmp_path / "hidden.f32"
    seen: list[int] = []

    def stop(message: str) -> None:
        seen.append(len(seen))
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(hidden, "log", stop)
    with pytest.raises(KeyboardInterrupt):
        hidden.fill_hidden(model, windows, path)
    assert not path.exists()
    hidden.fill_hidden(model, windows, path)
    assert len(seen) == 4  # two windows before the interrupt, the other two after it
    whole = tmp_path / "whole.f32"
    hidden.fill_hidden(model, windows, whole)
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hidden.f32", "whole.f32"]


def test_hash_of_windows_is_that_of_what_they_hold() -> None:
    windows = windows_of(64, 16)
    other = replace(windows, ids=torch.cat([windows.ids, torch.tensor([1])]))
    assert hidden.window_sha256(windows) == hidden.window_sha256(other)
    changed = windows.ids.clone()
    changed[3] += 1
    for different in (replace(windows, ids=changed), replace(windows, count=3), replace(windows, length=8, stride=8)):
        assert hidden.window_sha256(windows) != hidden.window_sha256(different)
