"""Speed of the compressed model over the dense one: measured in pairs, held against what its own size allows.

python -m validate.speed OUT        decode and prefill of OUT's model over the dense export of its source
python -m validate.speed --layers   single layers at the shapes of opt-13b and llama-2-7b
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cli.entry import run_cli
from compress.errors import ArtifactError, MissingDependencyError, UsageError
from compress.lazy import require
from compress.progress import log
from validate.graphfacts import GraphFacts

if TYPE_CHECKING:
    import torch

    from export.runtime.ort import OrtRunner
    from validate.cost import Limit, ModelCost
    from validate.timing import Paired

DECODE_STEPS = 48  # at most; the cache grows by one token a step


@dataclass(frozen=True)
class Measure:
    """One measured case. `share` is the measured ratio over the limit's; bytes or FLOPs are those of one run."""

    name: str
    batch: int
    tokens: int
    past: int
    timing: Paired
    limit: Limit

    @property
    def share(self) -> float:
        """Of the speed-up that the sizes allow, how much is measured; 1 is all."""
        return self.timing.ratio.median / self.limit.speedup

    def to_dict(self) -> dict[str, Any]:
        """For speed.json."""
        tokens = self.batch * self.tokens
        return {
            "name": self.name,
            "batch": self.batch,
            "tokens": self.tokens,
            "past": self.past,
            "speedup": self.timing.ratio.median,
            **self.timing.to_dict(),
            "tokens_per_second_dense": tokens / self.timing.seconds_a,
            "tokens_per_second_compressed": tokens / self.timing.seconds_b,
            "limit": self.limit.speedup,
            "limit_by": self.limit.unit,
            f"{self.limit.unit.lower()}_dense": self.limit.dense,
            f"{self.limit.unit.lower()}_compressed": self.limit.compressed,
            "share_of_limit": self.share,
        }


@dataclass(frozen=True)
class Pair:
    """The same thing of the dense and of the compressed model."""

    dense: Any
    compressed: Any


def measure_decode(
    runners: tuple[OrtRunner, OrtRunner],
    costs: tuple[ModelCost, ModelCost],
    batch: int,
    past: int,
    dtype: torch.dtype,
    *,
    threads: int,
    seconds: float,
) -> Measure:
    """One token a sequence and step, after a prefill of `past`; the limit is that of the mean cache length."""
    import numpy as np

    from validate.cost import decode_limit
    from validate.timing import paired

    arch = costs[0].arch
    warm_up = 3
    most = min(DECODE_STEPS, arch.max_positions - past - warm_up)
    if most < 1:
        raise UsageError(f"a past of {past} tokens leaves no room to decode in {arch.max_positions} positions")
    generator = np.random.default_rng(0)
    prompt = generator.integers(0, arch.vocab_size, (batch, past))
    token = generator.integers(0, arch.vocab_size, (batch, 1))
    for runner in runners:
        runner.prefill(prompt)
    timing = paired(
        lambda: runners[0].decode(token),
        lambda: runners[1].decode(token),
        seconds=seconds,
        least=min(8, most),
        most=most,
        warm_up=warm_up,
        one_thread=threads == 1,
    )
    for runner in runners:
        runner.reset()
    mean_past = past + warm_up + timing.pairs // 2
    limit = decode_limit(*costs, batch, mean_past, dtype)
    return Measure(f"decode, batch {batch}", batch, 1, mean_past, timing, limit)


def measure_prefill(
    runners: tuple[OrtRunner, OrtRunner],
    costs: tuple[ModelCost, ModelCost],
    tokens: int,
    logits: str,
    *,
    threads: int,
    seconds: float,
) -> Measure:
    """One sequence of `tokens`, from an empty cache."""
    import numpy as np

    from validate.cost import flops_limit
    from validate.timing import paired

    arch = costs[0].arch
    if tokens > arch.max_positions:
        raise UsageError(f"a prefill of {tokens} tokens does not fit the model's {arch.max_positions} positions")
    prompt = np.random.default_rng(0).integers(0, arch.vocab_size, (1, tokens))
    timing = paired(
        lambda: runners[0].prefill(prompt),
        lambda: runners[1].prefill(prompt),
        seconds=seconds,
        warm_up=1,
        one_thread=threads == 1,
    )
    for runner in runners:
        runner.reset()
    limit = flops_limit(*costs, 1, tokens, logits=1 if logits == "last" else None)
    return Measure(f"prefill of {tokens} tokens", 1, tokens, 0, timing, limit)


