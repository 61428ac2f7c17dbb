"""The quality table: every method compressed, measured against the dense model on the same text, side by side.

Each method has a folder in OUT and is compressed and evaluated once; run the same command again and it goes on where
it was. A method that fails is a line with the reason. The table is printed and kept as OUT/quality.md and
OUT/quality.json. Exit code 1 when a method failed, 3 when --check is given and a bar is not held.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.artifact.files import may_be_folder
from compress.artifact.reading import RefusedError, read_json, shown
from compress.cli.commands import add_common_arguments, check_at_least, command_parser, tell
from compress.cli.entry import run_cli
from compress.cli.parser import fraction
from compress.errors import GateError, UsageError
from compress.progress import log

if TYPE_CHECKING:
    from validate.quality.methods import Line
    from validate.quality.run import Bench

EXAMPLES = """examples:
  python -m validate.quality --list
  python -m validate.quality --model smollm2-135m --out out/quality --data wikitext:wiki.test.raw --ablation --tasks
  python -m validate.quality --model smollm2-135m --out out/quality --methods auto-0.75,kron,svd-llm --max-windows 16
"""
BEST_KEY = "auto-0.75"  # what the tasks are run on, and what the ablation is held against
MARK = "table"
NOT_TOLD = ("help", "json", "debug", "write_docs", "known")  # which change no figure
SIZES, SOURCES = "4,8,16,32,64,128,256", "boolq,lambada"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command_parser("validate.quality", __doc__, EXAMPLES)
    p.add_argument("--model", metavar="M", help="folder, .gguf file, ORG/NAME on the hub, or an alias")
    p.add_argument("--out", type=Path, metavar="OUT", help="a folder for all methods (default: out/quality)")
    what = p.add_argument_group("which methods")
    what.add_argument("--methods", metavar="NAME,...", help="names, also with any ratio: kron,auto-0.8 (default: all)")
    what.add_argument("--ratios", metavar="R,...", help="in place of the methods' own, the ablation's too")
    what.add_argument("--ablation", action="store_true", help="also the best recipe with one thing switched off")
    what.add_argument(
        "--known",
        type=Path,
        metavar="FILE.json",
        help="an earlier quality.json, or docs/quality.json: its lines of the same recipe and evaluation are taken as "
        "they are, and the table says on which machine they were measured",
    )
    what.add_argument("--list", action="store_true", help="print the methods and their recipes, and stop")
    how = p.add_argument_group("compression")
    how.add_argument("--calibration-data", default="boolq", metavar="DATA", help="text (default: boolq)")
    how.add_argument("--calibration-samples", type=int, default=128, metavar="N", help="sequences (default: 128)")
    how.add_argument("--sequence-length", type=int, default=1024, metavar="T", help="tokens of each (default: 1024)")
    how.add_argument(
        "--compress-arg",
        action="append",
        default=[],
        metavar="ARG",
        help="for every compress.run, e.g. --compress-arg=--device=cuda; may be repeated; not what a recipe decides",
    )
    quality = p.add_argument_group("evaluation")
    quality.add_argument(
        "--data",
        default="wikitext2",
        metavar="NAME|FILE",
        help="boolq-heldout, lambada, wikitext2, wikitext:FILE, FILE.txt, FILE.jsonl (default: wikitext2)",
    )
    quality.add_argument("--window", type=int, default=2048, metavar="T", help="tokens (default: 2048)")
    quality.add_argument("--max-windows", type=int, metavar="N", help="the first N only (default: all)")
    quality.add_argument("--batch", type=int, default=1, metavar="B", help="windows at a time (default: 1)")
    quality.add_argument(
        "--eval-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the decoder; head and softmax are float32 (default: float32)",
    )
    quality.add_argument("--tasks", nargs="?", const="", metavar="NAME,...", help="zero-shot tasks, all when not named")
    quality.add_argument(
        "--task-limit", type=int, metavar="N", help="the first N questions of each task (default: all)"
    )
    quality.add_argument("--check", action="store_true", help="exit with 3 unless every bar is held")
    plot = p.add_argument_group("perplexity against calibration size")
    plot.add_argument(
        "--sensitivity-plot",
        nargs="?",
        const="",
        metavar="FILE.png",
        help="compress with more and less text of each source and plot it (default: OUT/quality-calibration.png)",
    )
    plot.add_argument("--sensitivity-method", default="auto", metavar="NAME", help="(default: auto)")
    plot.add_argument("--sensitivity-sizes", default=SIZES, metavar="N,...", help=f"sequences (default: {SIZES})")
    plot.add_argument("--sensitivity-sources", default=SOURCES, metavar="DATA,...", help=f"(default: {SOURCES})")
    p.add_argument(
        "--write-docs",
        type=Path,
        metavar="FILE.md",
        help="put the tables between the marks of FILE.md (docs/quality.md)",
    )
    add_common_arguments(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run what is not there yet, print the table; 0, 1 when a method failed, 3 when a bar did."""
    args = parser().parse_args(argv)
    args.out = args.out or Path("out/quality")
    lines = _lines(args)
    if args.list:
        return _print_list(args, lines)
    if args.model is None:
        raise UsageError("--model is missing: name what is to be compressed, for instance --model smollm2-135m")
    _check_now(args)
    bench = _bench(args)
    result = run(bench, lines, args)
    from validate.quality.table import document
    from validate.report.files import write_json
    from validate.report.markdown import with_table

    text = f"# Quality\n\n{document(result)}"
    write_json(args.out / "quality.json", result)
    (args.out / "quality.md").write_text(text, encoding="utf-8")
    if args.write_docs is not None:
        written = with_table(args.write_docs, MARK, "# Quality\n\n", document(result, 3))
        args.write_docs.write_text(written, encoding="utf-8")
        write_json(args.write_docs.with_suffix(".json"), result)
    tell(args, result, lambda: text.removesuffix("\n"))
    failed = [row for row in result["rows"] if row["error"] is not None]
    for row in failed:
        log(f"FAILED {row['key']}: {row['error']}")
    if failed:
        return 1
    missed = [bar for bar in result["bars"] if not bar["passed"]]
    if args.check and missed:
        for bar in missed:
            value = "not run" if bar["value"] is None else f"{bar['value']:.4g} > {bar['limit'] or 0:.4g}"
            log(f"FAILED {bar['name']}: {value}")
        return GateError.exit_code
    log(f"OK {args.out / 'quality.md'}")
    return 0


