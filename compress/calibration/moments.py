"""Second moments at every linear: what it reads, and what an error of its output costs the loss.

One forward pass over the calibration sequences, block by block, then (for `--sensitivity fisher`) one backward pass,
block by block from the last, each block recomputed from its stored input: memory is one block, its activations and
one memory-mapped stream per block. No weight is trained. Everything found is kept in one file per block and pass,
as it is found, and read from there when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.architecture import SUB_BLOCKS, WRITERS, Architecture
from compress.artifact.ledger import KeptFolder
from compress.artifact.locking import locked
from compress.artifact.state import mapped, mapped_anew, save_whole
from compress.artifact.versions import versions
from compress.calibration.gradients import head_input, head_of, sample
from compress.calibration.gram import GramSum
from compress.calibration.streams import Runner, embed
from compress.errors import ArtifactError, UsageError
from compress.linalg import all_finite
from compress.model.blocks import rms_normalise
from compress.progress import track
from compress.rewrites.folding import FoldedModel
from compress.rewrites.inner import InnerRewrites
from compress.rewrites.rotations import Rotations

FINAL = "final.safetensors"
POSITIONS = 128  # whose logits are in memory at a time
LARGEST = 1e15  # squares of activations are summed in float32


@dataclass(frozen=True)
class StreamMoments:
    """Second moments of one sub-block, float64, in the unrotated stream.

    read (d, d): of the normalised stream that its readers see. inner (inner, inner): of the writer's input. gradients:
    for each linear of the sub-block, readers first, of the gradient at its output, (out, out): those of the
    log-likelihood of labels sampled from the model (an unbiased estimate of the Fisher information); None when
    sensitivity is not "fisher".
    """

    read: Tensor
    inner: Tensor
    gradients: dict[str, Tensor] | None

    def rewritten(self, rewrites: InnerRewrites, arch: Architecture, layer: int, sub_block: str) -> StreamMoments:
        """The moments of the model after these rewrites of its inner features."""
        inner, found = rewrites.input_moment(self.inner, arch, layer, WRITERS[sub_block]), self.gradients
        if found is not None:
            found = {role: rewrites.gradient_moment(h, arch, layer, role) for role, h in found.items()}
        return StreamMoments(self.read, inner, found)

    def gram(self, role: str) -> Tensor:
        """Second moment of the input of `role`: `inner` for a writer, `read` for the others."""
        return self.inner if role in WRITERS.values() else self.read


class StatisticsFolder(Mapping[tuple[int, str], StreamMoments]):
    """The moments of all sub-blocks, keyed by (layer, "attn" | "mlp"), read from their files at each access."""

    def __init__(self, folder: Path, arch: Architecture, sensitivity: str) -> None:
        self.folder, self.arch, self.sensitivity = folder, arch, sensitivity

    def __getitem__(self, key: tuple[int, str]) -> StreamMoments:
        layer, sub = key
        if sub not in SUB_BLOCKS or not 0 <= layer < self.arch.num_layers:
            raise KeyError(key)
        read, inner = self._read(_forward_file(layer), [f"{sub}.in", f"{sub}.inner"])
        gradients = None
        if self.sensitivity == "fisher":
            roles = (*self.arch.readers(sub), WRITERS[sub])
            gradients = dict(zip(roles, self._read(_backward_file(layer), roles), strict=True))
        return StreamMoments(read, inner, gradients)

    def _read(self, name: str, keys: Sequence[str]) -> list[Tensor]:
        path = self.folder / name
        try:
            with safe_open(path, framework="pt") as file:
                return [file.get_tensor(key).double() for key in keys]
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"{path} was removed or changed while it was in use ({error}); run the same command again"
            ) from error

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return ((layer, sub) for layer in range(self.arch.num_layers) for sub in SUB_BLOCKS)

    def __len__(self) -> int:
        return 2 * self.arch.num_layers

    def final(self) -> Tensor:
        """Second moment (d, d) of the normalised stream that the head reads."""
        return self._read(FINAL, ["gram"])[0]


def collect(
    model: FoldedModel, tokens: Tensor, *, sensitivity: str, seed: int, runner: Runner, kept: KeptFolder
) -> StatisticsFolder:
    """Moments of every sub-block of the dense model on `tokens`, int64 (samples, length).

    Written to `kept`, one stream per block beside them while this runs; a later call with the same folder goes on at
    the block, of either pass, where an interrupted one stopped, and computes nothing where that was complete.
    """
    _forward(model, tokens, runner, kept, backward=sensitivity == "fisher")
    if sensitivity == "fisher":
        _backward(model, tokens, seed, runner, kept)
    return StatisticsFolder(kept.folder, model.arch, sensitivity)


@contextmanager
def shared_folder(folder: Path) -> Iterator[KeptFolder]:
    """The pieces kept in `folder` for all runs that need the same moments; one process at a time, the others wait.

    Raises UsageError where the folder cannot be made, and as `KeptFolder.open`.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{folder.parent} is not, or is not in, a folder; choose another --statistics") from None
    with locked(folder.parent, f".lock-{folder.name}", wait=True):
        yield KeptFolder.open(folder, {"statistics": folder.name, "versions": versions()})


