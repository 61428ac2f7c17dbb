"""Validate OUT: parity ladder, perplexity, speed; write OUT/reports and hold the gates.

The manifest is verified first (exit 5). The last line on stdout is `OK <reports>` or, for each gate that failed,
`FAILED <gate>: <value> > <limit>` with exit 3. With --json stdout is one object, which has the gates in it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cli.commands import add_common_arguments, check_at_least, check_seconds, command_parser, tell
from compress.cli.entry import run_cli
from compress.errors import GateError, UsageError
from compress.lazy import CORE, check_versions, require
from compress.options import given_flags
from compress.progress import Listener, log, progress_to

if TYPE_CHECKING:
    from compress.calibration.text import TextData
    from validate.baseline import Baseline
    from validate.gates import Gate
    from validate.parity.ladder import Rung
    from validate.perplexity.windows import Windows
    from validate.report.summary import Report

PARTS = ("parity", "perplexity", "speed")
_FLAGS_OF = {
    ("perplexity",): ("data", "sequence_length", "stride", "max_windows", "batch", "perplexity_runtime"),
    ("speed",): ("batch_sizes", "prefill", "past", "seconds", "dense"),
    ("perplexity", "speed"): ("threads",),
}
"""Parts -> the flags that do nothing where all of them are skipped."""
RUNTIMES = ("pytorch", "onnxruntime")
EXAMPLES = """examples:
  python -m validate.run out/demo
  python -m validate.run out/demo --max-ppl-increase 10% --min-speedup 1.0
  python -m validate.run out/demo --data wikitext:wiki.test.raw --sequence-length 2048 --skip speed
  python -m validate.run out/opt --gpu --skip perplexity
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command_parser("validate.run", __doc__, EXAMPLES)
    p.add_argument("out", type=Path, metavar="OUT", help="artefact folder")
    p.add_argument("--model", metavar="M", help="where the source model is (default: where OUT's manifest says it was)")
    p.add_argument("--trust-remote-code", action="store_true", help="let the source model run its own Python code")
    p.add_argument("--skip", action="append", choices=PARTS, default=[], help="leave a part out; may be repeated")
    gates = p.add_argument_group("gates (the parity ladder always is one)")
    gates.add_argument("--max-ppl-increase", metavar="L", help="5%%, 0.05 or 1.05x: of the dense model's perplexity")
    gates.add_argument("--min-speedup", metavar="X", help="1.0: that every measured case must reach")
    quality = p.add_argument_group("perplexity")
    quality.add_argument(
        "--data",
        default="boolq-heldout",
        metavar="NAME|FILE",
        help="boolq-heldout, lambada, wikitext2, wikitext:FILE, FILE.txt, FILE.jsonl, hf:NAME[:CONFIG[:SPLIT]] "
        "(default: boolq-heldout)",
    )
    quality.add_argument(
        "--sequence-length", type=int, metavar="T", help="window (default: 1024, or as the model allows)"
    )
    quality.add_argument("--stride", type=int, metavar="S", help="between windows (default: the window)")
    quality.add_argument("--max-windows", type=int, metavar="N", help="the first N only (default: all)")
    quality.add_argument("--batch", type=int, default=1, metavar="B", help="windows at a time (default: 1)")
    quality.add_argument(
        "--perplexity-runtime",
        choices=RUNTIMES,
        default="pytorch",
        help="what runs the compressed model (default: pytorch)",
    )
    speed = p.add_argument_group("speed")
    speed.add_argument("--batch-sizes", default="1,8", metavar="B,B", help="of decode (default: 1,8)")
    speed.add_argument("--prefill", type=int, metavar="N", help="tokens (default: 512, or as the model allows)")
    speed.add_argument(
        "--past", type=int, metavar="N", help="cached tokens at decode (default: 128, or as the model allows)"
    )
    speed.add_argument("--threads", type=int, default=1, metavar="N", help="of ONNX Runtime (default: 1)")
    speed.add_argument("--seconds", type=float, default=15.0, metavar="S", help="for each measurement (default: 15)")
    speed.add_argument("--dense", type=Path, metavar="PATH", help="a dense export to use, not making one")
    gpu = p.add_argument_group("TensorRT (needs the GPU that OUT/engine was built for)")
    gpu.add_argument(
        "--gpu",
        action="store_true",
        help="also hold OUT's engine against PyTorch (rung 4), and time it, native and with plugins, against the dense "
        "model's engine; --skip parity or speed leave their part of it out too",
    )
    gpu.add_argument(
        "--trust-engine", action="store_true", help="load a plan that is not what manifest.json vouches for"
    )
    p.add_argument("--no-plot", action="store_true", help="do without the plots of reports/, and matplotlib")
    add_common_arguments(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, validate, report; 0, or 3 when a gate failed."""
    args = parser().parse_args(argv)
    report, failed = _run(args)
    from validate.report.console import console

    end = "\n".join(f"FAILED {sentence}" for sentence in failed) or f"OK {args.out / 'reports'}"
    result = {"out": str(args.out), "passed": not failed, **report.to_dict()}
    tell(args, result, lambda: f"{console(report)}\n{end}")
    return GateError.exit_code if failed else 0


def validate_artifact(
    out: str | PathLike[str],
    *,
    model: str | None = None,
    trust_remote_code: bool = False,
    skip: Sequence[str] = (),
    max_ppl_increase: str | float | None = None,
    min_speedup: str | float | None = None,
    data: str | PathLike[str] = "boolq-heldout",
    sequence_length: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    batch: int = 1,
    perplexity_runtime: str = "pytorch",
    batch_sizes: Sequence[int] = (1, 8),
    prefill: int | None = None,
    past: int | None = None,
    threads: int = 1,
    seconds: float = 15.0,
    dense: str | PathLike[str] | None = None,
    gpu: bool = False,
    trust_engine: bool = False,
    plot: bool = True,
    progress: Listener | None = None,
) -> dict[str, Any]:
    """Validate OUT, as `python -m validate.run` does: write OUT/reports and return the object of `--json`.

    The options are the command's, with its defaults. "passed" says whether every gate held, and "failed" has a
    sentence for each that did not; a gate raises nothing. `progress` is called with a `compress.Progress` in place of
    lines on stderr. Raises UsageError for options that do not go together, MissingDependencyError for what is not
    installed, ArtifactError when OUT is not what its manifest says.
    """
    given = {name: value for name, value in locals().items() if name not in ("out", "progress", "plot")}
    args = parser().parse_args([fspath(out)])
    for name, allowed in (("skip", PARTS), ("perplexity_runtime", RUNTIMES)):
        for value in [given[name]] if isinstance(given[name], str) else given[name]:
            if value not in allowed:
                raise UsageError(f"{name} must be of {', '.join(allowed)}, not {value!r}")
    for name, value in given.items():
        setattr(args, name, value)
    args.skip = [skip] if isinstance(skip, str) else list(skip)
    args.max_ppl_increase = None if max_ppl_increase is None else str(max_ppl_increase)
    args.min_speedup = None if min_speedup is None else str(min_speedup)
    args.batch_sizes = ",".join(map(str, batch_sizes))
    args.data = fspath(data)
    args.dense = None if dense is None else Path(fspath(dense))
    args.no_plot = not plot
    with progress_to(progress):
        report, failed = _run(args)
    return {"out": str(args.out), "passed": not failed, "failed": failed, **report.to_dict()}


def _run(args: argparse.Namespace) -> tuple[Report, list[str]]:
    """Validate and write OUT/reports: the report, and a sentence for each gate that failed."""
    limits = _check(args)
    check_versions(*CORE, "onnx", purpose="validate a model")
    if args.perplexity_runtime == "onnxruntime" or not {"parity", "speed"} <= set(args.skip):
        require("onnxruntime", pip="'onnxruntime>=1.23.2'", purpose="validate the exported model")
    if not args.no_plot:
        require(  # now, and not after minutes of work
            "matplotlib", pip="'procrustes-llm[eval]'", purpose="draw the plots of reports/ (or give --no-plot)"
        )
    from compress.artifact.store import Artifact
    from validate.baseline import Baseline

    Artifact(args.out).read_manifest()
    if "perplexity" not in args.skip:
        from compress.calibration.text import look_for_text

        look_for_text(args.data)
    if args.gpu:
        from export.tensorrt.build import require as require_tensorrt
        from export.tensorrt.engine import check_engine

        require_tensorrt()
        check_engine(Artifact(args.out), trust=args.trust_engine)
    with Baseline(args.out, model=args.model, dense=args.dense, trust_remote_code=args.trust_remote_code) as baseline:
        report, gates = validate(baseline, args, limits)
        _publish(baseline, report, plot=not args.no_plot)
    from validate.gates import failures

    return report, failures(gates)


def _check(args: argparse.Namespace) -> dict[str, Any]:
    """Parse what argparse does not; raises UsageError."""
    from validate.gates import parse_batch_sizes, parse_ppl_increase, parse_speedup

    limits: dict[str, Any] = {"batch_sizes": parse_batch_sizes(args.batch_sizes)}
    for flag, parse, part in (
        ("max_ppl_increase", parse_ppl_increase, "perplexity"),
        ("min_speedup", parse_speedup, "speed"),
    ):
        text = getattr(args, flag)
        limits[flag] = None if text is None else parse(text)
        if text is not None and part in args.skip:
            raise UsageError(f"--{flag.replace('_', '-')} needs the {part} part, which --skip {part} leaves out")
    check_at_least(args, 1, "prefill", "past", "threads", "batch", "max_windows", "stride")
    check_seconds(args)
    check_at_least(args, 2, "sequence_length")
    for parts, flags in _FLAGS_OF.items():
        if set(parts) <= set(args.skip) and (idle := given_flags(parser(), args, only=flags)):
            raise UsageError(
                f"{' and '.join(idle)} would change nothing: --skip {' and '.join(parts)} leaves out what it is for"
            )
    if args.trust_engine and not args.gpu:
        raise UsageError("--trust-engine is for --gpu, which alone loads an engine")
    if set(args.skip) == set(PARTS):
        raise UsageError("--skip leaves nothing to validate; skip at most two parts")
    return limits


def validate(baseline: Baseline, args: argparse.Namespace, limits: dict[str, Any]) -> tuple[Report, list[Gate]]:
    """Run the parts that are not skipped."""
    from validate.first import look_first
    from validate.gates import Gate
    from validate.graphfacts import graph_dtype
    from validate.report.summary import read_fit

    recipe, fit = _recipe(baseline), read_fit(baseline.checkpoint)
    text = look_first(baseline, args)
    parity = quality = speed = engine = None
    gates: list[Gate] = []
    if "parity" not in args.skip:
        rungs = _parity(baseline, args)
        parity = [rung.to_dict() for rung in rungs]
        for rung in rungs:
            name = f"parity-rung-{rung.number}"
            gates.append(Gate(name, rung.value, rung.tolerance))
            if rung.number >= 3:
                gates.append(Gate(f"{name}-choices", float(len(rung.failures)), 0.0))
    if text is not None:
        quality = _quality(baseline, args, *text)
        if limits["max_ppl_increase"] is not None:
            gate = Gate("max-ppl-increase", quality["relative_increase"], limits["max_ppl_increase"], percent=True)
            gates.append(gate)
    if "speed" not in args.skip:
        if graph_dtype(baseline.onnx) == "bfloat16":  # with --gpu, see validate/first.py
            log("speed: left out on the CPU, ONNX Runtime has no bfloat16 products there")
        else:
            speed = _speed(baseline, args, limits["batch_sizes"])
        if limits["min_speedup"] is not None and speed is not None:
            least = min(case["speedup"] for case in speed["cases"])
            gates.append(Gate("min-speedup", least, limits["min_speedup"], at_least=True))
        if args.gpu:
            from export.stages import build_info
            from validate.parity.engine import engine_speed

            info = build_info(baseline.artifact, "engine")
            engine = engine_speed(baseline, info, batch_sizes=limits["batch_sizes"], seconds=args.seconds)
            if limits["min_speedup"] is not None:
                least = min(case[engine["kept"]]["speedup"] for case in engine["cases"])
                gates.append(Gate("min-speedup-gpu", least, limits["min_speedup"], at_least=True))
    return _report(baseline, args, recipe, fit, parity, quality, speed, engine, gates), gates


def _parity(baseline: Baseline, args: argparse.Namespace) -> list[Rung]:
    import torch

    from export.runtime.ort import OrtRunner
    from validate.graphfacts import graph_dtype
    from validate.parity.ladder import GREEDY_TOKENS, make_prompts, rung_1, rung_2, rung_3

    arch = baseline.reader.architecture
    prompts = make_prompts(arch.vocab_size, max(2, min(48, arch.max_positions - 2 * GREEDY_TOKENS)))
    rungs: list[Rung] = []

    def done(rung: Rung) -> None:
        log(f"parity rung {rung.number}: {rung.value:.2e} (tolerance {rung.tolerance:g}), {rung.title}")
        rungs.append(rung)

    done(rung_1(baseline.source.reference_model(torch.float32), baseline.dense, prompts))
    done(rung_2(baseline.reader))
    dtype = graph_dtype(baseline.onnx)
    if dtype == "bfloat16" and args.gpu:
        log("parity rung 3: left out, ONNX Runtime has no bfloat16 products on the CPU")
    else:
        done(rung_3(baseline.compressed, OrtRunner(baseline.onnx), prompts, dtype))
    if args.gpu:
        from export.tensorrt.engine import load_engine
        from validate.parity.engine import engine_prompts, rung_4

        runner = load_engine(baseline.artifact, trust=args.trust_engine)
        fitting = engine_prompts(prompts, runner.executor.spans, arch.vocab_size, arch.max_positions)
        done(rung_4(baseline.compressed, runner, fitting, dtype))
    return rungs


def _quality(baseline: Baseline, args: argparse.Namespace, text: TextData, windows: Windows) -> dict[str, Any]:
    from validate.perplexity.scores import LogitsSource, OrtLogits, TorchLogits, compare, worse_than_guessing

    second: LogitsSource = TorchLogits(baseline.compressed)
    if args.perplexity_runtime == "onnxruntime":
        from export.runtime.ort import OrtRunner

        second = OrtLogits(OrtRunner(baseline.onnx, threads=args.threads))
    first = TorchLogits(baseline.dense)
    result = compare(first, second, windows, args.batch)
    warnings = worse_than_guessing(result, baseline.reader.architecture.vocab_size)
    for warning in warnings:
        log(f"warning: {warning}")
    return {
        "data": {
            "name": _portable(text.name),
            "description": text.description,
            "sha256": text.sha256,
            "tokens": len(windows.ids),
        },
        "protocol": {
            "rows_joined_by": "\n\n",
            "tokenised": "once, as a whole" if windows.whole else "once, a beginning",
            "window": windows.length,
            "stride": windows.stride,
            "windows": windows.count,
            "predicted_tokens": windows.predicted(),
            "begins_with_bos": windows.begins_with_bos,
            "mean": "over all predicted tokens",
            "dense_runtime": first.runtime,
            "compressed_runtime": second.runtime,
        },
        "calibrated_on_this_text": _recipe(baseline)["calibration"]["data"] == _portable(args.data),
        "warnings": warnings,
        **result.to_dict(),
    }


def _speed(
    baseline: Baseline,
    args: argparse.Namespace,
    batch_sizes: Sequence[int],
) -> dict[str, Any]:
    from validate.parity.ladder import dense_export_error
    from validate.speed.pairs import measure_model

    path = baseline.dense_onnx()
    error = dense_export_error(baseline.dense, path)
    baseline.release()
    result = measure_model(
        path,
        baseline.onnx,
        baseline.costs(),
        batch_sizes=batch_sizes,
        prefill=args.prefill,
        past=args.past,
        threads=args.threads,
        seconds=args.seconds,
    )
    return {**result, "dense_export_error": error}


def _recipe(baseline: Baseline) -> dict[str, Any]:
    from compress.recipe import read_written

    values = read_written(baseline.artifact.require_stage("recipe.yaml")).model_dump()
    return values | {"calibration": values["calibration"] | {"data": _portable(values["calibration"]["data"])}}


def _report(
    baseline: Baseline,
    args: argparse.Namespace,
    recipe: dict[str, Any],
    fit: list[dict[str, Any]],
    parity: list[dict[str, Any]] | None,
    quality: dict[str, Any] | None,
    speed: dict[str, Any] | None,
    engine: dict[str, Any] | None,
    gates: list[Gate],
) -> Report:
    from dataclasses import asdict

    from compress.allocation.size import model_size
    from compress.source.provenance import public
    from compress.structures.joint import leader_of
    from validate.report.machine import machine_facts
    from validate.report.summary import Report, with_shares

    reader = baseline.reader
    structures = {n: s for n in reader.linears() if (s := reader.structure(n)).name != "dense"}
    config = reader.config
    leaders = {n: leader for n in structures if (leader := leader_of(structures, n)) is not None}
    size = model_size(
        reader.architecture,
        structures,
        config.rotation,
        extra_biases=config.parsed_extra_biases(),
        skip_parameters=sum(form.parameter_count() for form in config.parsed_skips()),
        embedding_rank=config.embedding_rank,
        head_rank=config.head_rank,
    )
    counts = asdict(size) | {
        "ratio": size.ratio,
        "model_ratio": size.model_ratio,
        "dense_parameters": size.dense_parameters,
        "parameters": size.parameters,
    }
    source = public(baseline.manifest["source"])
    return Report(
        name=source["id"],
        model={"source": source, "family": reader.architecture.family},
        recipe=recipe,
        size=counts,
        fit=with_shares(fit, leaders),
        commands=_commands(baseline, args),
        machine=machine_facts(),
        parity=parity,
        quality=quality,
        speed=speed,
        engine=engine,
        gates={gate.name: gate.to_dict() for gate in gates},
    )


def _commands(baseline: Baseline, args: argparse.Namespace) -> list[str]:
    """What makes OUT again from its recipe, and what made this report."""
    from compress.source.provenance import stable_name

    recorded = baseline.manifest["source"]
    name = stable_name(recorded) or str(_portable(Path(recorded.get("location", {}).get("given", recorded["id"]))))
    given = vars(args)
    flags: list[str] = []
    for action in parser()._actions:
        value = given.get(action.dest)
        if not action.option_strings or value in (None, action.default) or action.dest in ("json", "debug", "model"):
            continue
        for item in value if isinstance(value, list) else [value]:
            flags += [action.option_strings[-1]] + ([] if item is True else [str(_portable(item))])
    out = str(_portable(args.out))
    build = ["python", "-m", "export.build", "--model", name, "--recipe", f"{out}/recipe.yaml", "--engine", "ort"]
    graph = baseline.manifest["stages"].get("onnx", {})
    build += [part for key in ("dtype", "logits") if key in graph for part in (f"--{key}", str(graph[key]))]
    return [
        shlex.join([*build, "--out", out]),
        shlex.join(["python", "-m", "validate.run", out, *flags]),
    ]


def _portable(value: object) -> object:
    """A path below the present folder as it is, any other without the folders of this machine."""
    if isinstance(value, Path):
        return value.name if value.is_absolute() or ".." in value.parts or "~" in value.parts else value
    if isinstance(value, str) and "/" in value and not value.startswith("hf:"):
        prefix, colon, path = value.rpartition(":")
        return f"{prefix}{colon}{_portable(Path(path))}"
    return value


def _publish(baseline: Baseline, report: Report, plot: bool) -> None:
    """Replace OUT/reports and put the gates into the manifest, in one write."""
    from validate.report import summary as reports

    inputs = [stage for stage in ("checkpoint", "onnx") if baseline.artifact.has_stage(stage)]
    # The manifest merges gates; what an earlier run held and this one did not is no longer vouched for.
    gates = dict.fromkeys(baseline.manifest["gates"]) | report.gates
    with baseline.artifact.stage("reports", inputs=inputs, section={"gates": gates}) as folder:
        reports.write(report, folder, plot)


if __name__ == "__main__":
    sys.exit(run_cli(main))
