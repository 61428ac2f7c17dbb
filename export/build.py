"""`python -m export.build`: from a model's name to a compressed model that runs. Compresses first where needed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cli.commands import check_at_least, command_parser, listed, tell
from compress.cli.entry import run_cli
from compress.errors import ArtifactError, MissingDependencyError, UsageError
from compress.lazy import CORE, check_versions, require
from compress.options import add_compress_arguments, add_output_arguments, given_flags
from compress.progress import Listener, log, progress_to

if TYPE_CHECKING:
    from compress.architecture import Architecture
    from compress.artifact.store import Artifact
    from compress.preflight import Begun
    from compress.recipe import Recipe
    from compress.source.model import ModelSource
    from export.tensorrt.options import Options

EXAMPLES = """\
examples:
  python -m export.build --model smollm2-135m --structure auto --ratio 0.75 --engine ort --out out/demo
  python -m export.build --model ./my-llama --structure lowrank --dtype float16 --engine none --out out/half
  python -m export.build --model opt-13b --structure kron --engine trt --batch 1,8,64 --cache 1,1024,2047 --out out/opt
  python -m export.build --model ./my-llama --engine trt-rtx --compute-capability 8.9,12.0 --out out/rtx
  python -m export.build --resume --engine trt --out out/opt
  python -m export.build --model facebook/opt-1.3b --structure gs --dry-run

--engine trt needs a GPU at its last step only: without one everything else is made, and OUT/build_engine.sh, which
builds the engine where there is a GPU. What OUT already holds is used again when model, recipe and options are the
same, so an interrupted build is continued by giving the same command again.
"""
ENGINES = ("ort", "trt", "trt-rtx", "none")
TENSORRT = ("trt", "trt-rtx")
DTYPES = ("float32", "float16", "bfloat16")
NOT_SERVED = "a model with a sliding window cannot be batched continuously"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command_parser("export.build", __doc__, EXAMPLES)
    add_compress_arguments(p, model_required=False)
    add_output_arguments(p)
    p.add_argument(
        "--resume", action="store_true", help="build the engine of OUT's graph as it is; needs no --model and no recipe"
    )
    what = p.add_argument_group("what to build")
    what.add_argument(
        "--engine",
        choices=ENGINES,
        default="ort",
        help="ONNX Runtime, TensorRT, TensorRT-RTX, or the ONNX file alone (default: ort)",
    )
    what.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the graph (default: float32; for TensorRT and TensorRT-RTX float16, or bfloat16 where activations of "
        "the calibration text come near the end of float16)",
    )
    what.add_argument(
        "--logits",
        choices=("all", "last"),
        default="all",
        help="of all positions, as validation needs them, or of the last one, for serving (default: all)",
    )
    serve = p.add_argument_group("Triton Inference Server (OUT/triton, for --engine ort and trt)")
    serve.add_argument("--serve-as", metavar="NAME", help="name of the model there (default: from the name of --model)")
    serve.add_argument(
        "--sequences", type=int, metavar="N", help="answered at a time (default: 16, or as many as --batch allows)"
    )
    serve.add_argument(
        "--serve-network",
        choices=("python", "onnxruntime", "tensorrt", "none"),
        help="which of Triton's backends runs NAME_lm, the network by itself, which launch.sh --network loads; all but "
        "python take a copy of the graph or the plan (default: tensorrt for --engine trt, else python)",
    )
    serve.add_argument("--threads", type=int, metavar="N", help="of ONNX Runtime in the server (default: 1)")
    trt = p.add_argument_group("TensorRT and TensorRT-RTX")
    sizes = "(default: %s, as far as the model's positions allow)"
    trt.add_argument("--batch", metavar="MIN,OPT,MAX", help=f"sequences at a time {sizes % '1,1,8'}")
    trt.add_argument("--prompt", metavar="MIN,OPT,MAX", help=f"new tokens of a prefill {sizes % '1,256,1024'}")
    trt.add_argument("--cache", metavar="MIN,OPT,MAX", help=f"tokens in the cache at decode {sizes % '1,512,2048'}")
    trt.add_argument(
        "--plugin",
        choices=("auto", "native", "cpp"),
        default="auto",
        help="run custom ops by their function bodies, by our plugins, or time both and keep the faster, which needs a "
        "GPU (default: auto; for trt-rtx that is native)",
    )
    trt.add_argument(
        "--plugin-libraries", type=Path, metavar="DIR", help="made by python -m trt_plugins.build, not compiled again"
    )
    trt.add_argument(
        "--compute-capability",
        metavar="A.B,C.D",
        help="GPUs to build a TensorRT-RTX engine for (default: 8.0,8.6,8.9,12.0)",
    )
    trt.add_argument("--opt-level", type=int, choices=range(6), metavar="0-5", help="of the builder (default: its own)")
    trt.add_argument("--workspace", type=int, metavar="MIB", help="memory that a layer may use (default: all)")
    trt.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="of TensorRT (default: one for all builds of this user)"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, compress if need be, export, prepare the engine, print."""
    args = parser().parse_args(argv)
    _check(args)
    _require(args)
    if args.resume:
        from compress.artifact.store import Artifact

        result = _resume(args, Artifact(args.out))
    else:
        from compress.preflight import begin

        begun = begin(args)
        _check_served(args, begun.source.architecture())
        result = _dry_run(args, begun) if args.dry_run else _build(args, begun)
    if args.dry_run:
        from compress.forecast import lines

        tell(args, result, lambda: "\n".join(lines(result)))
    else:
        tell(args, result, lambda: f"{listed(result)}\nOK {args.out}")
    return 0


