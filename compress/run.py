"""`python -m compress.run`: compress a model into OUT/checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from compress.cli.commands import command_parser, listed, tell
from compress.cli.entry import run_cli
from compress.lazy import CORE, check_versions
from compress.options import add_compress_arguments, add_output_arguments, recipe_from
from compress.progress import log

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
    recipe = recipe_from(args)
    from compress.artifact.store import Artifact
    from compress.default_out import default_out, refuse_anothers
    from compress.requests import within_positions
    from compress.source.resolve import look_up, resolve

    look_up(args.model)
    unnamed = args.out is None
    if unnamed:
        args.out = default_out(args.model, recipe)
        log(f"OUT is {args.out}")
    source = resolve(args.model, revision=args.revision, trust_remote_code=args.trust_remote_code)
    recipe = within_positions(source.architecture(), recipe)
    if unnamed and not args.dry_run:
        refuse_anothers(Artifact(args.out), source, recipe)
    if args.dry_run:
        from compress.forecast import forecast, lines

        if args.materialize_dense:
            from compress.checkpoint.plain import check_plain

            check_plain(source.name, source.architecture(), recipe)
        plan = forecast(source.architecture(), recipe, materialize_dense=args.materialize_dense)
        result = {"out": str(args.out), **plan}
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
