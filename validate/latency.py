"""Measure the cost table for `compress.run --budget-latency`: seconds of every linear shape of a model in ONNX Runtime.

Measured are dense matrices and a few sizes of each structure, float32, one layer at a time, weights from memory
(validate/speed/layers.py). Each structure is timed in turn with the dense matrix of its shape, and each dense matrix
with the largest one, so that the load of the machine falls out of their ratios; seconds are these ratios times the
median of the largest one, less what the call of a session takes by itself (a 1 x 1 matrix). The compressor adds up what
each linear takes, one after another; what else a model does (attention, norms, head) is not in the budget.

--tokens is how many rows one call has: 1 is decode of one sequence, 8 of eight at once, 512 the prefill of a prompt of
512 tokens. A model is faster in one and slower in the other, so measure what you will run; seconds of a budget are
seconds of one such call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cli.commands import add_common_arguments, check_at_least, check_seconds, command_parser, tell
from compress.cli.entry import run_cli
from compress.errors import UsageError
from compress.progress import log, track

if TYPE_CHECKING:
    from compress.architecture import Architecture
    from compress.structures import Structure
    from validate.speed.layers import Copies, Shape
    from validate.speed.timing import Paired

STRUCTURES = ("pifa", "lowrank", "kron", "gs", "compot", "compot24")
INNER = ("neurons", "vo")
SIZES = 4  # of each structure and shape, from the smallest of its menu to the largest
EMPTY = 64  # sessions of 1 x 1 matrices, as cold as those of small layers
PARTS = (1, 3, 5)  # eighths of an inner side that are measured beside the whole; a selection keeps more than one
EXAMPLES = r"""examples:
  python -m validate.latency --model smollm2-135m --out table.json
  python -m validate.latency --model facebook/opt-1.3b --out prefill.json --tokens 512 --structures lowrank,kron
  python -m compress.run --model smollm2-135m --structure auto --budget-latency 0.02 --latency-table table.json \
      --out out/fast
"""


@dataclass(frozen=True)
class Job:
    """What is measured at one shape: the sizes of all structures, by side of the residual stream."""

    shape: Shape
    structures: tuple[Structure, ...]

    @property
    def size(self) -> int:
        """Parameters of the dense matrix."""
        return self.shape.in_features * self.shape.out_features


def jobs_of(arch: Architecture, structures: Sequence[str], inner: Sequence[str], unit: int) -> list[Job]:
    """Everything that a plan for this architecture may ask the table for, the largest shape first.

    That is every linear, the parts that selections (`inner`) leave of it, and the d x d matrices that rotations add.
    Raises UsageError for a unit that a structure cannot use.
    """
    from compress.structures import cores
    from validate.speed.layers import Shape

    whole, parts = dict[Shape, None](), dict[Shape, None]()
    for role, (n, m) in arch.linears().items():
        whole[Shape("", role, m, n, arch.side(role))] = None
        for kept in _kept_sizes(arch, role, inner):
            m_, n_ = (m, kept) if arch.side(role) == "in" else (kept, n)
            parts[Shape("", role, m_, n_, arch.side(role))] = None
    d = arch.hidden_size
    found: dict[tuple[int, int], tuple[Shape, dict[Structure, None]]] = {}
    for shape in (*whole, *parts, Shape("", "rotation", d, d, "in")):
        _, chosen = found.setdefault((shape.in_features, shape.out_features), (shape, {}))
        # What is left of a selection stays dense, or becomes one of these (compress/allocation/groups.py).
        kinds = structures if shape in whole else [k for k in structures if k in (*cores(), "kron") and shape in parts]
        for kind in kinds:
            chosen.update(dict.fromkeys(sizes_of(kind, shape, unit)))
    jobs = [Job(shape, tuple(chosen)) for shape, chosen in found.values()]
    return sorted(jobs, key=lambda job: -job.size)


def _kept_sizes(arch: Architecture, role: str, inner: Sequence[str]) -> list[int]:
    """Inner features that are left of a linear for `PARTS` of them, where `inner` lets them be dropped."""
    if role.startswith("mlp.") and "neurons" in inner:
        groups, size = 1, arch.intermediate_size
        unit = 64 if size >= 1024 else max(1, size // 16)
    elif role in ("attn.v", "attn.o") and "vo" in inner:
        groups, size = arch.num_kv_heads if role == "attn.v" else arch.num_heads, arch.head_dim
        unit = max(1, min(16, size // 4))
    else:
        return []
    return [groups * kept for kept in sorted({max(unit, size * part // 8 // unit * unit) for part in PARTS})]


def sizes_of(kind: str, shape: Shape, unit: int) -> list[Structure]:
    """`SIZES` entries of a structure's menu, the smallest and the largest among them, of each `Structure.variant`.

    A variant with fewer entries gives all; none where no aligned size saves parameters.
    """
    from compress.structures import registry

    side: Any = shape.side
    variants: dict[str, dict[int, Structure]] = {}
    for structure in registry()[kind].menu(shape.in_features, shape.out_features, side, unit=unit):
        variants.setdefault(structure.variant, {}).setdefault(structure.parameter_count(), structure)
    found: list[Structure] = []
    for by_size in variants.values():
        menu = [by_size[size] for size in sorted(by_size)]
        last = len(menu) - 1
        found += [menu[i] for i in sorted({round(last * k / (SIZES - 1)) for k in range(SIZES)})]
    return found


@dataclass(frozen=True)
class Timed:
    """One structure: seconds as a multiple of those of the largest dense matrix, and how it was found."""

    structure: Structure
    relative: float
    timing: Paired

    def entry(self, anchor: float, call: float) -> dict[str, Any]:
        """For the table; anchor: seconds of the largest dense matrix; call: of a session's call, paid once a model."""

        return {
            "structure": self.structure.name,
            "variant": self.structure.variant,
            "in_features": self.structure.in_features,
            "out_features": self.structure.out_features,
            "parameters": self.structure.parameter_count(),
            "seconds": max(self.relative - call / anchor, self.relative / 10) * anchor,  # never nothing, by noise
            "config": self.structure.to_config(),
            "ratio": self.timing.ratio.median,
            "ratio_quartiles": [self.timing.ratio.q1, self.timing.ratio.q3],
            "pairs": self.timing.pairs,
        }