_SERVING = ("serve_as", "sequences", "serve_network", "threads")
_BUILDING = ("batch", "prompt", "cache", "plugin", "plugin_libraries", "opt_level", "workspace", "timing_cache")
_TAKEN_AS_IT_IS = ("json", "debug", "out", "resume", "engine", "compute_capability", *_SERVING, *_BUILDING)
"""Flags that --resume takes: those of the engine."""


def export_model(
    out: str | PathLike[str],
    *,
    engine: str = "ort",
    dtype: str | None = None,
    logits: str = "all",
    serve_as: str | None = None,
    sequences: int | None = None,
    serve_network: str | None = None,
    threads: int | None = None,
    batch: str | None = None,
    prompt: str | None = None,
    cache: str | None = None,
    plugin: str = "auto",
    plugin_libraries: str | PathLike[str] | None = None,
    compute_capability: str | None = None,
    opt_level: int | None = None,
    workspace: int | None = None,
    timing_cache: str | PathLike[str] | None = None,
    progress: Listener | None = None,
) -> dict[str, Any]:
    """Export OUT/checkpoint, as `python -m export.build` does after it has compressed, and return what was made.

    The options are the command's, with its defaults; batch, prompt and cache are "MIN,OPT,MAX". What OUT already holds
    is used again where checkpoint and options are the same. `progress` is called with a `compress.Progress` in place
    of lines on stderr. Raises UsageError for options that do not go together, MissingDependencyError for what is not
    installed, ArtifactError for an OUT without a sound checkpoint.
    """
    given = {name: value for name, value in locals().items() if name not in ("out", "progress")}
    args = parser().parse_args(["--out", fspath(out)])
    for action in parser()._actions:
        if action.dest in given and action.choices is not None and given[action.dest] not in (*action.choices, None):
            choices = ", ".join(map(str, action.choices))
            raise UsageError(f"{action.dest} must be one of {choices}, not {given[action.dest]!r}")
    for name, value in given.items():
        setattr(args, name, Path(value) if isinstance(value, PathLike) else value)
    for name in ("plugin_libraries", "timing_cache"):
        setattr(args, name, None if given[name] is None else Path(given[name]))
    with progress_to(progress):
        _check_engine(args)
        _require(args)
        from compress.artifact.store import Artifact
        from compress.checkpoint.reader import CheckpointReader

        artifact = Artifact(args.out)
        with artifact.lock():
            artifact.claim(*(name for name in _written(args) if name not in ("checkpoint", "recipe.yaml")))
            checkpoint = artifact.require_stage("checkpoint")
            artifact.verify(["checkpoint"])
            positions = CheckpointReader(checkpoint).architecture.max_positions
            options = _tensorrt(args, positions) if args.engine in TENSORRT else None
            made = _export(args, artifact, options)
    return {"out": str(args.out), **made}


def _require(args: argparse.Namespace) -> None:
    """Look for the packages now, and not after hours of work."""
    check_versions(*CORE, "onnx", purpose="compress and export a model")
    if args.engine == "ort":
        require("onnxruntime", pip="'onnxruntime>=1.23.2'", purpose="prepare --engine ort")


