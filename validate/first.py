"""Checks of what can be known to fail, before the first minute of work and not after the last."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from compress.errors import ArtifactError, UsageError
from compress.progress import log

if TYPE_CHECKING:
    from compress.calibration.text import TextData
    from validate.baseline import Baseline
    from validate.perplexity.windows import Windows


def look_first(baseline: Baseline, args: argparse.Namespace) -> tuple[TextData, Windows] | None:
    """Hold OUT and the flags of `validate.run` against each other; the text of the perplexity part and its windows,
    where there is one.

    Raises UsageError for flags that this model cannot serve or a source that is not there, ArtifactError where OUT has
    no exported model or the source is another.
    """
    parts = {"parity", "perplexity", "speed"} - set(args.skip)
    if parts != {"speed"} or args.dense is None:
        _ = baseline.source  # found and held against its hashes
    positions = baseline.reader.architecture.max_positions
    exported = parts - {"perplexity"} or (parts if args.perplexity_runtime == "onnxruntime" else set())
    if exported:
        _exported(baseline, args, exported)
    fit_positions(args, positions, parts)
    if "perplexity" not in parts:
        return None
    from compress.calibration.text import load_text
    from validate.perplexity.windows import make_windows

    text = load_text(args.data)
    windows = make_windows(
        text,
        baseline.source.tokenizer(),
        length=args.sequence_length,
        stride=args.stride,
        max_windows=args.max_windows,
        vocab_size=baseline.reader.architecture.vocab_size,
    )
    return text, windows


LENGTHS = {"sequence_length": ("perplexity", 1024), "prefill": ("speed", 512), "past": ("speed", 128)}
"""Flag -> the part that it belongs to, and its default."""


def fit_positions(args: argparse.Namespace, positions: int, parts: set[str]) -> None:
    """Set the lengths of `parts` that were not given (None): their defaults, shortened to a model of few positions,
    which is said.

    Raises UsageError naming all those that were given and do not fit.
    """
    shortened, wrong = [], []
    for name, (part, default) in LENGTHS.items():
        if not hasattr(args, name):
            continue
        flag, given = f"--{name.replace('_', '-')}", getattr(args, name)
        most = max(1, positions // 2) if name == "past" else positions  # the other half is decoded
        if part not in parts:
            continue
        if given is None:
            setattr(args, name, min(default, most))
            if most < default:
                shortened.append(f"{flag} {most}")
        elif given > most:
            of = f"half of the {positions} positions" if name == "past" else f"the {positions} positions"
            wrong.append(f"{flag} {given} is more than {of} of the model: give {most} or less")
    if wrong:
        raise UsageError("; ".join(wrong))
    if shortened:
        log(f"{', '.join(shortened)} in place of the defaults: the model has {positions} positions")


def _exported(baseline: Baseline, args: argparse.Namespace, parts: set[str]) -> None:
    """True if OUT has a graph, and one that runs here."""
    from validate.graphfacts import graph_dtype

    out, artifact = baseline.artifact.out, baseline.artifact
    if not artifact.has_stage("onnx"):
        raise ArtifactError(
            f"{out} has no complete onnx, which {' and '.join(sorted(parts))} {'need' if len(parts) > 1 else 'needs'}: "
            f"run python -m export.build with the same --model and recipe and --out {out}, which uses the checkpoint "
            f"that is there"
        )
    if graph_dtype(baseline.onnx) == "bfloat16" and (not args.gpu or args.perplexity_runtime == "onnxruntime"):
        raise UsageError(
            f"the graph in {out} is in bfloat16, which ONNX Runtime does not run on the CPU: give --gpu for its "
            f"TensorRT engine (with --perplexity-runtime pytorch), or skip parity and speed, or export it again with "
            f"--dtype float32"
        )