def _forward_file(layer: int) -> str:
    return f"forward-{layer}.safetensors"


def _backward_file(layer: int) -> str:
    return f"backward-{layer}.safetensors"


def _stream_file(layer: int) -> str:
    return f"dense-{layer}.f32"


def _gradient_file(layer: int) -> str:
    """File of the gradient at the entry of block `layer`; layers + 1 of them, the last of the head."""
    return f"gradient-{layer}.f32"


@torch.no_grad()
def _forward(model: FoldedModel, tokens: Tensor, runner: Runner, kept: KeptFolder, backward: bool) -> None:
    """Collect the moments of the forward pass. `backward`: the streams stay, for a backward pass."""
    arch, shape = model.arch, (*tokens.shape, model.arch.hidden_size)
    if FINAL in kept:
        return
    if _stream_file(0) not in kept and _forward_file(0) not in kept:
        stream = mapped_anew(kept.path(_stream_file(0)), shape)
        stream.copy_(embed(model.ends(Rotations.none()), arch, tokens))
        _require_finite(stream, "the token embedding")
        kept.keep(_stream_file(0))
    for layer in track(range(arch.num_layers), description="calibrate"):
        if _forward_file(layer) in kept:
            continue
        stream = mapped(kept.path(_stream_file(layer)), shape)
        following = mapped_anew(kept.path(_stream_file(layer + 1)), shape)
        sums = _run_forward(model, layer, stream, following, runner)
        means = {place: total.mean().float().cpu() for place, total in sums.items()}
        save_whole(means, kept.path(_forward_file(layer)))
        spent = () if backward else (_stream_file(layer),)
        kept.keep(_forward_file(layer), _stream_file(layer + 1), drop=spent)
    last = _stream_file(arch.num_layers)
    final = runner.gram(arch.hidden_size)
    for _, (x,) in runner.batches(mapped(kept.path(last), shape)):
        final.add(rms_normalise(x, arch.norm_eps))
    save_whole({"gram": final.mean().float().cpu()}, kept.path(FINAL))
    kept.keep(FINAL, drop=() if backward else (last,))


def _run_forward(
    model: FoldedModel, layer: int, stream: Tensor, following: Tensor, runner: Runner
) -> dict[str, GramSum]:
    """Take the stream through block `layer`; the moments by place."""
    arch, block = model.arch, runner.block(layer, model.block(layer), {}, skips=False)
    sums, places = dict[str, GramSum](), dict[str, str]()
    for sub, writer in WRITERS.items():
        d, inner = arch.linears()[writer]
        for place, tapped, width in (("in", f"{sub}.in", d), ("inner", writer, inner)):
            sums[f"{sub}.{place}"] = runner.gram(width)
            places[tapped] = f"{sub}.{place}"

    def tap(place: str, value: Tensor) -> None:
        _require_finite(value, f"layers.{layer}, {place}")
        if place in places:
            sums[places[place]].add(value)

    for part, (x,) in runner.batches(stream):
        with runner.computing():
            following[part] = block(x, runner.rotary, runner.mask, tap=tap).cpu()
    return sums