def _check(args: argparse.Namespace) -> None:
    """Refuse values that are none, flags that contradict each other and flags without effect, before any work."""
    _check_engine(args)
    if args.resume and args.out is None:
        raise UsageError("say with --out which folder to go on with: --resume takes it as it is")
    if args.resume and (idle := given_flags(parser(), args, without=_TAKEN_AS_IT_IS)):
        raise UsageError(f"--resume takes OUT as it is: leave out {' and '.join(idle)}")
    if not args.resume and args.model is None:
        raise UsageError("say which model with --model, or go on with OUT's graph with --resume")


def _check_engine(args: argparse.Namespace) -> None:
    """The part of `_check` that is about the engine alone."""
    _check_values(args)
    if args.engine == "ort" and args.dtype == "bfloat16":
        raise UsageError(
            "ONNX Runtime has no bfloat16 matrix product on the CPU: use --dtype float32, or --engine none"
        )
    if args.compute_capability is not None and args.engine != "trt-rtx":
        raise UsageError("--compute-capability is for --engine trt-rtx; TensorRT builds for the GPU that is there")
    for flags, engines in ((_SERVING, ("ort", "trt")), (_BUILDING, TENSORRT), (("threads",), ("ort",))):
        if args.engine not in engines and (idle := given_flags(parser(), args, only=flags)):
            raise UsageError(
                f"{' and '.join(idle)} would change nothing with --engine {args.engine}: for --engine "
                f"{' and '.join(engines)} only; leave it out"
            )
    able = ("tensorrt",) if args.engine == "trt" else ("python", "onnxruntime")
    if args.serve_network not in (None, "none", *able):
        raise UsageError(f"--serve-network {args.serve_network} does not run what --engine {args.engine} makes")


def _check_values(args: argparse.Namespace) -> None:
    """Each value by itself, whatever it is for."""
    from export.runtime.profiles import Spans
    from export.triton.names import check_name

    if args.serve_as is not None:
        check_name(args.serve_as)
    check_at_least(args, 1, "sequences", "threads")
    spans = Spans.parse(args.batch, args.prompt, args.cache, sys.maxsize)
    if args.engine == "trt" and args.sequences is not None and args.sequences > spans.batch.most:
        raise UsageError(
            f"--sequences {args.sequences} is more than the {spans.batch.most} that the engine takes at a time: lower "
            f"it, or raise the largest --batch"
        )
    if args.workspace is not None and args.workspace < 1:
        raise UsageError(f"--workspace must be at least 1 MiB, not {args.workspace}")
    if args.plugin == "native" and args.plugin_libraries is not None:
        raise UsageError("--plugin native uses no --plugin-libraries")
    if args.plugin_libraries is not None:
        from trt_plugins.build import AUTOLOAD, PLUGINS

        absent = [name for name in (PLUGINS, AUTOLOAD) if not (args.plugin_libraries / name).is_file()]
        if absent:
            raise UsageError(
                f"--plugin-libraries {args.plugin_libraries} has no {absent[0]}: make it with "
                f"python -m trt_plugins.build"
            )
    if args.timing_cache is not None and (
        args.timing_cache.is_dir() or not args.timing_cache.absolute().parent.is_dir()
    ):
        raise UsageError(f"--timing-cache {args.timing_cache} must be a file in a folder that exists")
    if args.compute_capability is not None and args.engine == "trt-rtx":
        from export.tensorrt.rtx import parse_capabilities

        parse_capabilities(args.compute_capability)


def _check_served(args: argparse.Namespace, architecture: Architecture) -> None:
    """Refuse flags of the server for a model that is not served, and profiles that its positions do not allow."""
    if args.engine in TENSORRT:
        from export.runtime.profiles import Spans

        Spans.parse(args.batch, args.prompt, args.cache, architecture.max_positions)
    if architecture.sliding_window is not None and (idle := given_flags(parser(), args, only=_SERVING)):
        raise UsageError(f"{' and '.join(idle)} would change nothing: {NOT_SERVED}; leave it out")


