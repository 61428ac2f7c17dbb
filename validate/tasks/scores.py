"""From log-likelihoods to accuracies, their errors, and the table."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.progress import log

if TYPE_CHECKING:
    from compress.model.decoder import ProcrustesForCausalLM
    from validate.tasks.data import Example, Task
    from validate.tasks.scoring import Score


def evaluate(
    model: ProcrustesForCausalLM,
    tokenizer: Any,
    tasks: Sequence[Task],
    examples: dict[str, list[Example]],
    tokens_at_once: int = 4096,
) -> dict[str, Any]:
    """Task name -> figures (see `figures`), scored one task after the other."""
    return {
        task.name: figures(
            task, examples[task.name], _scores(model, tokenizer, task, examples[task.name], tokens_at_once)
        )
        for task in tasks
    }


def _scores(
    model: ProcrustesForCausalLM, tokenizer: Any, task: Task, examples: Sequence[Example], tokens_at_once: int
) -> list[list[Score]]:
    """The scores of each example's choices. Choices with one context run as one item."""
    from validate.tasks.scoring import encode, score

    items, owners = [], []  # owners: of each item the example and its choices
    for number, example in enumerate(examples):
        contexts: dict[str, list[int]] = {}
        for choice, (context, _) in enumerate(example.choices):
            contexts.setdefault(context, []).append(choice)
        for context, choices in contexts.items():
            items.append(encode(tokenizer, context, [example.choices[choice][1] for choice in choices]))
            owners.append((number, choices))
    found: list[dict[int, Score]] = [{} for _ in examples]
    start = said = time.monotonic()
    for done, (index, scores) in enumerate(score(model, items, tokens_at_once), start=1):
        number, choices = owners[index]
        found[number].update(zip(choices, scores, strict=True))
        now = time.monotonic()
        if done == len(items) or now - said > 20:
            said, left = now, (now - start) * (len(items) - done) / done
            log(f"{task.name}: {done}/{len(items)} contexts, longest first, at most {left:.0f} s left")
    return [[by_choice[choice] for choice in sorted(by_choice)] for by_choice in found]


def figures(task: Task, examples: Sequence[Example], scores: Sequence[Sequence[Score]]) -> dict[str, Any]:
    """Fractions of right answers, their standard errors, and the answers themselves ("1" for a right one).

    The standard error of a mean of n answers is sqrt(sum (x - mean)^2 / (n - 1) / n). LAMBADA has the perplexity of
    the last word, exp(-mean log-likelihood), beside it.
    """
    right: dict[str, list[bool]] = {"acc": []}
    if task.normalised:
        right["acc_norm"] = []
    for example, choices in zip(examples, scores, strict=True):
        likelihoods = [s.log_likelihood for s in choices]
        if len(choices) == 1:
            right["acc"].append(choices[0].greedy)
            continue
        right["acc"].append(_first_largest(likelihoods) == example.gold)
        if task.normalised:
            normal = [value / count for value, count in zip(likelihoods, example.characters, strict=True)]
            right["acc_norm"].append(_first_largest(normal) == example.gold)
    result: dict[str, Any] = {"questions": len(examples), "main": task.main}
    for metric, answers in right.items():
        mean, error = _mean_and_error([float(answer) for answer in answers])
        result |= {metric: mean, f"{metric}_standard_error": error}
        result[f"{metric}_answers"] = "".join("01"[answer] for answer in answers)
    if all(len(example.choices) == 1 for example in examples):
        mean, error = _mean_and_error([choices[0].log_likelihood for choices in scores])
        result["perplexity"] = math.exp(-mean)
        result["perplexity_standard_error"] = None if error is None else math.exp(-mean) * error
    return result


def difference(dense: dict[str, Any], compressed: dict[str, Any]) -> dict[str, Any]:
    """Difference of the main figure, compressed - dense; the standard error is that of the paired differences."""
    found = {}
    for name, first in dense.items():
        metric = first["main"]
        pairs = zip(first[f"{metric}_answers"], compressed[name][f"{metric}_answers"], strict=True)
        mean, error = _mean_and_error([float(int(b) - int(a)) for a, b in pairs])
        found[name] = {"main": metric, "difference": mean, "standard_error": error}
    return found


def table(results: dict[str, Any]) -> str:
    """A Markdown table: a line for each task, in percent; the main figure of a task in bold."""
    from validate.report.markdown import markdown_table
    from validate.tasks.data import TASKS

    models = [name for name in ("dense", "compressed") if name in results]
    header = ["task", "questions", *(f"{model} {metric}" for model in models for metric in ("acc", "acc_norm"))]
    rows = []
    for name in results[models[0]]:
        row = [TASKS[name].title, str(results[models[0]][name]["questions"])]
        for model in models:
            row += [_percent(results[model][name], metric) for metric in ("acc", "acc_norm")]
        if "difference" in results:
            entry = results["difference"][name]
            row.append(f"{100 * entry['difference']:+.1f}" + _plus_minus(entry["standard_error"]))
        rows.append(row)
    return markdown_table(header + (["difference"] if "difference" in results else []), rows)


def _percent(entry: dict[str, Any], metric: str) -> str:
    if metric not in entry:
        return ""
    text = f"{100 * entry[metric]:.1f}" + _plus_minus(entry[f"{metric}_standard_error"])
    return f"**{text}**" if entry["main"] == metric else text


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {100 * error:.1f}"


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def _first_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])