def _backward(model: FoldedModel, tokens: Tensor, seed: int, runner: Runner, kept: KeptFolder) -> None:
    arch, shape = model.arch, (*tokens.shape, model.arch.hidden_size)
    first, last = _backward_file(0), _backward_file(arch.num_layers - 1)
    top, stream_file = _gradient_file(arch.num_layers), _stream_file(arch.num_layers)
    if first in kept:
        return
    if top not in kept and last not in kept:
        gradient = mapped_anew(kept.path(top), shape)
        _head_gradient(model, mapped(kept.path(stream_file), shape), seed, runner, gradient)
        kept.keep(top, drop=[stream_file])
    for layer in track(range(arch.num_layers - 1, -1, -1), description="sensitivity"):
        if _backward_file(layer) in kept:
            continue
        block = runner.block(layer, model.block(layer), {}, skips=False)
        seen: dict[str, Tensor] = {}
        sums = {role: runner.gram(n) for role, (n, _) in arch.linears().items()}
        for role in sums:
            block.get_submodule(role).register_forward_hook(_keep(seen, role))
        stream = mapped(kept.path(_stream_file(layer)), shape)
        above = mapped(kept.path(_gradient_file(layer + 1)), shape)
        below = mapped_anew(kept.path(_gradient_file(layer)), shape) if layer else None
        for part, (x, upper) in runner.batches(stream, above):
            x.requires_grad_(True)
            with runner.computing():
                y = block(x, runner.rotary, runner.mask)
            lower, *found = torch.autograd.grad(y, [x, *(seen[role] for role in sums)], grad_outputs=upper)
            for total, value in zip(sums.values(), found, strict=True):
                total.add(value)
            seen.clear()
            if below is not None:
                below[part] = lower.cpu()
        means = {role: total.mean().float().cpu() for role, total in sums.items()}
        for role, moment in means.items():
            if not all_finite(moment):
                raise UsageError(
                    f"the gradients at layers.{layer}.{role} are NaN or beyond the range of float32: use --sensitivity "
                    f"measured or none, which need no backward pass"
                )
        save_whole(means, kept.path(_backward_file(layer)))
        fresh = (_backward_file(layer), *(() if below is None else (_gradient_file(layer),)))
        kept.keep(*fresh, drop=(_gradient_file(layer + 1), _stream_file(layer)))


def _require_finite(value: Tensor, place: str) -> None:
    """Raise UsageError when activations are NaN or infinite, or too large for their second moment."""
    least, most = (float(x) for x in value.aminmax())  # NaN where there is one
    largest = max(-least, most) if least == least else least
    if not largest < LARGEST:
        raise UsageError(
            f"the calibration activations of the source model reach {largest:g} at {place}, which is no number to fit "
            f"by: its weights are damaged or it overflows; check the model"
        )


def _keep(seen: dict[str, Tensor], place: str) -> Callable[[torch.nn.Module, Any, Tensor], None]:
    """A forward hook that puts the module's output into `seen`."""

    def hook(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        seen[place] = output

    return hook


def _head_gradient(model: FoldedModel, stream: Tensor, seed: int, runner: Runner, gradient: Tensor) -> None:
    """Write into `gradient`, of the shape of `stream`, that of -log p(label) summed over a sequence's tokens, labels
    sampled from the model."""
    arch, ends = model.arch, {n: w.to(runner.device) for n, w in model.ends(Rotations.none()).items()}
    generator = torch.Generator(device=runner.device).manual_seed(seed)
    weight = ends.get("lm_head.weight", ends["model.embed_tokens.weight"])  # (vocabulary, d)
    count = -(-len(stream) // runner.batch)
    for part, (x,) in track(runner.batches(stream), description="gradients of the head", total=count):
        for i in range(len(x)):
            row = x[i].detach().requires_grad_(True)
            read, slopes = head_input(ends, arch.norm_eps, row), list[Tensor]()
            for h in torch.split(read.detach(), POSITIONS):  # (positions, vocabulary) is large
                logits = head_of(ends, h)
                _require_finite(logits, "the logits")
                slope = logits.float().softmax(-1)  # of -log p(label) in the logits: p, less 1 at the label
                labels = sample(slope, generator)
                slope[torch.arange(len(slope), device=slope.device), labels] -= 1
                slopes.append(slope.to(weight.dtype) @ weight)
            gradient[part.start + i] = torch.autograd.grad(read, row, grad_outputs=torch.cat(slopes))[0].cpu()


Moments = Mapping[tuple[int, str], StreamMoments]
