"""`python -m compress.run`: compress a model into OUT/checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from compress.cli.commands import command_parser, listed, tell
from compress.cli.entry import run_cli
from compress.lazy import CORE, check_versions
from compress.options import add_compress_arguments, add_output_arguments

EXAMPLES = """\
examples:
  python -m compress.run --model smollm2-135m --structure auto --ratio 0.85
  python -m compress.run --model facebook/opt-1.3b --structure gs --ratio 0.8 --device cuda --out out/opt
  python -m compress.run --model ./my-llama --calibration-data corpus.jsonl --dry-run
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command_parser("compress.run", __doc__, EXAMPLES)
    add_compress_arguments(p)
    add_output_arguments(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, compress, print."""
    args = parser().parse_args(argv)
    check_versions(*CORE, purpose="compress a model")
    from compress.preflight import begin, rehearse

    begun = begin(args)
    source, recipe = begun.source, begun.recipe
    if args.dry_run:
        from compress.forecast import forecast, lines

        plan = forecast(source.architecture(), recipe, materialize_dense=args.materialize_dense)
        written = ["checkpoint", "recipe.yaml", *(["dense"] if args.materialize_dense else [])]
        result = {"out": str(args.out), "device": rehearse(begun, args, written), **plan}
        tell(args, result, lambda: "\n".join(lines(result)))
        return 0
    from compress.allocation.budget import shortfall
    from compress.pipeline import compress_model

    artifact = compress_model(
        source,
        recipe,
        args.out,
        device=args.device,
        batch=args.calibration_batch,
        materialize_dense=args.materialize_dense,
        statistics=args.statistics,
    )
    facts = artifact.read_manifest()["stages"]["checkpoint"]
    summary = {
        "out": str(args.out),
        "structure": recipe.structure,
        "rotation": recipe.rotation,
        "ratio": facts["ratio"],
        "model_ratio": facts["model_ratio"],
        "structured_linears": facts["structured_linears"],
        "dense_linears": facts["dense_linears"],
    }
    if (note := shortfall(source.architecture(), recipe, facts["ratio"])) is not None:
        summary["note"] = note
    tell(args, summary, lambda: f"{listed(summary)}\nOK {args.out / 'checkpoint'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