def _build(args: argparse.Namespace, begun: Begun) -> dict[str, Any]:
    from compress.allocation.budget import shortfall
    from compress.pipeline import compress_model

    artifact, source, recipe = begun.artifact, begun.source, begun.recipe
    engine = _tensorrt(args, source.architecture().max_positions) if args.engine in TENSORRT else None
    with artifact.lock():
        artifact.claim(*_written(args))
        if _has_checkpoint(args, artifact, source, recipe):
            log(f"re-using {artifact.path('checkpoint')}: same model and recipe")
            artifact.clear_finished_state()
        else:
            compress_model(
                source,
                recipe,
                args.out,
                device=args.device,
                batch=args.calibration_batch,
                materialize_dense=args.materialize_dense,
                statistics=args.statistics,
            )
        made = _export(args, artifact, engine)
    facts = artifact.read_manifest()["stages"]["checkpoint"]
    note = shortfall(source.architecture(), recipe, facts["ratio"])
    return {
        "out": str(args.out),
        "structure": recipe.structure,
        "rotation": recipe.rotation,
        "ratio": facts["ratio"],
        "model_ratio": facts["model_ratio"],
        "structured_linears": facts["structured_linears"],
        "dense_linears": facts["dense_linears"],
        **({} if note is None else {"note": note}),
        **made,
    }


def _export(
    args: argparse.Namespace, artifact: Artifact, engine: tuple[Options, tuple[int, ...]] | None
) -> dict[str, Any]:
    """OUT/onnx and what runs it, from OUT/checkpoint."""
    from export.halves import graph_dtype
    from export.stages import build_onnx

    watched = artifact.read_manifest()["stages"]["checkpoint"].get("activations")
    dtype = graph_dtype(args.dtype, args.engine in TENSORRT, watched)
    graph = build_onnx(artifact, dtype=dtype, logits=args.logits)
    return {
        **_build_engine(args, artifact, engine),
        "dtype": graph["dtype"],
        "nodes": sum(graph["nodes"].values()),
        "custom_operator_nodes": graph["structured_nodes"],
        "weight_bytes": graph["initializer_bytes"],
        "export_peak_rss_bytes": graph["peak_rss_bytes"],
    }


def _written(args: argparse.Namespace) -> list[str]:
    """What this command may write into OUT."""
    names = [] if args.resume else ["checkpoint", "recipe.yaml", "onnx"]
    names += ["dense"] if args.materialize_dense else []
    if args.engine != "none":
        names += ["engine"]
    if args.engine in ("ort", "trt"):
        names += ["triton"]
    if args.engine in TENSORRT and args.plugin != "native":
        names += ["plugins"]
    return [*names, *(["build_engine.sh"] if args.engine == "trt" else [])]


def _resume(args: argparse.Namespace, artifact: Artifact) -> dict[str, Any]:
    from compress.checkpoint.reader import CheckpointReader
    from export.stages import build_info

    with artifact.lock():
        artifact.claim(*_written(args))
        checkpoint = artifact.require_stage("checkpoint")
        artifact.require_stage("onnx")
        artifact.verify(["checkpoint/config.json", "onnx"])
        positions = CheckpointReader(checkpoint).architecture.max_positions
        engine = _tensorrt(args, positions) if args.engine in TENSORRT else None
        built = _build_engine(args, artifact, engine)
    return {"out": str(args.out), **built, "dtype": build_info(artifact, "onnx")["dtype"]}


def _tensorrt(args: argparse.Namespace, positions: int) -> tuple[Options, tuple[int, ...]]:
    """The options of a TensorRT build, and the compute capabilities of one by TensorRT-RTX; says what is missing."""
    from export.runtime.profiles import Spans
    from export.tensorrt import build as trt
    from export.tensorrt import rtx as trt_rtx
    from export.tensorrt.options import Options

    capabilities = trt_rtx.parse_capabilities(args.compute_capability)
    options = Options(
        Spans.parse(args.batch, args.prompt, args.cache, positions),
        args.plugin,
        args.opt_level,
        None if args.workspace is None else args.workspace << 20,
        args.timing_cache,
    )
    try:
        trt.require() if args.engine == "trt" else trt_rtx.require()
    except MissingDependencyError as error:
        log(f"{error}; going on with everything before the engine")
    return options, capabilities


