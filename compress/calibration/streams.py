"""Running a decoder block by block over all calibration tokens, without ever holding the whole model.

The residual stream of every calibration token is the only state: (samples, length, d) float32, in memory-mapped
files, so that a run can be resumed and large calibration sets do not need as much memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from compress.architecture import Architecture
from compress.calibration.gram import GramSum
from compress.errors import MissingDependencyError, UsageError
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
    if "model.embed_tokens.U" in ends:  # compressed, see compress/fit/embedding.py
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


def torch_device(name: str) -> torch.device:
    """The device called `name`; exit 4 when this machine lacks it, exit 2 when there is no such name."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name!r} is no device: cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name!r} is not supported: cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MissingDependencyError(
            f"--device {name}: this PyTorch sees {torch.cuda.device_count()} CUDA GPUs; use --device cpu, or install "
            f"a CUDA build"
        )
    return device
