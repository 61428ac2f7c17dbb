"""Perplexity of the dense and the compressed model on the same windows, by the same code, in one pass.

    ppl = exp(sum over scored tokens of -log p(token | window so far) / number of scored tokens)

Beside it, on the same tokens: KL(dense || compressed) = sum_v p_v (log p_v - log q_v), and how often both
rank the same token first. Logits are made and dropped in slices of positions: memory does not grow with the
text.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from compress.calibration.gram import float32_products
from compress.errors import ArtifactError
from compress.progress import log
from validate.perplexity.windows import Windows

if TYPE_CHECKING:
    from compress.model.decoder import ProcrustesForCausalLM

POSITIONS_AT_ONCE = 128  # of a head
SCORED_AT_ONCE = 32  # positions: 6 MB of logits of 49152 tokens, which stay in the cache from step to step
LARGEST_NLL = 700.0  # nats per token; exp of more is no longer a float


class LogitsSource(Protocol):
    """Something that turns windows of tokens into logits."""

    runtime: str

    def slices(self, ids: Tensor) -> Iterator[Tensor]:
        """ids (batch, length) -> logits (batch, slice, vocabulary), slice after slice of positions."""
        ...


class TorchLogits:
    """The decoder in PyTorch; the head runs slice by slice.

    `wide_head`: the head's weights and logits in float32, whatever the decoder's type. bfloat16 rounds a logit of 20
    to the nearest 1/8.
    """

    runtime = "PyTorch"

    def __init__(self, model: ProcrustesForCausalLM, wide_head: bool = False) -> None:
        self.model = model
        self._wide = wide_head
        # A copy: a tied head is the embedding too, which stays what the decoder reads.
        self._head = copy.deepcopy(model.lm_head).float() if wide_head else model.lm_head

    # As a decorator it holds while the generator runs. A `with` around the yields would also hold in between, and
    # two generators read in turn would leave the caller without gradients.
    @torch.inference_mode()
    def slices(self, ids: Tensor) -> Iterator[Tensor]:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        hidden = self.model.model(ids, None, positions, None)  # (batch, length, d)
        for part in torch.split(hidden, POSITIONS_AT_ONCE, dim=1):
            with float32_products(exact=part.dtype == torch.bfloat16):
                rows = _rows(part.float() if self._wide else part)
                logits = self._head(rows).view(*part.shape[:2], -1)
            yield logits


class HiddenLogits:
    """Final hidden states that were computed before (validate/perplexity/hidden.py); only the head runs, in float32.

    `hidden` is (windows, length, d), what the head reads of each window of `windows`; `weight` (vocabulary, d) and
    `bias` are the head's.
    """

    runtime = "PyTorch, hidden states kept"

    def __init__(self, windows: Windows, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        self._hidden, self._weight, self._bias = hidden, weight.float(), bias if bias is None else bias.float()
        self._exact = weight.dtype == torch.bfloat16  # and then the hidden states are of that type, too
        # Found by their tokens, not by their order: another text, or other windows of it, cannot be scored by mistake.
        self._index = {ids.numpy().tobytes(): w for w, ids in windows.batches(1)}

    @torch.inference_mode()
    def slices(self, ids: Tensor) -> Iterator[Tensor]:
        rows = [self._index.get(window.numpy().tobytes()) for window in ids]
        if None in rows:
            raise ValueError("these tokens are not a window that the hidden states were computed for")
        for part in torch.split(self._hidden[rows], POSITIONS_AT_ONCE, dim=1):
            with float32_products(self._exact):
                logits = F.linear(_rows(part.float()), self._weight, self._bias).view(*part.shape[:2], -1)
            yield logits


def _rows(part: Tensor) -> Tensor:
    """(batch, slice, d) -> (batch slice, d). A slice of one longer sequence keeps that sequence's stride, with which
    torch 2.13 takes a path that is ten times slower."""
    return part.reshape(-1, part.shape[-1])


class OrtLogits:
    """The exported graph in ONNX Runtime; `runner` is an export.runtime.ort.OrtRunner."""

    runtime = "ONNX Runtime"

    def __init__(self, runner: Any) -> None:
        self.runner = runner

    def slices(self, ids: Tensor) -> Iterator[Tensor]:
        logits = torch.as_tensor(self.runner.run_full(ids.numpy()))
        yield from torch.split(logits, POSITIONS_AT_ONCE, dim=1)


@dataclass(frozen=True)
class Perplexity:
    """`mean_nll` in nats per token; `standard_error` is that of `mean_nll`, taken over windows."""

    perplexity: float
    mean_nll: float
    standard_error: float | None
    tokens: int
    windows: int


@dataclass(frozen=True)
class Comparison:
    """Both models, and how far apart they are. `relative_increase` = compressed / dense - 1.

    `kl` is the mean of KL(dense || compressed) in nats per token; `top1_agreement` is a fraction of tokens;
    `increase_standard_error` is that of the difference of the mean NLLs over windows: both score the same
    text, so it is much smaller than either one's own. Standard errors are None for a single window.
    """

    dense: Perplexity
    compressed: Perplexity
    relative_increase: float
    increase_standard_error: float | None
    kl: float
    kl_standard_error: float | None
    top1_agreement: float

    def to_dict(self) -> dict[str, Any]:
        """For quality.json."""
        return asdict(self)


def compare(dense: LogitsSource, compressed: LogitsSource, windows: Windows, batch_size: int = 1) -> Comparison:
    """Score every window with both models. Raises ArtifactError when a figure is NaN or infinite."""
    start = time.monotonic()
    kept: list[Tensor] = []  # per batch: (batch, 4) sums over scored tokens: nll dense, nll compressed, kl, same top-1
    for first, ids in windows.batches(batch_size):
        sums = torch.zeros(len(ids), 4, dtype=torch.float64)
        position = 0
        scored_from = [windows.scored_from(first + i) for i in range(len(ids))]
        for whole in _pairs(dense, compressed, ids):
            for a, b in zip(*(torch.split(x, SCORED_AT_ONCE, dim=1) for x in whole), strict=True):
                sums += _score(a, b, ids, position, scored_from)
                position += a.shape[1]
        kept.append(sums)
        count = first + len(ids)
        done = torch.cat(kept).sum(0) / _scored(windows, count)
        left = (time.monotonic() - start) / count * (windows.count - count)
        log(
            f"perplexity: window {count}/{windows.count}: dense {torch.exp(done[0]):.6g}, "
            f"compressed {torch.exp(done[1]):.6g}, {left:.0f} s left"
        )
    per_window = torch.cat(kept)  # (windows, 4)
    counts = torch.tensor([windows.length - windows.scored_from(w) for w in range(windows.count)]).double()
    means, errors = _means(per_window, counts)
    difference, difference_error = _means((per_window[:, 1] - per_window[:, 0])[:, None], counts)
    if not (bool(torch.isfinite(means).all()) and float(means[:2].max()) < LARGEST_NLL):
        raise ArtifactError(
            "a model's log-likelihood on this text is not finite: its weights are damaged, or compression "
            "broke the model altogether; compress it again"
        )
    tokens = int(counts.sum())

    def result(i: int) -> Perplexity:
        return Perplexity(math.exp(float(means[i])), float(means[i]), errors[i], tokens, windows.count)

    return Comparison(
        dense=result(0),
        compressed=result(1),
        relative_increase=math.exp(float(difference[0])) - 1.0,
        increase_standard_error=difference_error[0],
        kl=float(means[2]),
        kl_standard_error=errors[2],
        top1_agreement=float(means[3]),
    )


def worse_than_guessing(comparison: Comparison, vocab_size: int) -> list[str]:
    """A sentence for each model whose perplexity is above that of a uniform guess, the size of the vocabulary."""
    found = []
    if comparison.dense.perplexity > vocab_size:
        found.append(
            f"the perplexity of the dense model, {comparison.dense.perplexity:.4g}, is above the size of its "
            f"vocabulary, {vocab_size}: it is worse than guessing, so its tokenizer is another model's, its weights "
            f"are broken, or the text is nothing it was trained on; the comparison says nothing"
        )
    elif comparison.compressed.perplexity > vocab_size:
        found.append(
            f"the perplexity of the compressed model, {comparison.compressed.perplexity:.4g}, is above the size of its "
            f"vocabulary, {vocab_size}: it is worse than guessing; keep more of the weights, or calibrate on more text"
        )
    return found


def _pairs(dense: LogitsSource, compressed: LogitsSource, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both models' logits, slice by slice; a model that is compared with itself runs once."""
    if dense is compressed:
        yield from ((logits, logits) for logits in dense.slices(ids))
    else:
        yield from zip(dense.slices(ids), compressed.slices(ids), strict=True)