def _build_engine(
    args: argparse.Namespace, artifact: Artifact, engine: tuple[Options, tuple[int, ...]] | None
) -> dict[str, Any]:
    """What OUT/onnx runs on. Raises MissingDependencyError for what is not here, after all that goes before it."""
    if engine is None:
        if args.engine == "ort":
            from export.stages import build_ort

            build_ort(artifact)
            return {"engine": args.engine, **_serve(args, artifact, None)}
        return {"engine": args.engine}
    from export.tensorrt import build as trt
    from export.tensorrt import plugins
    from export.tensorrt import rtx as trt_rtx

    options, capabilities = engine
    ahead = args.engine == "trt-rtx"
    without, served = None, dict[str, Any]()
    if plugins.wants_plugins(artifact) and options.plugin != "native" and (options.plugin == "cpp" or not ahead):
        try:
            plugins.build_plugins(artifact, libraries=args.plugin_libraries, keep=args.resume)
        except MissingDependencyError as error:
            if options.plugin == "cpp":
                raise
            without = error
            log(f"without plugins: {error}")
    if ahead:
        info = trt_rtx.build_rtx(artifact, options, capabilities)
    else:
        script = trt.write_script(artifact, options)
        try:
            info = trt.build_trt(artifact, options)
        except MissingDependencyError as error:
            _serve(args, artifact, options.spans.batch.most)
            rest = "" if without is None else f" (and the plugins were not compiled: {without})"
            raise MissingDependencyError(
                f"{error}{rest}. All that goes before is complete in {artifact.out}: run {script} where that is there"
            ) from error
        served = _serve(args, artifact, options.spans.batch.most)
    return {
        "engine": args.engine,
        "plugin": info["plugin"],
        "plan_bytes": info["plan_bytes"],
        "plugin_layers": info["plugin_layers"],
        "engine_seconds": info["seconds"],
        **served,
    }


def _serve(args: argparse.Namespace, artifact: Artifact, most: int | None) -> dict[str, Any]:
    """OUT/triton, and what the result says of it. `most`: sequences that the engine takes, None for any number."""
    from compress.checkpoint.reader import CheckpointReader
    from export.stages import build_info
    from export.triton.names import name_of
    from export.triton.repository import SEQUENCES, write_repository

    if CheckpointReader(artifact.require_stage("checkpoint")).architecture.sliding_window is not None:
        note = f"no Triton repository was written, because {NOT_SERVED}"
        log(note)
        return {"triton": None, "triton_note": note}
    source = str(artifact.read_manifest()["source"].get("id") or "model")
    # --resume, as in build_engine.sh, says nothing of serving: what was asked for before stays.
    before = build_info(artifact, "triton") if args.resume and artifact.has_stage("triton") else {}
    before = before if before.get("engine") == args.engine else {}
    write_repository(
        artifact,
        engine=args.engine,
        name=args.serve_as or before.get("name") or name_of(source),
        sequences=args.sequences or min(before.get("sequences", SEQUENCES), most or SEQUENCES),
        threads=args.threads or before.get("threads", 1),
        network=args.serve_network or before.get("network"),
    )
    return {"triton": str(artifact.path("triton"))}


def _has_checkpoint(args: argparse.Namespace, artifact: Artifact, source: ModelSource, recipe: Recipe) -> bool:
    """Whether OUT/checkpoint (and OUT/dense, where asked for) is what this command would make, and whole."""
    from compress.requests import has_checkpoint

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


def _dry_run(args: argparse.Namespace, begun: Begun) -> dict[str, Any]:
    from compress.forecast import forecast
    from compress.methods.space import rotation_bytes
    from compress.preflight import device_of_plan, rehearse

    artifact, source, recipe = begun.artifact, begun.source, begun.recipe
    artifact.rehearse(*_written(args))
    kept = _has_checkpoint(args, artifact, source, recipe)
    plan = forecast(source.architecture(), recipe, materialize_dense=args.materialize_dense)
    device = device_of_plan(args.device) if kept else rehearse(begun, args, _written(args))
    result = {"out": str(args.out), "device": device, **plan}
    dtype = args.dtype or ("float16" if args.engine in TENSORRT else "float32")
    item, stored = (4 if kind == "float32" else 2 for kind in (dtype, recipe.checkpoint_dtype))
    if args.dtype is None and dtype == "float16":
        dtype = "float16, or bfloat16 where calibration finds activations that need it"
    weights = plan["checkpoint_bytes_about"] - rotation_bytes(source.architecture(), recipe)
    result["onnx_bytes_about"] = plan["disk"]["onnx"] = weights * item // stored
    steps = ["reuse checkpoint" if kept else "compress", f"export onnx ({dtype}, {args.logits} logits)"]
    if args.engine in TENSORRT:
        options, _ = _tensorrt(args, source.architecture().max_positions)
        steps += [] if options.plugin == "native" else ["compile the plugins, where the graph has ops for them"]
        steps.append(f"build {args.engine} engine ({' '.join(options.flags())})")
    elif args.engine != "none":
        steps.append(f"prepare {args.engine}")
    result["steps"] = steps
    return result


if __name__ == "__main__":
    sys.exit(run_cli(main))
