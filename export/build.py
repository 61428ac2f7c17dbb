"""`python -m export.build`: from a model's name to a compressed model that runs. Compresses first where needed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.errors import ArtifactError, MissingDependencyError, UsageError, run_cli
from compress.options import add_compress_arguments, add_output_arguments, recipe_from
from compress.progress import log

if TYPE_CHECKING:
    from compress.artifact import Artifact
    from compress.models import ModelSource
    from compress.recipe import Recipe

EXAMPLES = """\
examples:
  python -m export.build --model smollm2-135m --structure kron --ratio 0.75 --engine ort --out out/demo
  python -m export.build --model ./my-llama --structure lowrank --dtype float16 --engine none --out out/half
  python -m export.build --model facebook/opt-1.3b --structure gs --dry-run --out out/opt

What OUT already holds is used again when model, recipe and options are the same, so an interrupted build is
continued by giving the same command again.
"""
ENGINES = ("ort", "trt", "trt-rtx", "none")
LATER = ("trt", "trt-rtx")
DTYPES = ("float32", "float16", "bfloat16")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m export.build",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_compress_arguments(p)
    add_output_arguments(p)
    what = p.add_argument_group("what to build")
    what.add_argument(
        "--engine",
        choices=ENGINES,
        default="ort",
        help="ONNX Runtime, TensorRT or TensorRT-RTX (both in a later release), or the ONNX file alone (default: ort)",
    )
    what.add_argument("--dtype", choices=DTYPES, default="float32", help="of the graph (default: float32)")
    what.add_argument(
        "--logits",
        choices=("all", "last"),
        default="all",
        help="of all positions, as validation needs them, or of the last one, for serving (default: all)",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, compress if need be, export, prepare the engine, print."""
    args = parser().parse_args(argv)
    if args.engine in LATER:
        raise MissingDependencyError(
            f"--engine {args.engine}: TensorRT engines come in a later release of procrustes-llm; "
            "use --engine ort to run the model now, or --engine none for its ONNX file"
        )
    if args.engine == "ort" and args.dtype == "bfloat16":
        raise UsageError(
            "ONNX Runtime has no bfloat16 matrix product on the CPU: use --dtype float32, or --engine none"
        )
    recipe = recipe_from(args)
    from compress.artifact import Artifact
    from compress.models import resolve

    source = resolve(args.model, revision=args.revision, trust_remote_code=args.trust_remote_code)
    artifact = Artifact(args.out)
    result = _dry_run(args, artifact, source, recipe) if args.dry_run else _build(args, artifact, source, recipe)
    if args.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name}: {value}" for name, value in result.items()))
        if not args.dry_run:
            print(f"OK {args.out}")
    return 0


def _build(args: argparse.Namespace, artifact: Artifact, source: ModelSource, recipe: Recipe) -> dict[str, Any]:
    from compress.pipeline import compress_model
    from export.stages import build_onnx, build_ort

    with artifact.lock():
        if _has_checkpoint(args, artifact, source, recipe):
            log(f"re-using {artifact.path('checkpoint')}: same model and recipe")
        else:
            compress_model(
                source,
                recipe,
                args.out,
                device=args.device,
                batch=args.batch,
                materialize_dense=args.materialize_dense,
                statistics=args.statistics,
            )
        graph = build_onnx(artifact, dtype=args.dtype, logits=args.logits)
        if args.engine == "ort":
            build_ort(artifact)
    facts = artifact.read_manifest()["stages"]["checkpoint"]
    return {
        "out": str(args.out),
        "structure": recipe.structure,
        "rotation": recipe.rotation,
        "ratio": facts["ratio"],
        "model_ratio": facts["model_ratio"],
        "engine": args.engine,
        "dtype": graph["dtype"],
        "nodes": sum(graph["nodes"].values()),
        "structured_nodes": graph["structured_nodes"],
        "weight_bytes": graph["initializer_bytes"],
        "export_peak_rss_bytes": graph["peak_rss_bytes"],
    }


def _has_checkpoint(args: argparse.Namespace, artifact: Artifact, source: ModelSource, recipe: Recipe) -> bool:
    """Whether OUT/checkpoint (and OUT/dense, where asked for) is what this command would make, and whole."""
    from compress.pipeline import has_checkpoint

    if not has_checkpoint(artifact, source, recipe):
        return False
    stages = ["checkpoint", "dense"] if args.materialize_dense else ["checkpoint"]
    try:
        for stage in stages:
            artifact.require_stage(stage)
            artifact.verify([stage])
    except ArtifactError as error:
        log(f"compressing again: {error}")
        return False
    return True


def _dry_run(args: argparse.Namespace, artifact: Artifact, source: ModelSource, recipe: Recipe) -> dict[str, Any]:
    from compress.forecast import forecast

    kept = _has_checkpoint(args, artifact, source, recipe)
    result = forecast(source.architecture(), recipe)
    item, stored = (4 if kind == "float32" else 2 for kind in (args.dtype, recipe.checkpoint_dtype))
    result["onnx_bytes_about"] = result["checkpoint_bytes_about"] * item // stored
    stages = ["reuse checkpoint" if kept else "compress", f"export onnx ({args.dtype}, {args.logits} logits)"]
    result["steps"] = stages if args.engine == "none" else [*stages, f"prepare {args.engine}"]
    return result


if __name__ == "__main__":
    sys.exit(run_cli(main))