def measure(
    jobs: Sequence[Job], tokens: int, *, threads: int = 1, seconds: float = 2.0, working_set: int | None = None
) -> tuple[list[dict[str, Any]], float]:
    """The entries of the table, and the seconds of an empty call that are no longer in them.

    `seconds` for each pair; at most three layers' copies are in memory at a time, each of `working_set` bytes
    (layers.WORKING_SET when None).
    """
    from compress.structures import DenseStructure
    from validate.speed import layers
    from validate.speed.timing import now, paired

    room = layers.WORKING_SET if working_set is None else working_set

    def copies(structure: Structure) -> Copies:
        return layers.Copies(structure, threads, room)

    def compare(a: Copies, b: Copies) -> Paired:
        warm_up = max(len(a.sessions), len(b.sessions))
        run_a, run_b = a.runner(tokens), b.runner(tokens)
        return paired(run_a, run_b, seconds=seconds, warm_up=warm_up, one_thread=threads == 1)

    # Making weights that fill `working_set` and running all of them once takes time beside the pairs: what one step
    # takes is known after the first.
    began, _ = now()
    first = copies(DenseStructure(jobs[0].shape.in_features, jobs[0].shape.out_features))
    timed, anchors = list[Timed](), list[float]()
    call = 1 / compare(first, layers.Copies(DenseStructure(1, 1), threads, 4 * EMPTY)).ratio.median
    steps, pace = list(_steps(jobs)), now()[0] - began
    log(f"about {len(steps) * pace / 60:.1f} minutes at the pace of the first matrix, its weights counted")
    for job, structure in track(steps, description="measure"):
        if structure is None:
            dense = first if job is jobs[0] else copies(DenseStructure(job.shape.in_features, job.shape.out_features))
            timing = compare(first, dense)
            anchors.append(timing.seconds_a)
            relative = 1.0 if dense is first else 1 / timing.ratio.median
            timed.append(Timed(dense.structure, relative, timing))
        else:
            timing = compare(dense, copies(structure))
            timed.append(Timed(structure, relative / timing.ratio.median, timing))
    anchor = statistics.median(anchors)
    return [one.entry(anchor, call * anchor) for one in timed], call * anchor


def _steps(jobs: Sequence[Job]) -> Iterator[tuple[Job, Structure | None]]:
    """Each shape's dense matrix (None), then its structures."""
    for job in jobs:
        yield job, None
        for structure in job.structures:
            yield job, structure


def build_table(
    arch: Architecture,
    model: str,
    *,
    tokens: int = 1,
    structures: Sequence[str] = ("pifa", "lowrank", "kron", "gs"),
    inner: Sequence[str] = ("neurons",),
    unit: int | None = None,
    threads: int = 1,
    seconds: float = 2.0,
    working_set: int | None = None,
) -> dict[str, Any]:
    """What the command writes; `model` names the model in it. unit: alignment of sizes, None for the default one."""
    from compress.allocation.budget import default_unit
    from validate.report.machine import machine_facts

    aligned = unit or default_unit(arch)
    jobs = jobs_of(arch, structures, inner, aligned)
    count = sum(1 + len(job.structures) for job in jobs)
    log(f"{count} matrices of {len(jobs)} shapes, {tokens} token(s) at a time")
    entries, call = measure(jobs, tokens, threads=threads, seconds=seconds, working_set=working_set)
    return {
        "tokens": tokens,
        "model": model,
        "runtime": "ONNX Runtime",
        "dtype": "float32",
        "threads": threads,
        "clock": "thread CPU time" if threads == 1 else "wall time",
        "call_seconds": call,
        "unit": aligned,
        "inner": list(inner),
        "entries": entries,
        "dense_seconds": dense_seconds(arch, entries),
        "machine": machine_facts(),
    }