def _score(a: Tensor, b: Tensor, ids: Tensor, position: int, scored_from: list[int]) -> Tensor:
    """Sums over the scored tokens of one slice.

    a, b: logits (batch, slice, vocabulary) at `position`, ...; the logits at position t predict token t + 1.
    """
    length = ids.shape[1]
    span = min(a.shape[1], length - 1 - position)  # the last position predicts nothing
    if span <= 0:
        return torch.zeros(len(ids), 4, dtype=torch.float64)
    target = ids[:, position + 1 : position + 1 + span]  # (batch, span)
    token = torch.arange(position + 1, position + 1 + span)
    scored = token[None, :] >= torch.tensor(scored_from)[:, None]  # (batch, span)
    a, b = (x[:, :span].float() for x in (a, b))  # (batch, span, vocabulary)
    # By its parts: log_softmax of so long rows takes ten times as long as exp does here. With a' = a - max a and
    # Z_a = sum exp a': log p = a' - log Z_a, and KL = sum_v exp(a'_v) (a'_v - b'_v) / Z_a - log Z_a + log Z_b.
    (top_a, first_a), (top_b, first_b) = a.max(-1), b.max(-1)
    a, b = a - top_a[..., None], b - top_b[..., None]
    weights, sum_b = a.exp(), b.exp().sum(-1)
    sum_a = weights.sum(-1)
    nll_p, nll_q = (z.log() - x.gather(-1, target[..., None])[..., 0] for x, z in ((a, sum_a), (b, sum_b)))
    same = (first_a == first_b).double()
    kl = weights.mul_(a.sub_(b)).sum(-1) / sum_a - sum_a.log() + sum_b.log()
    figures = torch.stack([nll_p.double(), nll_q.double(), kl.double(), same], dim=-1)  # (batch, span, 4)
    return (figures * scored[..., None]).sum(1)


def _means(sums: Tensor, counts: Tensor) -> tuple[Tensor, list[float | None]]:
    """Mean per token and its standard error over windows; sums (windows, k), counts (windows,).

    The error is that of a ratio of sums: sqrt(n / (n - 1) sum_w (s_w - c_w mean)^2) / sum_w c_w; no error
    for one window.
    """
    mean = sums.sum(0) / counts.sum()
    n = len(counts)
    if n < 2:
        return mean, [None] * len(mean)
    spread = (sums - counts[:, None] * mean).square().sum(0) * n / (n - 1)
    return mean, [float(e) for e in spread.sqrt() / counts.sum()]


def _scored(windows: Windows, upto: int) -> int:
    return sum(windows.length - windows.scored_from(w) for w in range(upto))
