"""The parity ladder, rungs 1 to 3: each says how far two forms of the same model are apart.

    1  source model               vs  folded and rotated decoder, uncompressed    the rewrites are exact
    2  layers applied in factors  vs  their dense equivalents                     factored products are right
    3  PyTorch decoder            vs  ONNX Runtime, with and without the cache    the export is right
    4  PyTorch decoder            vs  TensorRT, on a GPU: validate/parity/engine.py

Rungs 1 and 3 compare logits, by max |a - b| / max |a| over the positions that are not padding, on a
left-padded batch, a whole sequence and a sequence of length 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.errors import ArtifactError
from compress.model.masks import positions_from_mask
from compress.progress import track
from compress.structures import cast

if TYPE_CHECKING:
    from compress.checkpoint.reader import CheckpointReader
    from compress.model.decoder import ProcrustesForCausalLM
    from export.runtime.runner import Runner

REWRITE_TOLERANCE = 1e-4
# Float32 sums of up to some 20,000 products in another order: about 1e-6 of the largest output. A factor that
# is misplaced or wrong in one value of its largest hundredth is far above 1e-5.
FACTOR_TOLERANCE = 1e-5
FACTOR_TOKENS = 16
# By the type of the graph, on logits. Float32 measures 8e-7 on three random layers and 8e-5 on SmolLM2-135M's 30
# (rung 1 there: 5e-6): sums in another order and ONNX Runtime's own exp and sigmoid, growing with depth. A single
# weight that is wrong by 1 measures 0.1 and more.
RUNTIME_TOLERANCE = {"float32": 1e-3, "float16": 5e-2}
DECODE_CHUNKS = (1, 1, 1, 2)  # tokens appended at a time after the prefill
GREEDY_TOKENS = 8


@dataclass(frozen=True)
class Rung:
    """One rung: `value` is the worst of `cases`, held against `tolerance`. `facts` are further figures."""

    number: int
    title: str
    value: float
    tolerance: float
    cases: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """False also where the value is NaN."""
        return self.value <= self.tolerance and not self.failures

    def to_dict(self) -> dict[str, Any]:
        """For parity.json; a figure that is not finite becomes a string."""
        values = {**asdict(self), "passed": self.passed, "failures": list(self.failures)}
        values["value"] = _json(self.value)
        values["cases"] = {name: _json(v) for name, v in self.cases.items()}
        return values


@dataclass(frozen=True)
class Prompts:
    """A left-padded batch and tokens to go on with.

    `ids` and `mask` (batch, length), mask 0 on padding; `more` (batch, sum of DECODE_CHUNKS).
    """

    name: str
    ids: Tensor
    mask: Tensor
    more: Tensor

    def continued(self) -> tuple[Tensor, Tensor]:
        """Ids and mask of the whole: (batch, length + sum of DECODE_CHUNKS)."""
        return torch.cat([self.ids, self.more], dim=1), torch.cat([self.mask, torch.ones_like(self.more)], dim=1)


def make_prompts(vocab_size: int, longest: int, tokens: Tensor | None = None, seed: int = 0) -> list[Prompts]:
    """A left-padded batch of four lengths, one sequence of full length, and one of length 1.

    `tokens` (n,) is where the ids are taken from, text for instance; without it they are random.
    """
    extra = sum(DECODE_CHUNKS)
    whole = longest + extra
    lengths = (longest, max(1, longest // 2), max(1, longest // 5), 1)
    if tokens is None or len(tokens) < len(lengths) * whole:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(vocab_size, (len(lengths) * whole,), generator=generator)
    rows = tokens[: len(lengths) * whole].view(len(lengths), whole)
    mask = torch.stack([(torch.arange(longest) >= longest - length).long() for length in lengths])
    ids, more = rows[:, :longest] * mask, rows[:, longest:]
    last = slice(longest - 1, longest)
    return [
        Prompts("left-padded batch", ids, mask, more),
        Prompts("one sequence", rows[:1, :longest], mask[:1], more[:1]),
        Prompts("length 1", rows[1:2, last], mask[:1, last], more[1:2]),
    ]


def relative_error(reference: Tensor, other: Tensor, where: Tensor | None = None) -> float:
    """max |a - b| / max |a|; `where` (batch, length) is 0 on positions to leave out. NaN if there is one."""
    a, b = reference.double(), other.double()
    if where is not None:
        a, b = a[where.bool()], b[where.bool()]
    return float((a - b).abs().max() / a.abs().max())


def worst(values: Iterable[float]) -> float:
    """The largest value; NaN when any is NaN (max() would pass over it)."""
    listed = list(values)
    return math.nan if any(math.isnan(v) for v in listed) else max(listed)


def rung_1(source_model: Any, rewritten: ProcrustesForCausalLM, prompts: Sequence[Prompts]) -> Rung:
    """Source model (transformers, float32) vs the folded and rotated decoder, nothing compressed."""
    cases = {}
    for prompt in prompts:
        inputs = {
            "input_ids": prompt.ids,
            "attention_mask": prompt.mask,
            "position_ids": positions_from_mask(prompt.mask),
            "use_cache": False,
        }
        with torch.inference_mode():
            a, b = source_model(**inputs).logits, rewritten(**inputs).logits
        cases[prompt.name] = relative_error(a, b, prompt.mask)
    title = "source model vs folded and rotated decoder"
    return Rung(1, title, worst(cases.values()), REWRITE_TOLERANCE, cases)


def rung_2(reader: CheckpointReader, seed: int = 0) -> Rung:
    """Every structured layer in factors vs its dense equivalent, one layer in memory at a time.

    Inputs are normal with unit variance, as the normalised stream is, and one feature in 64 is ten times
    larger, as in real models. The dense side is in float64. Cases are kinds of structure.
    """
    generator = torch.Generator().manual_seed(seed)
    errors: dict[str, float] = {}
    names = [n for n in reader.linears() if reader.structure(n).name != "dense"]
    for linear in track(names, description="parity rung 2"):
        structure = reader.structure(linear)
        factors = cast(reader.factors(linear), torch.float32)
        x = torch.randn(FACTOR_TOKENS, structure.in_features, generator=generator)
        x[:, ::64] *= 10.0
        exact = x.double() @ structure.dense(cast(factors, torch.float64)).T
        errors[linear] = worst(
            relative_error(exact[:rows], structure.apply(factors, x[:rows])) for rows in (FACTOR_TOKENS, 1)
        )
    by_kind: dict[str, float] = {}
    for linear, error in errors.items():
        kind = reader.structure(linear).name
        by_kind[kind] = worst([by_kind.get(kind, 0.0), error])
    facts: dict[str, Any] = {"layers": len(errors), "dense_layers": len(reader.linears()) - len(errors)}
    if errors:
        facts["worst_layer"] = max(errors, key=lambda n: math.inf if math.isnan(errors[n]) else errors[n])
    title = "layers in factors vs their dense equivalents"
    return Rung(2, title, worst([0.0, *errors.values()]), FACTOR_TOLERANCE, by_kind, facts)


@dataclass
class Choices:
    """How often two runtimes rank the same token first; `tolerance` is relative to the largest logit.

    A choice is clear where the reference's first two logits are further apart than two errors of that size can move
    them. Others may differ by rounding alone, which is not the same on every processor.
    """

    tolerance: float
    positions: int = 0
    same: int = 0
    clear: int = 0
    clear_same: int = 0

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Logits (positions, vocabulary) of both."""
        top = reference.topk(2, dim=-1).values
        clear = (top[:, 0] - top[:, 1]) > 2 * self.tolerance * reference.abs().max()
        equal = reference.argmax(-1) == other.argmax(-1)
        self.positions += len(equal)
        self.same += int(equal.sum())
        self.clear += int(clear.sum())
        self.clear_same += int((equal & clear).sum())

    def result(self, greedy: Mapping[str, int]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Facts and failures of a rung, from these choices and from those of `greedy_choices`."""
        failures = []
        if self.clear_same < self.clear:
            failures.append(f"{self.clear - self.clear_same} of {self.clear} clear top-1 choices differ")
        if greedy["different"]:
            failures.append(f"{greedy['different']} of {greedy['sequences']} greedy continuations differ")
        facts = {"top1_agreement": self.same / self.positions, "positions": self.positions}
        return {**facts, "clear_positions": self.clear, "greedy": dict(greedy)}, tuple(failures)


def rung_3(model: ProcrustesForCausalLM, runner: Runner, prompts: Sequence[Prompts], dtype: str = "float32") -> Rung:
    """PyTorch decoder vs the exported graph in ONNX Runtime: each with the cache, both against the full forward.

    The reference is one full forward of PyTorch in float32 over prompt and continuation. Held against it: the
    graph's own full forward, its prefill and its decode steps, and PyTorch's steps with the cache. Both must
    also choose the same tokens; a choice counts where the reference's first two logits are further apart than
    the tolerance allows to move them. Raises ArtifactError for a graph of a type that no tolerance is known for.
    """
    if dtype not in RUNTIME_TOLERANCE:
        raise ArtifactError(f"the graph is {dtype}, and parity in ONNX Runtime is defined for float32 and float16")
    tolerance = RUNTIME_TOLERANCE[dtype]
    cases: dict[str, float] = {}
    choices = Choices(tolerance)
    for prompt in prompts:
        ids, mask = prompt.continued()
        start = prompt.ids.shape[1]
        full = torch_logits(model, ids, mask)
        onnx_full = torch.as_tensor(runner.run_full(ids.numpy(), mask.numpy()))
        kept = onnx_full.shape[1]  # a graph made for serving gives the last position alone
        cases[f"{prompt.name}: full forward"] = relative_error(full[:, -kept:], onnx_full, mask[:, -kept:])
        cached = {"onnx": runner_steps(runner, ids, mask, start), "torch": _torch_steps(model, ids, mask, start)}
        for runtime, steps in cached.items():
            label = "" if runtime == "onnx" else " (PyTorch)"
            for kind, chosen in (("prefill", steps[:1]), ("decode with cache", steps[1:])):
                cases[f"{prompt.name}: {kind}{label}"] = worst(
                    relative_error(full[:, s : s + got.shape[1]], got, mask[:, s : s + got.shape[1]])
                    for s, got in chosen
                )
        where = mask[:, -kept:].bool()
        choices.add(full[:, -kept:][where], onnx_full[where])
    facts, failures = choices.result(greedy_choices(model, runner, prompts, tolerance))
    title = "PyTorch decoder vs ONNX Runtime"
    return Rung(3, title, worst(cases.values()), tolerance, cases, facts, failures)


def dense_export_error(model: ProcrustesForCausalLM, path: Path) -> float:
    """How far the dense export at `path` is from the dense model: the baseline of every speed-up is checked too.

    Raises ArtifactError when they are not the same model.
    """
    from export.runtime.ort import OrtRunner

    prompt = make_prompts(model.config.vocab_size, 16)[0]
    runner = OrtRunner(path)
    if runner.vocabulary != model.config.vocab_size:
        raise ArtifactError(f"{path} has {runner.vocabulary} tokens, the source model {model.config.vocab_size}")
    logits = torch.as_tensor(runner.run_full(prompt.ids.numpy(), prompt.mask.numpy()))
    kept = logits.shape[1]
    error = relative_error(torch_logits(model, prompt.ids, prompt.mask)[:, -kept:], logits, prompt.mask[:, -kept:])
    if not error <= max(RUNTIME_TOLERANCE.values()):
        raise ArtifactError(f"{path} is not the dense source model: its logits are off by {error:.2g}")
    return error


Steps = list[tuple[int, Tensor]]
"""(position of the first logits, logits (batch, positions, vocabulary)) of the prefill and of each decode step."""


def torch_logits(model: ProcrustesForCausalLM, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """Logits (batch, length, vocabulary) of one full forward, at the positions that the runners give."""
    positions = positions_from_mask(mask)
    with torch.inference_mode():
        logits: Tensor = model(ids, attention_mask=mask, position_ids=positions, use_cache=False, **options).logits
    return logits


def _torch_steps(model: ProcrustesForCausalLM, ids: Tensor, mask: Tensor, start: int) -> Steps:
    steps: Steps = []
    cache, position = None, 0
    for size in (start, *DECODE_CHUNKS):
        end = position + size
        given = {"attention_mask": mask[:, :end], "position_ids": positions_from_mask(mask)[:, position:end]}
        with torch.inference_mode():
            out = model(ids[:, position:end], **given, past_key_values=cache, use_cache=True)
        steps.append((position, out.logits))
        cache, position = out.past_key_values, end
    return steps


def runner_steps(runner: Runner, ids: Tensor, mask: Tensor, start: int) -> Steps:
    """A prefill of `start` tokens of ids (batch, length), then the others by DECODE_CHUNKS."""
    steps: Steps = []
    position = 0
    for size in (start, *DECODE_CHUNKS):
        end = position + size
        if position == 0:
            logits = torch.as_tensor(runner.prefill(ids[:, :end].numpy(), mask[:, :end].numpy()))
        else:
            logits = torch.as_tensor(runner.decode(ids[:, position:end].numpy()))
        steps.append((end - logits.shape[1], logits))
        position = end
    runner.reset()
    return steps


def greedy_choices(
    model: ProcrustesForCausalLM, runner: Runner, prompts: Sequence[Prompts], tolerance: float
) -> dict[str, int]:
    """Greedy continuations by both; one that parts at a near tie is counted as `ties`, not as different."""
    counts = {"sequences": 0, "equal": 0, "ties": 0, "different": 0}
    for prompt in prompts:
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(prompt.ids, prompt.mask, strict=True)]
        made = runner.generate(rows, max_new_tokens=GREEDY_TOKENS, eos=[])
        runner.reset()
        for row, tokens in zip(rows, made, strict=True):
            # One pass over what the runner chose: up to the first difference it is PyTorch's own path.
            ids = torch.tensor([row + tokens])
            logits = torch_logits(model, ids, torch.ones_like(ids))[0, len(row) - 1 : -1]  # (tokens, vocabulary)
            best = logits.argmax(-1)
            parted = (best != torch.tensor(tokens)).nonzero()
            counts["sequences"] += 1
            if len(parted) == 0:
                counts["equal"] += 1
                continue
            step = int(parted[0])
            gap = logits[step, best[step]] - logits[step, tokens[step]]
            counts["ties" if gap <= 2 * tolerance * logits[step].abs().max() else "different"] += 1
    return counts


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
