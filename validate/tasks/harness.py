"""A compressed model for lm-eval-harness, for users with a hub: all of its tasks instead of our six.

import lm_eval
from validate.tasks.harness import load_harness_model

lm_eval.simple_evaluate(model=load_harness_model("out/demo"), tasks=["arc_easy", "hellaswag"])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.lazy import require
from validate.tasks.scoring import Item, Score, encode, score

if TYPE_CHECKING:
    from compress.model.decoder import ProcrustesForCausalLM

MOST_NEW_TOKENS = 256


def load_harness_model(target: str | Path, dtype: str = "float32") -> Any:
    """An `lm_eval.api.model.LM` of an artifact folder or a checkpoint. Raises MissingDependencyError."""
    from validate.tasks.__main__ import load_compressed

    return harness_model(*load_compressed(Path(target), dtype))


def harness_model(model: ProcrustesForCausalLM, tokenizer: Any) -> Any:
    """An `lm_eval.api.model.LM` of this model; the class is made here, since lm-eval need not be installed."""
    api = require("lm_eval.api.model", pip="'procrustes-llm[harness]'", purpose="run tasks of lm-eval-harness")
    return type("ProcrustesLM", (_Adapter, api.LM), {})(model, tokenizer)


class _Adapter:
    """The three methods that lm-eval asks for; requests have their arguments in `args`."""

    def __init__(self, model: ProcrustesForCausalLM, tokenizer: Any) -> None:
        super().__init__()
        self.model: Any = model  # transformers' own annotation of `generate` fits no subclass
        self.tokenizer = tokenizer
        self._longest = model.config.parsed_architecture().max_positions

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(context, continuation) -> log-likelihood in nats, and whether it is what greedy decoding gives."""
        owners: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            owners.setdefault(request.args[0], []).append(number)
        items = [encode(self.tokenizer, c, [requests[n].args[1] for n in numbers]) for c, numbers in owners.items()]
        numbers_of = list(owners.values())
        found: dict[int, Score] = {}
        for index, scores in score(self.model, items):
            found.update(zip(numbers_of[index], scores, strict=True))
        return [(found[n].log_likelihood, found[n].greedy) for n in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """(text,) -> its log-likelihood in nats: each token once, after BOS (or EOS) and as much text as fits."""
        items, owners = [], []
        for number, request in enumerate(requests):
            ids = list(self.tokenizer(request.args[0], add_special_tokens=False, verbose=False)["input_ids"])
            begin = self.tokenizer.bos_token_id
            ids.insert(0, self.tokenizer.eos_token_id if begin is None else begin)
            for start in range(1, len(ids), self._longest):
                end = min(start + self._longest, len(ids))
                first = max(0, end - self._longest - 1)  # what is read: ids[first : end - 1]
                items.append(Item(tuple(ids[first:start]), (tuple(ids[start:end]),)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for index, [only] in score(self.model, items):
            totals[owners[index]] += only.log_likelihood
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """(context, {"until": [...], "max_gen_toks": n}) -> greedy continuation up to the first of these strings."""
        texts = []
        for request in requests:
            context, options = request.args
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            most = int(options.get("max_gen_toks", MOST_NEW_TOKENS))
            ids = self.tokenizer(context, return_tensors="pt", verbose=False)["input_ids"][:, -(self._longest - most) :]
            made = self.model.generate(
                ids, max_new_tokens=most, do_sample=False, stopping_criteria=[self._said(until, ids.shape[1])]
            )
            text = self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
            for mark in until:
                text = text.split(mark)[0]
            texts.append(text)
        return texts

    def _said(self, until: Sequence[str], begin: int) -> Any:
        """Criterion: one of these strings has been written. transformers' own criterion also looks into the prompt."""

        def said(ids: Tensor, scores: Tensor, **unused: Any) -> Tensor:
            text = self.tokenizer.decode(ids[0, begin:], skip_special_tokens=True)
            return torch.full((len(ids),), any(mark in text for mark in until), device=ids.device)

        return said
