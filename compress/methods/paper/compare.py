"""`python -m compress.methods.paper.compare`: the paper's rotation solver against ours, at equal structures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from compress.cli.commands import add_common_arguments, command_parser, tell
from compress.cli.entry import run_cli
from compress.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from compress.source.model import ModelSource

EXAMPLES = """\
examples:
  python -m compress.methods.paper.compare --model smollm2-135m
  python -m compress.methods.paper.compare --model smollm2-135m --structure gs --kept 0.5 --position 12 --json
  python -m compress.methods.paper.compare --model facebook/opt-1.3b --calibration-samples 64 --device cuda
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command_parser("compress.methods.paper.compare", __doc__, EXAMPLES)
    p.add_argument("--model", required=True, metavar="M", help="as for compress.run")
    p.add_argument("--revision", help="revision of a hub model")
    p.add_argument("--structure", choices=["kron", "gs"], default="kron", help="default: kron")
    p.add_argument(
        "--kept", type=float, default=0.75, help="of each compressed matrix: 0.75, 0.625 or 0.5 (default: 0.75)"
    )
    p.add_argument(
        "--position",
        type=int,
        metavar="P",
        help="of the stream: 2i is read by attention i, 2i + 1 by MLP i (default: the middle MLP)",
    )
    p.add_argument("--als-iterations", type=int, default=10, help="of the paper's stage 1 (default: 10)")
    p.add_argument("--gd-iterations", type=int, default=500, help="of the paper's stage 2 (default: 500)")
    p.add_argument(
        "--rotation-iterations", type=int, help="of our solver (default: 40 for kron, 10 alternations for gs)"
    )
    p.add_argument("--calibration-data", metavar="DATA", default="boolq", help="as for compress.run (default: boolq)")
    p.add_argument("--calibration-samples", type=int, default=24, metavar="N", help="sequences (default: 24)")
    p.add_argument("--sequence-length", type=int, default=1024, metavar="T", help="tokens each (default: 1024)")
    p.add_argument("--seed", type=int, default=0, help="of the text order (default: 0)")
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    p.add_argument("--batch", type=int, default=4, help="calibration sequences at a time (default: 4)")
    add_common_arguments(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Collect, solve, print."""
    args = parser().parse_args(argv)
    from compress.calibration.streams import Runner, torch_device
    from compress.methods.paper.comparison import compare_position
    from compress.methods.paper.grams import position_grams
    from compress.methods.paper.shapes import paper_structures
    from compress.methods.paper.solver import position_members
    from compress.rewrites.folding import folded
    from compress.source.resolve import resolve

    device = torch_device(args.device)
    source = resolve(args.model, revision=args.revision)
    arch = source.architecture()
    structures = paper_structures(arch, args.structure, args.kept)
    position = arch.num_layers // 2 * 2 + 1 if args.position is None else args.position
    if not 0 <= position <= 2 * arch.num_layers:
        raise UsageError(f"--position {position} is not one of this model's: give 0 to {2 * arch.num_layers}")
    for flag in ("als_iterations", "gd_iterations", "rotation_iterations", "batch"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UsageError(f"--{flag.replace('_', '-')} {value} does nothing: give 1 or more")
    tokens = _tokens(args, source)
    model, counts = folded(source), tokens.flatten().bincount(minlength=arch.vocab_size)
    grams = position_grams(model, tokens, position, Runner(arch, tokens.shape[1], device, args.batch))
    _, members, exact = next(
        position_members(model, structures, grams, counts, device, start=position, stop=position + 1)
    )
    rows = compare_position(
        position,
        members,
        exact,
        als_iterations=args.als_iterations,
        gd_iterations=args.gd_iterations,
        rotation_iterations=args.rotation_iterations or (40 if args.structure == "kron" else 10),
    )
    facts = {"position": position, "structure": args.structure, "kept": args.kept}
    lines = [
        f"position {position}: {', '.join(m.name for m in members)}; {args.structure}, {args.kept:g} kept of each",
        f"{'method':<26} {'error':>9} {'norms':>9} {'search s':>9} {'total s':>9}",
        *(f"{r.method:<26} {r.error:9.5f} {r.norms:9.4f} {r.rotation_seconds:9.2f} {r.seconds:9.2f}" for r in rows),
    ]
    result = {**facts, "linears": [m.name for m in members], "rows": [asdict(r) for r in rows]}
    tell(args, result, lambda: "\n".join(lines))
    return 0


def _tokens(args: argparse.Namespace, source: ModelSource) -> Tensor:
    from compress.calibration.text import load_text
    from compress.calibration.tokens import token_sequences

    arch = source.architecture()
    if args.sequence_length > arch.max_positions:
        raise UsageError(
            f"--sequence-length {args.sequence_length} is more than the {arch.max_positions} positions of this model"
        )
    return token_sequences(
        load_text(args.calibration_data),
        source.tokenizer(),
        samples=args.calibration_samples,
        length=args.sequence_length,
        seed=args.seed,
        vocab_size=arch.vocab_size,
    )


if __name__ == "__main__":
    sys.exit(run_cli(main))
