"""Speed of the compressed model over the dense one: measured in pairs, held against what its own size allows.

python -m validate.speed OUT        decode and prefill of OUT's model over the dense export of its source
python -m validate.speed --layers   single layers at the shapes of opt-13b and llama-2-7b
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.cli.commands import add_common_arguments, check_at_least, check_seconds, command_parser, tell
from compress.cli.entry import run_cli
from compress.errors import UsageError
from compress.lazy import require
from compress.options import given_flags

if TYPE_CHECKING:
    pass
from validate.speed.pairs import measure_model


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command_parser("validate.speed", __doc__)
    p.add_argument("out", nargs="?", type=Path, metavar="OUT", help="artefact folder")
    p.add_argument("--layers", action="store_true", help="the layer benchmark instead")
    p.add_argument("--batch-sizes", default="1,8", metavar="B,B", help="of decode (default: 1,8)")
    p.add_argument("--prefill", type=int, metavar="N", help="tokens (default: 512, or as the model allows)")
    p.add_argument(
        "--past", type=int, metavar="N", help="cached tokens at decode (default: 128, or as the model allows)"
    )
    p.add_argument("--threads", type=int, default=1, metavar="N", help="of ONNX Runtime (default: 1)")
    p.add_argument("--seconds", type=float, metavar="S", help="for each measurement (default: 15, layers: 2)")
    p.add_argument("--model", metavar="M", help="where the source model is (default: where OUT's manifest says it was)")
    p.add_argument("--trust-remote-code", action="store_true", help="let the source model run its own Python code")
    p.add_argument("--dense", type=Path, metavar="PATH", help="a dense export to use, instead of making one")
    p.add_argument(
        "--write-docs", type=Path, metavar="FILE", help="with --layers: put the table into FILE (docs/speed.md)"
    )
    add_common_arguments(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print."""
    p = parser()
    args = p.parse_args(argv)
    if args.layers == (args.out is not None):
        p.error("give either OUT or --layers")
    from validate.gates import parse_batch_sizes

    sizes = parse_batch_sizes(args.batch_sizes)
    check_at_least(args, 1, "threads", "prefill", "past")
    check_seconds(args)
    of_models = ("model", "trust_remote_code", "dense", "prefill", "past", "batch_sizes")
    if idle := given_flags(p, args, only=of_models if args.layers else ("write_docs",)):
        what = "the layer benchmark" if args.layers else f"the speed of {args.out}"
        raise UsageError(f"{' and '.join(idle)} would change nothing in {what}: leave it out")
    require("onnxruntime", pip="'onnxruntime>=1.23.2'", purpose="measure speed")
    if args.layers:
        return _layers(args)
    from validate.baseline import Baseline
    from validate.first import fit_positions

    with Baseline(args.out, model=args.model, dense=args.dense, trust_remote_code=args.trust_remote_code) as baseline:
        fit_positions(args, baseline.reader.architecture.max_positions, {"speed"})
        result = measure_model(
            baseline.dense_onnx(),
            baseline.onnx,
            baseline.costs(),
            batch_sizes=sizes,
            prefill=args.prefill,
            past=args.past,
            threads=args.threads,
            seconds=args.seconds or 15.0,
        )
    from validate.report.console import case_line

    lines = [f"{case['name']}: {case_line(case)}" for case in result["cases"]]
    tell(args, result, lambda: "\n".join(lines))
    return 0


def _layers(args: argparse.Namespace) -> int:
    from validate.report.markdown import surroundings
    from validate.speed.layers import MARK, beginning, benchmark, document, table

    if args.write_docs is not None:
        surroundings(
            args.write_docs, MARK, beginning(args.write_docs)
        )  # refuses a file without marks before minutes of work
    rows = list(benchmark(threads=args.threads, seconds=args.seconds or 2.0))
    if args.write_docs is not None:
        args.write_docs.write_text(document(rows, args.write_docs, args.threads), encoding="utf-8")
        (args.write_docs.with_suffix(".json")).write_text(
            json.dumps([row.to_dict() for row in rows], indent=1) + "\n", encoding="utf-8"
        )
    tell(args, [row.to_dict() for row in rows], lambda: table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