def run(bench: Bench, lines: Sequence[Line], args: argparse.Namespace) -> dict[str, Any]:
    """All lines, one after the other, and what is asked for beside them: OUT/quality.json's object."""
    from validate.quality.run import result_of
    from validate.quality.table import bars_json, gates
    from validate.report.machine import machine_facts

    rows, here = [], machine_facts()
    recipes = {line.key: _portable_recipe(line.recipe) for line in lines}
    known = {key: row for key, row in _known(args.known, bench).items() if row["recipe"] == recipes.get(key)}
    if len(known) < len(lines):
        known.pop("dense", None)  # the others are held against its checkpoint
    for number, line in enumerate(lines, start=1):
        log(f"--- {number}/{len(lines)} {line.key}: {line.title}")
        if line.key in known:
            log(f"{line.key}: known from {args.known}")
            rows.append(known[line.key] | {"title": line.title})
            continue
        rows.append(result_of(bench, line) | {"processor": here["processor"]})
        if line.key == "dense" and rows[-1]["error"] is not None:
            raise UsageError(f"the dense model itself cannot be evaluated: {rows[-1]['error']}")
    scored = {row["key"] for row in rows if row["error"] is None}
    tasks = {}
    if args.tasks is not None:
        from validate.tasks.data import tasks_named

        for line in lines:
            if line.key in scored & {"dense", BEST_KEY}:
                bench.compress(line)  # a line that was known has no checkpoint here
                tasks[line.key] = bench.tasks(line, tasks_named(args.tasks or None), args.task_limit)
    if args.sensitivity_plot is not None:
        _plot(rows, args)
    return {
        "model": bench.source.source_id,
        "protocol": bench.evaluation,
        "calibration": {**_calibration(args), "data": _portable(args.calibration_data)},
        "best": BEST_KEY,
        "rows": [row | {"recipe": _portable_recipe(row["recipe"])} if "recipe" in row else row for row in rows],
        "tasks": tasks,
        "bars": bars_json(gates(rows)),
        "machine": here,
        "command": _command(args),
    }


def _lines(args: argparse.Namespace) -> list[Line]:
    from validate.quality.methods import calibration_lines, lines

    calibration = _calibration(args)
    names = None if args.methods is None else args.methods.split(",")
    chosen = lines(calibration, names=names, ratios=_numbers(args.ratios, "--ratios"), ablation=args.ablation)
    if args.sensitivity_plot is not None:
        sizes = [int(n) for n in _numbers(args.sensitivity_sizes, "--sensitivity-sizes") or ()]
        chosen += calibration_lines(calibration, args.sensitivity_method, args.sensitivity_sources.split(","), sizes)
    return chosen


def _calibration(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "data": args.calibration_data,
        "samples": args.calibration_samples,
        "sequence_length": args.sequence_length,
    }