def dense_seconds(arch: Architecture, entries: Sequence[dict[str, Any]]) -> float:
    """Of all projections of the dense model, one after another: what a budget is to be compared with."""
    seconds = {(e["in_features"], e["out_features"]): e["seconds"] for e in entries if e["structure"] == "dense"}
    return float(arch.num_layers * sum(seconds[m, n] for n, m in arch.linears().values()))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = command_parser("validate.latency", __doc__, EXAMPLES)
    p.add_argument("--model", required=True, metavar="M", help="folder, .gguf file, ORG/NAME on the hub, or an alias")
    p.add_argument("--out", required=True, type=Path, metavar="FILE", help="the table, json")
    p.add_argument("--tokens", type=int, default=1, metavar="N", help="rows of one call, see above (default: 1)")
    p.add_argument(
        "--structures",
        default="pifa,lowrank,kron,gs",
        metavar="A,B",
        help=f"of {', '.join(STRUCTURES)} (default: %(default)s)",
    )
    p.add_argument(
        "--inner",
        default="neurons",
        metavar="A,B",
        help="also the shapes that dropping neurons or value coordinates (vo) leaves, or none (default: neurons)",
    )
    p.add_argument("--unit", type=int, metavar="N", help="that of the compression (default: by width, 8 to 64)")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="of ONNX Runtime (default: 1)")
    p.add_argument("--seconds", type=float, default=2.0, metavar="S", help="for each matrix (default: 2)")
    p.add_argument(
        "--working-set",
        type=int,
        default=256,
        metavar="MIB",
        help="weights that each side runs through, more than a cache holds (default: 256)",
    )
    add_common_arguments(p, json_help="the table on stdout as well")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, write, print."""
    args = parser().parse_args(argv)
    structures = _names("--structures", args.structures, STRUCTURES)
    inner = [] if args.inner == "none" else _names("--inner", args.inner, INNER)
    check_at_least(args, 1, "tokens", "threads", "working_set", "unit")
    check_seconds(args)
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise UsageError(f"--out {args.out} must be a file in a folder that exists")
    if not os.access(args.out.absolute().parent, os.W_OK):
        raise UsageError(f"--out {args.out} cannot be written: choose another folder, or change its permissions")
    from compress.source.resolve import resolve

    source = resolve(args.model)
    table = build_table(
        source.architecture(),
        source.name,
        tokens=args.tokens,
        structures=structures,
        inner=inner,
        unit=args.unit,
        threads=args.threads,
        seconds=args.seconds,
        working_set=args.working_set << 20,
    )
    text = json.dumps(table, indent=1, allow_nan=False) + "\n"
    partial = args.out.with_name(args.out.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(args.out)
    tell(args, table, lambda: summary(table, args.out))
    return 0


def summary(table: dict[str, Any], path: Path) -> str:
    """What the measurements say in a few lines: each structure over dense, smallest to largest size."""
    lines = [f"{'matrix (in -> out)':<20}{'structure':<18}{'kept':<14}speed over dense"]
    rows: dict[tuple[int, int, str], list[tuple[float, float]]] = {}
    for e in table["entries"]:
        if e["structure"] != "dense":
            m, n = e["in_features"], e["out_features"]
            rows.setdefault((m, n, e["variant"]), []).append((e["parameters"] / (m * n), e["ratio"]))
    for (m, n, variant), points in rows.items():
        points.sort()
        kept = f"{points[0][0]:.2f} - {points[-1][0]:.2f}"
        lines.append(f"{f'{m} -> {n}':<20}{variant:<18}{kept:<14}" + ", ".join(f"{ratio:.2f}" for _, ratio in points))
    lines.append(
        f"{len(table['entries'])} matrices in {path}; all projections dense: {table['dense_seconds']:.4g} seconds for "
        f"{table['tokens']} token(s)"
    )
    return "\n".join(lines)


def _names(flag: str, text: str, known: Sequence[str]) -> list[str]:
    names = text.split(",")
    wrong = [name for name in names if name not in known]
    if wrong:
        raise UsageError(f"{flag} {text}: {', '.join(map(repr, wrong))} is not among {', '.join(known)}")
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    sys.exit(run_cli(main))