def peak_memory(path: Path, threads: int, tokens: int) -> dict[str, int]:
    """Bytes of resident memory at most, in a process of its own that loads the model and runs it once.

    {"before_load": ..., "peak": ...}; the difference is the model, its packed weights and its activations.
    Raises MissingDependencyError when that process lacks memory or handles, or is killed, as the system does where
    memory runs out; ArtifactError when the model does not run there.
    """
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "validate.memory", str(path), str(threads), str(tokens)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        if done.returncode == MissingDependencyError.exit_code:
            raise MissingDependencyError(f"{path} cannot be run in a process of its own: {last}")
        if done.returncode < 0:
            raise MissingDependencyError(
                f"the process that measures the memory of {path} was ended by {signal.Signals(-done.returncode).name}, "
                f"perhaps for want of memory: end other programs, or give --skip speed"
            )
        # Where the interpreter itself could not start for want of memory, its words are told as any library's.
        raise ArtifactError(f"{path} does not run in a process of its own ({last})") from RuntimeError(last)
    values: dict[str, int] = json.loads(done.stdout)
    return values


def measure_model(
    dense_path: Path,
    compressed_path: Path,
    costs: tuple[ModelCost, ModelCost],
    *,
    batch_sizes: Sequence[int] = (1, 8),
    prefill: int = 512,
    past: int = 128,
    threads: int = 1,
    seconds: float = 15.0,
) -> dict[str, Any]:
    """Everything in speed.json. `costs` and the paths are (dense, compressed)."""
    import torch

    from export.runtime.ort import OrtRunner

    facts = Pair(GraphFacts.of(dense_path), GraphFacts.of(compressed_path))
    if (facts.dense.dtype, facts.dense.logits) != (facts.compressed.dtype, facts.compressed.logits):
        raise ArtifactError(
            f"the dense graph is {facts.dense.dtype} with {facts.dense.logits} logits and the compressed one "
            f"{facts.compressed.dtype} with {facts.compressed.logits}: they cannot be compared; export both alike"
        )
    dtype: torch.dtype = getattr(torch, facts.compressed.dtype)
    prefill, past = min(prefill, costs[0].arch.max_positions), min(past, costs[0].arch.max_positions // 2)
    memory = Pair(*(peak_memory(path, threads, prefill) for path in (dense_path, compressed_path)))
    runners = (OrtRunner(dense_path, threads=threads), OrtRunner(compressed_path, threads=threads))
    cases = []
    for batch in batch_sizes:
        cases.append(measure_decode(runners, costs, batch, past, dtype, threads=threads, seconds=seconds))
        log(_line(cases[-1]))
    cases.append(measure_prefill(runners, costs, prefill, facts.compressed.logits, threads=threads, seconds=seconds))
    log(_line(cases[-1]))
    one_token = [cost.decode_bytes(1, past, dtype) for cost in costs]
    return {
        "runtime": "ONNX Runtime",
        "threads": threads,
        "dtype": facts.compressed.dtype,
        "logits": facts.compressed.logits,
        "cases": [case.to_dict() for case in cases],
        "bytes_per_token": {
            "batch": 1,
            "past": past,
            "dense": sum(one_token[0].values()),
            "compressed": sum(one_token[1].values()),
            "dense_by_part": one_token[0],
            "compressed_by_part": one_token[1],
        },
        "peak_memory": asdict(memory),
        "graph": {"dense": asdict(facts.dense), "compressed": asdict(facts.compressed)},
    }


def _line(case: Measure) -> str:
    return f"{case.name}: {case.timing.ratio.median:.3f}x, limit {case.limit.speedup:.3f}x ({case.share:.0%} of it)"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m validate.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    p.add_argument("--json", action="store_true", help="the result as one JSON object")
    p.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print."""
    p = parser()
    args = p.parse_args(argv)
    if args.layers == (args.out is not None):
        p.error("give either OUT or --layers")
    from validate.gates import parse_batch_sizes

    sizes = parse_batch_sizes(args.batch_sizes)
    for flag, value in (("--threads", args.threads), ("--prefill", args.prefill), ("--past", args.past)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} must be at least 1, not {value}")
    require("onnxruntime", pip="'onnxruntime>=1.24'", purpose="measure speed")
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
    from validate.console import case_line

    lines = [f"{case['name']}: {case_line(case)}" for case in result["cases"]]
    print(json.dumps(result) if args.json else "\n".join(lines))
    return 0


def _layers(args: argparse.Namespace) -> int:
    from validate.layers import MARK, beginning, benchmark, document, table
    from validate.markdown import surroundings

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
    print(json.dumps([row.to_dict() for row in rows]) if args.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