def _numbers(text: str | None, flag: str) -> list[float] | None:
    if text is None:
        return None
    try:
        numbers = [fraction(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise UsageError(f"{flag} {text!r} is not a list of numbers such as 0.75,0.85") from None
    if flag == "--ratios" and not all(0 < number <= 1 for number in numbers):
        raise UsageError(f"{flag} {text!r}: a ratio is above 0 and at most 1")
    return numbers


def _check_now(args: argparse.Namespace) -> None:
    """What would otherwise fail after hours of work. Raises UsageError and MissingDependencyError."""
    check_at_least(args, 1, "max_windows", "batch", "task_limit", "calibration_samples")
    check_at_least(args, 2, "window", "sequence_length")
    if not may_be_folder(args.out):
        raise UsageError(f"--out {args.out} is not, or is not in, a folder; choose another one")
    if args.write_docs is not None:
        from validate.report.markdown import surroundings

        surroundings(args.write_docs, MARK, "")
    if args.sensitivity_plot is not None:
        from validate.quality.plots import require_matplotlib

        require_matplotlib()
    if args.tasks is not None:
        from validate.tasks.data import tasks_named

        for task in tasks_named(args.tasks or None):
            task.load(1)
    from compress.calibration.text import look_for_text
    from compress.run import parser as compress_parser
    from compress.source.resolve import look_up

    look_up(args.model)
    sources = [] if args.sensitivity_plot is None else args.sensitivity_sources.split(",")
    for text in (args.data, args.calibration_data, *sources):
        look_for_text(text)
    compress_parser().parse_args(["--model", args.model, *args.compress_arg])


def _bench(args: argparse.Namespace) -> Bench:
    import torch

    from compress.calibration.text import load_text
    from compress.source.resolve import resolve
    from validate.perplexity.windows import make_windows
    from validate.quality.run import Bench

    source = resolve(args.model)
    arch = source.architecture()
    if args.window > arch.max_positions:
        raise UsageError(f"--window {args.window} is more than the model's {arch.max_positions} positions")
    text = load_text(args.data)
    windows = make_windows(
        text, source.tokenizer(), length=args.window, max_windows=args.max_windows, vocab_size=arch.vocab_size
    )
    args.out.mkdir(parents=True, exist_ok=True)
    return Bench(
        model=args.model,
        source=source,
        out=args.out,
        text={"name": _portable(text.name), "sha256": text.sha256},
        windows=windows,
        dtype=getattr(torch, args.eval_dtype),
        batch=args.batch,
        extra=tuple(args.compress_arg),
    )


def _known(file: Path | None, bench: Bench) -> dict[str, dict[str, Any]]:
    """The lines of a quality.json that did not fail, by key. UsageError for one of another model or evaluation."""
    if file is None:
        return {}
    try:
        result = read_json(file)
        before, rows = (result["model"], result["protocol"]), result["rows"]
    except RefusedError as error:
        raise UsageError(f"--known {file} {error}") from error
    except (OSError, KeyError, TypeError) as error:
        raise UsageError(f"--known {file} is no quality.json ({error!r})") from error
    if before != (bench.source.source_id, bench.evaluation):
        raise UsageError(f"--known {file} is of another model, text or evaluation: {shown(before[0])}, {before[1]}")
    try:
        return {row["key"]: row for row in rows if row["error"] is None}
    except (KeyError, TypeError) as error:
        raise UsageError(f"--known {file} is no quality.json ({error!r})") from error


def _plot(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    from validate.quality.plots import plot_calibration

    path = Path(args.sensitivity_plot) if args.sensitivity_plot else args.out / "quality-calibration.png"
    dense = next(row["perplexity"] for row in rows if row["key"] == "dense")
    title = f"{args.sensitivity_method}: perplexity against calibration size"
    plot_calibration(rows, dense, args.sequence_length, path, title)
    log(f"plot: {path}")


def _print_list(args: argparse.Namespace, lines: Sequence[Line]) -> int:
    """--list: every line with the recipe fields that are its own."""
    width = max(len(line.key) for line in lines) + 2

    def described(line: Line) -> str:
        own = {k: v for k, v in line.recipe.items() if k not in ("ratio", "calibration")}
        return f"{line.key:<{width}}{line.title}\n{'':<{width}}{json.dumps(own)}"

    tell(args, [vars(line) for line in lines], lambda: "\n".join(map(described, lines)))
    return 0


def _portable(text: str) -> str:
    """A text's name without its folder, which is one of this machine."""
    prefix, colon, rest = text.rpartition(":")
    return text if prefix.startswith("hf") else prefix + colon + Path(rest).name


def _portable_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    return recipe | {"calibration": recipe["calibration"] | {"data": _portable(recipe["calibration"]["data"])}}


def _command(args: argparse.Namespace) -> str:
    """The command that makes this table again; texts without their folders, absolute paths by their last part."""
    words = ["python", "-m", "validate.quality"]
    for action in parser()._actions:
        value = getattr(args, action.dest, None)
        if not action.option_strings or action.dest in NOT_TOLD or value in (None, action.default):
            continue
        flag = action.option_strings[-1]
        if isinstance(value, list):  # joined: a value may begin with a dash
            words += [f"{flag}={re.sub('=/.*/', '=', item)}" for item in value]
        elif value is True or value == "":
            words.append(flag)
        elif action.dest in ("data", "calibration_data"):
            words += [flag, _portable(value)]
        else:
            words += [flag, Path(str(value)).name if Path(str(value)).is_absolute() else str(value)]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(run_cli(main))
