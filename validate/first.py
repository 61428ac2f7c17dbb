"""What can be known to fail is said before the first minute of work, not after the last."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from compress.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from compress.textdata import TextData
    from validate.baseline import Baseline


def look_first(baseline: Baseline, args: argparse.Namespace) -> TextData | None:
    """Hold OUT and the flags of `validate.run` against each other; the text of the perplexity part, where there is one.

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
    if "speed" in parts:
        if args.prefill > positions:
            raise UsageError(
                f"a prefill of {args.prefill} tokens does not fit the model's {positions} positions: give --prefill "
                f"{positions} or less"
            )
        if args.past > positions - 4:  # three tokens to warm up, one to measure
            raise UsageError(
                f"a past of {args.past} tokens leaves no room to decode in {positions} positions: give --past "
                f"{max(1, positions // 2)} or less"
            )
        baseline.dense_given()
    if "perplexity" not in parts:
        return None
    if args.sequence_length > positions:
        raise UsageError(
            f"--sequence-length {args.sequence_length} is more than the model's {positions} positions: give "
            f"--sequence-length {positions} or less"
        )
    from compress.textdata import load_text

    return load_text(args.data)


def _exported(baseline: Baseline, args: argparse.Namespace, parts: set[str]) -> None:
    """Whether OUT has a graph, and one that runs here."""
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
