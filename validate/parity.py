"""The parity ladder, rungs 1 to 3: each says how far two forms of the same model are apart.

    1  source model               vs  folded and rotated decoder, uncompressed    the rewrites are exact
    2  layers applied in factors  vs  their dense equivalents                     factored products are right
    3  PyTorch decoder            vs  ONNX Runtime, with and without the cache    the export is right

Rungs 1 and 3 compare logits, by max |a - b| / max |a| over the positions that are not padding, on a
left-padded batch, a whole sequence and a sequence of length 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.modeling import positions_from_mask
from compress.progress import track

if TYPE_CHECKING:
    from compress.checkpoint import CheckpointReader
    from compress.modeling import ProcrustesForCausalLM

REWRITE_TOLERANCE = 1e-4
# Float32 sums of up to some 20,000 products in another order: about 1e-6 of the largest output. A factor that
# is misplaced or wrong in one value of its largest hundredth is far above 1e-5.
FACTOR_TOLERANCE = 1e-5
FACTOR_TOKENS = 16


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
    """A left-padded batch: ids and mask, both (batch, length); mask is 0 on padding."""

    name: str
    ids: Tensor
    mask: Tensor


def make_prompts(vocab_size: int, longest: int, tokens: Tensor | None = None, seed: int = 0) -> list[Prompts]:
    """A left-padded batch of four lengths, one sequence of full length, and one of length 1.

    `tokens` (n,) is where the ids are taken from, text for instance; without it they are random.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = (longest, max(1, longest // 2), max(1, longest // 5), 1)
    if tokens is None or len(tokens) < 4 * longest:
        tokens = torch.randint(vocab_size, (8 * longest,), generator=generator)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = tokens[row * longest : row * longest + length]
        mask[row, longest - length :] = 1
    whole = tokens[None, :longest].clone()
    single = tokens[None, longest : longest + 1].clone()
    return [
        Prompts("left-padded batch", ids, mask),
        Prompts("one sequence", whole, torch.ones_like(whole)),
        Prompts("length 1", single, torch.ones_like(single)),
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
        factors = {k: v.float() for k, v in reader.factors(linear).items()}
        x = torch.randn(FACTOR_TOKENS, structure.in_features, generator=generator)
        x[:, ::64] *= 10.0
        exact = x.double() @ structure.dense({k: v.double() for k, v in factors.items()}).T
        errors[linear] = worst(
            relative_error(exact[:rows], structure.apply(factors, x[:rows])) for rows in (FACTOR_TOKENS, 1)
        )
    by_kind: dict[str, float] = {}
    for linear, error in errors.items():
        kind = reader.structure(linear).name
        by_kind[kind] = worst([by_kind.get(kind, 0.0), error])
    facts = {"layers": len(errors), "dense_layers": len(reader.linears()) - len(errors)}
    if errors:
        facts["worst_layer"] = max(errors, key=lambda n: math.inf if math.isnan(errors[n]) else errors[n])
    title = "layers in factors vs their dense equivalents"
    return Rung(2, title, worst([0.0, *errors.values()]), FACTOR_TOLERANCE, by_kind, facts)


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
