"""OUT's TensorRT engine on the GPU that is here: rung 4 of the parity ladder, and its speed against the dense engine.

    4  PyTorch decoder, float32   vs  the engine, with the cache      what is deployed answers like the checkpoint

The figure is KL(PyTorch || engine) in nats a token, which says how far the two distributions are apart whatever the
scale of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.progress import log
from validate.parity.ladder import (
    DECODE_CHUNKS,
    GREEDY_TOKENS,
    Choices,
    Prompts,
    Rung,
    greedy_choices,
    runner_steps,
    torch_logits,
    worst,
)

if TYPE_CHECKING:
    from compress.model.decoder import ProcrustesForCausalLM
    from export.runtime.profiles import Spans
    from export.runtime.runner import Runner
    from validate.baseline import Baseline

# Mean KL over the positions of a case. Measured for graphs of SmolLM2-135M on the CPU: docs/tensorrt.md.
KL_TOLERANCE = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 3e-2}
# Two tokens count as tied when they are so close, relative to the largest logit.
TIE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 8e-2}

MOST_PAIRS, WARM_UP = 48, 3  # steps that are timed, at most, after steps that are not


def rung_4(model: ProcrustesForCausalLM, runner: Runner, prompts: Sequence[Prompts], dtype: str) -> Rung:
    """PyTorch in float32, one full forward, vs prefill and decode steps of the engine; then greedy continuations."""
    cases: dict[str, float] = {}
    choices = Choices(TIE[dtype])
    for prompt in prompts:
        ids, mask = prompt.continued()
        full = torch_logits(model, ids, mask)
        steps = runner_steps(runner, ids, mask, prompt.ids.shape[1])
        for kind, chosen in (("prefill", steps[:1]), ("decode with cache", steps[1:])):
            divergences = []
            for start, got in chosen:
                where = mask[:, start : start + got.shape[1]].bool()
                expected, found = full[:, start : start + got.shape[1]][where], got[where]
                divergences.append(divergence(expected, found))
                choices.add(expected, found)
            cases[f"{prompt.name}: {kind}"] = float(torch.cat(divergences).mean())
    facts, failures = choices.result(greedy_choices(model, runner, prompts, TIE[dtype]))
    title = f"PyTorch decoder vs TensorRT engine ({dtype}), mean KL in nats"
    return Rung(4, title, worst(cases.values()), KL_TOLERANCE[dtype], cases, facts, failures)


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    """KL(expected || found) (positions,) of logits (positions, vocabulary), in float64; NaN where a logit is."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def engine_prompts(prompts: Sequence[Prompts], spans: Spans, vocabulary: int, positions: int) -> list[Prompts]:
    """Those of `prompts` that the engine takes, and the edges of its profiles: longest prompt, largest batch."""
    extra = max(sum(DECODE_CHUNKS), GREEDY_TOKENS)
    generator = torch.Generator().manual_seed(1)
    longest = min(spans.prompt.most, spans.cache.most - extra, positions - extra)
    shortest = max(spans.prompt.least, 1)
    edges = []
    for name, batch, length in (
        ("longest prompt", spans.batch.least, longest),
        ("largest batch", spans.batch.most, shortest),
    ):
        ids = torch.randint(vocabulary, (batch, length + sum(DECODE_CHUNKS)), generator=generator)
        edges.append(Prompts(name, ids[:, :length], torch.ones_like(ids[:, :length]), ids[:, length:]))

    def fits(prompt: Prompts) -> bool:
        batch, length = prompt.ids.shape
        within = spans.batch.least <= batch <= spans.batch.most and spans.prompt.least <= length <= spans.prompt.most
        return within and length + extra <= spans.cache.most

    return [prompt for prompt in (*prompts, *edges) if fits(prompt)]


def engine_speed(
    baseline: Baseline, info: Mapping[str, Any], *, batch_sizes: Sequence[int], seconds: float
) -> dict[str, Any]:
    """Decode steps and a prefill of the dense engine, of the function bodies alone and of the plugins, in pairs.

    The three engines are built for this, with the sizes and options of OUT's own; only a GPU can do it.
    """
    from export.graph.header import read_header
    from export.runtime.device import DeviceRunner
    from export.tensorrt.build import build_plan
    from export.tensorrt.engine import TrtExecutor, spans_of
    from export.tensorrt.options import PLAN, Options, plugin_library

    spans, options = spans_of(info), Options.of(info["flags"])
    library = plugin_library(baseline.artifact)
    dense, ours = baseline.dense_onnx(), baseline.onnx
    ways: dict[str, tuple[Path, Path | None]] = {"dense": (dense, None), "native": (ours, None)}
    if library is not None:
        ways["cpp"] = (ours, library)
    runners = {}
    with baseline.artifact.scratch("engines") as folder:
        for name, (onnx, used) in ways.items():
            log(f"speed on the GPU: the {name} engine")
            build_plan(onnx, folder / name, used, spans.profiles(read_header(onnx).axes), options)
            runners[name] = DeviceRunner(TrtExecutor(folder / name / PLAN, onnx, spans, used))
        cases = compare_runners(runners, spans, batch_sizes=batch_sizes, seconds=seconds)
    return {"gpu": info["gpu"], "versions": info["versions"], "kept": info["plugin"], "cases": cases}


def compare_runners(
    runners: Mapping[str, Runner], spans: Spans, *, batch_sizes: Sequence[int], seconds: float
) -> list[dict[str, Any]]:
    """Each runner against the one called "dense": a case is a decode step or a prefill, at sizes that all take."""
    past = min(spans.prompt.most, spans.cache.best, spans.cache.most - MOST_PAIRS - WARM_UP)
    sizes = [b for b in batch_sizes if spans.batch.least <= b <= spans.batch.most] or [spans.batch.best]
    wanted = [("decode", batch, past) for batch in sizes] + [("prefill", sizes[0], spans.prompt.best)]
    others = {name: runner for name, runner in runners.items() if name != "dense"}
    return [
        {
            "name": f"{kind}, batch {batch}",
            "tokens": length,
            **{name: _pair(runners["dense"], other, kind, (batch, length), seconds) for name, other in others.items()},
        }
        for kind, batch, length in wanted
    ]


def _pair(dense: Runner, other: Runner, kind: str, shape: tuple[int, int], seconds: float) -> dict[str, Any]:
    import numpy as np

    from validate.speed.timing import paired

    prompt = np.random.default_rng(0).integers(0, dense.vocabulary, shape)

    def call(runner: Runner) -> Callable[[], object]:
        runner.prefill(prompt)
        return lambda: runner.decode(prompt[:, :1]) if kind == "decode" else runner.prefill(prompt)

    timing = paired(
        call(dense), call(other), seconds=seconds, least=8, most=MOST_PAIRS, warm_up=WARM_UP, one_thread=False
    )
    dense.reset()
    other.reset()
    return {
        "speedup": timing.ratio.median,
        "quartiles": [timing.ratio.q1, timing.ratio.q3],
        "seconds_dense": timing.seconds_a,
        "seconds": timing.seconds_b,
    }
