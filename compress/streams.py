"""Running a decoder block by block over all calibration tokens, without ever holding the whole model.

The residual stream of every calibration token is the only state: (samples, length, d) float32, in memory-mapped
files, so that a run can be resumed and large calibration sets do not need as much memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from compress.architecture import Architecture
from compress.model.blocks import Block, Rotary, rotary_for
from compress.model.masks import mask_unless_causal
from compress.model.skips import SkipForm
from compress.rewrites.rotations import Weights
from compress.structures import Structure


class Runner:
    """Runs blocks over the calibration sequences in batches of `batch` on `device`.

    `fast` multiplies in bfloat16 where blocks are run (`computing`): stream, norms and second moments stay in float32.
    """

    def __init__(self, arch: Architecture, length: int, device: torch.device, batch: int, fast: bool = False) -> None:
        self.arch, self.length, self.device, self.batch, self.fast = arch, length, device, batch, fast
        positions = torch.arange(length, device=device)[None]
        self._rotary = rotary_for(arch, positions)
        self._mask = mask_unless_causal(None, 1, 0, length, arch.sliding_window, device)

    @property
    def rotary(self) -> Rotary | None:
        """cos and sin of the sequence, the same for all batches."""
        return self._rotary

    @property
    def mask(self) -> Tensor | None:
        """The mask of `mask_unless_causal`: (1, 1, length, length), or None for the plain causal one."""
        return self._mask

    def computing(self) -> torch.autocast:
        """The context in which blocks are run."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.fast)

    def gram(self, rows: int, columns: int | None = None) -> GramSum:
        """A sum of second moments of what runs here, (rows, columns); columns = rows when not given."""
        return GramSum(rows, rows if columns is None else columns, self.device, self.fast)

    def batches(self, *streams: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """Slices of the sequences with the streams' parts on the device."""
        for start in range(0, len(streams[0]), self.batch):
            part = slice(start, start + self.batch)
            yield part, tuple(stream[part].to(self.device) for stream in streams)

    def block(
        self,
        layer: int,
        weights: Weights,
        structures: Mapping[str, Structure],
        skips: Sequence[SkipForm] | bool,
        biases: Collection[str] = (),
    ) -> Block:
        """One block with its weights on the device; `weights` may hold less than all of them. biases: as `Block`."""
        with torch.device("meta"):
            block = Block(self.arch, structures, layer, skips, biases)
        block.load_state_dict({n: w.to(self.device) for n, w in weights.items()}, assign=True, strict=False)
        return block.requires_grad_(False).eval()


def embed(ends: Weights, arch: Architecture, tokens: Tensor) -> Tensor:
    """The residual stream at the first block, (samples, length, d) float32, from folded (and rotated) embeddings."""
    if "model.embed_tokens.U" in ends:  # compressed, see compress/embedding.py
        x = ends["model.embed_tokens.U"][tokens].float() @ ends["model.embed_tokens.R"].float()
    else:
        x = ends["model.embed_tokens.weight"][tokens].float()
    if "model.embed_positions.weight" in ends:
        positions = torch.arange(tokens.shape[1]) + arch.position_offset
        x = x + ends["model.embed_positions.weight"][positions].float()
    if "model.center" in ends:
        u = ends["model.center"].float()
        x = x - (x @ u)[..., None] * u
    return x


SYMMETRIC_BLOCK = 384  # columns of a second moment at a time: 1536 features take 5/8 of the products


class GramSum:
    """Accumulates sum of x^T y / tokens: float32 products of each batch, a float64 sum. (rows, columns).

    fast: the numbers are rounded to bfloat16, as where a product of `Runner.computing` reads them, so that G is exactly
    the one of what the linears see; the products of such numbers are exact and are still summed in float32.
    """

    def __init__(self, rows: int, columns: int, device: torch.device, fast: bool = False) -> None:
        self.fast = fast
        self.total = torch.zeros(rows, columns, dtype=torch.float64, device=device)
        self.sums = torch.zeros(rows, dtype=torch.float64, device=device)
        self.tokens, self.symmetric = 0, False

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """x (..., rows) and y (..., columns), y = x when not given."""
        left = self._rows(x)
        right = left if y is None else self._rows(y)
        with torch.autocast(left.device.type, enabled=False), float32_products(exact=self.fast):
            if y is None:  # symmetric: the lower blocks are enough
                for start in range(0, left.shape[1], SYMMETRIC_BLOCK):
                    block = slice(start, start + SYMMETRIC_BLOCK)
                    self.total[start:, block] += (left[:, start:].T @ left[:, block]).double()
            else:
                self.total += (left.T @ right).double()
        self.symmetric = y is None
        self.sums += left.sum(0).double()  # float32 within a batch: seven times as fast as float64
        self.tokens += len(left)

    def mean(self) -> Tensor:
        """The second moment per token, float64."""
        whole = self.total
        if self.symmetric:
            lower = whole.tril()
            whole = lower + lower.T - lower.diagonal().diag()
        return whole / max(self.tokens, 1)

    def first(self) -> Tensor:
        """The mean of x (rows,), float64."""
        return self.sums / max(self.tokens, 1)

    def _rows(self, x: Tensor) -> Tensor:
        """(tokens, features), float32 at the least."""
        x = x.reshape(-1, x.shape[-1])
        x = x.bfloat16() if self.fast else x
        return x.float() if x.dtype.itemsize < 4 else x


@contextmanager
def float32_products(exact: bool) -> Iterator[None]:
    """Products of float32 matrices. `exact`: of numbers that bfloat16 holds, so that its units may multiply them: the
    products are the same, and their sums are float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if exact else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
