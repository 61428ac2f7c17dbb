"""The two models timed side by side, and held against what their own sizes allow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ArtifactError, MissingDependencyError, UsageError
from compress.progress import log
from validate.graphfacts import GraphFacts

if TYPE_CHECKING:
    import torch

    from export.runtime.ort import OrtRunner
    from validate.cost import Limit, ModelCost
    from validate.speed.timing import Paired

DECODE_STEPS = 48  # maximum; the cache grows by one token a step


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
        """Share of the speed-up that the sizes allow; 1 is all."""
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
    from validate.speed.timing import paired

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
    from validate.speed.timing import paired

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
    """Peak bytes of resident memory, in a process of its own that loads the model and runs it once.

    {"before_load": ..., "peak": ...}; the difference is the model, its packed weights and its activations.
    Raises MissingDependencyError when that process lacks memory or handles, or is killed, as the system does where
    memory runs out; ArtifactError when the model does not run there.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "validate.speed.memory", str(path), str(threads), str(tokens)]
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
        # Where the interpreter itself could not start for want of memory, its words are passed on as any library's.
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
