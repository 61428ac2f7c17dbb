"""Second moments at the residual stream: what readers read, what writers write, and how much the loss minds.

One forward pass over the calibration sequences, block by block, then (for `--sensitivity fisher`) one backward pass,
block by block from the last, each block recomputed from its stored input: memory is one block, its activations and
one memory-mapped stream per block. No weight is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from compress.architecture import WRITERS, Architecture
from compress.blocks import rms_normalise
from compress.invariance import FoldedModel, Rotations, Weights
from compress.progress import track
from compress.streams import GramSum, Runner, embed, mapped, save_whole

SUB_BLOCKS = ("attn", "mlp")
Biases = dict[str, Tensor | None]


@dataclass(frozen=True)
class StreamMoments:
    """Second moments of one sub-block, each (d, d) float64, in the unrotated stream.

    read: of the normalised stream that its readers see. write: of its writer's output without the bias (which no
    structure touches). read_gradients: for each reader, of W^T g, g the gradient at its output: what the loss minds of
    an error in what this reader alone sees. write_gradient: of the gradient at the writer's output. Gradients are
    those of the log-likelihood of labels sampled from the model (an unbiased estimate of the Fisher information);
    None when sensitivity is "none". inner: of the writer's input (inner, inner), None unless asked for.
    """

    read: Tensor
    write: Tensor
    read_gradients: dict[str, Tensor] | None
    write_gradient: Tensor | None
    inner: Tensor | None


def collect(
    model: FoldedModel,
    tokens: Tensor,
    *,
    sensitivity: str,
    inner: bool,
    seed: int,
    runner: Runner,
    state: Path,
) -> dict[tuple[int, str], StreamMoments]:
    """Moments of every sub-block, keyed by (layer, "attn" | "mlp").

    tokens: (samples, length) int64; `inner` also collects the moments of the writers' inputs. Files in `state`: one
    stream per block while this runs, then `moments.safetensors`, which a later call with the same state folder reads
    instead of running again.
    """
    file = state / "moments.safetensors"
    if not file.exists():
        moments = _forward(model, tokens, inner, runner, state)
        if sensitivity == "fisher":
            moments.update(_backward(model, tokens, seed, runner, state))
        save_whole(moments, file)
        for layer in range(model.arch.num_layers + 1):
            _stream_file(state, layer).unlink(missing_ok=True)
    loaded = load_file(file)
    return {
        (layer, sub): StreamMoments(
            loaded[f"{layer}.{sub}.in"],
            loaded[f"{layer}.{sub}.out"],
            _by_role(loaded, layer, model.arch.readers(sub)),
            loaded.get(f"{layer}.{sub}.out.gradient"),
            loaded.get(f"{layer}.{WRITERS[sub]}"),
        )
        for layer in range(model.arch.num_layers)
        for sub in SUB_BLOCKS
    }


def _by_role(loaded: dict[str, Tensor], layer: int, roles: tuple[str, ...]) -> dict[str, Tensor] | None:
    found = {role: loaded[f"{layer}.{role}.gradient"] for role in roles if f"{layer}.{role}.gradient" in loaded}
    return found or None


def _stream_file(state: Path, layer: int) -> Path:
    return state / f"dense-{layer}.f32"


def _stream_sums(arch: Architecture, runner: Runner) -> dict[str, GramSum]:
    d = arch.hidden_size
    return {f"{sub}.{place}": GramSum(d, d, runner.device) for sub in SUB_BLOCKS for place in ("in", "out")}


@torch.no_grad()
def _forward(model: FoldedModel, tokens: Tensor, inner: bool, runner: Runner, state: Path) -> dict[str, Tensor]:
    arch, shape = model.arch, (*tokens.shape, model.arch.hidden_size)
    stream = mapped(_stream_file(state, 0), shape)
    stream.copy_(embed(model.ends(Rotations.none()), arch, tokens))
    moments = {}
    for layer in track(range(arch.num_layers), description="calibrate"):
        block = runner.block(layer, model.block(layer), {}, skips=False)
        sums = _stream_sums(arch, runner)
        for writer in WRITERS.values() if inner else ():
            width = arch.linears()[writer][1]
            sums[writer] = GramSum(width, width, runner.device)
        biases: Biases = {"attn.out": block.attn.o.bias, "mlp.out": block.mlp.down.bias}

        def tap(place: str, value: Tensor, sums: dict[str, GramSum] = sums, biases: Biases = biases) -> None:
            if place in sums:
                bias = biases.get(place)
                sums[place].add(value if bias is None else value - bias)

        following = mapped(_stream_file(state, layer + 1), shape)
        for part, (x,) in runner.batches(stream):
            following[part] = block(x, runner.rotary, runner.mask, tap=tap).cpu()
        stream = following
        moments.update({f"{layer}.{place}": total.mean().cpu() for place, total in sums.items()})
    return moments


def _backward(model: FoldedModel, tokens: Tensor, seed: int, runner: Runner, state: Path) -> dict[str, Tensor]:
    arch, shape = model.arch, (*tokens.shape, model.arch.hidden_size)
    gradient = _head_gradient(model, mapped(_stream_file(state, arch.num_layers), shape), seed, runner)
    moments = {}
    for layer in track(range(arch.num_layers - 1, -1, -1), description="sensitivity"):
        weights = model.block(layer)
        block = runner.block(layer, weights, {}, skips=False)
        seen: dict[str, Tensor] = {}
        readers = {role: block.get_submodule(role) for sub in SUB_BLOCKS for role in arch.readers(sub)}
        for role, linear in readers.items():
            linear.register_forward_hook(_keep(seen, role))
        d = arch.hidden_size
        sums = {place: GramSum(d, d, runner.device) for place in (*readers, "attn.out", "mlp.out")}
        stream = mapped(_stream_file(state, layer), shape)
        for part, (x, upper) in runner.batches(stream, gradient):
            x.requires_grad_(True)
            y = block(x, runner.rotary, runner.mask, tap=seen.__setitem__)
            lower, *inner = torch.autograd.grad(y, [x, *(seen[p] for p in sums)], grad_outputs=upper)
            for place, value in zip(sums, inner, strict=True):
                sums[place].add(value @ weights[f"{place}.weight"].to(value) if place in readers else value)
            seen.clear()
            # Last: on the CPU `upper`, which is also the gradient at "mlp.out", is a view of this very memory.
            gradient[part] = lower.cpu()
        moments.update({f"{layer}.{place}.gradient": total.mean().cpu() for place, total in sums.items()})
    return moments


def _keep(seen: dict[str, Tensor], place: str) -> Callable[[torch.nn.Module, Any, Tensor], None]:
    """A forward hook that puts the module's output into `seen`."""

    def hook(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        seen[place] = output

    return hook


def _head_gradient(model: FoldedModel, stream: Tensor, seed: int, runner: Runner) -> Tensor:
    """Gradient of -log p(label) summed over a sequence's tokens, labels sampled from the model; shape of `stream`."""
    arch, ends = model.arch, {n: w.to(runner.device) for n, w in model.ends(Rotations.none()).items()}
    generator = torch.Generator(device=runner.device).manual_seed(seed)
    gradient = torch.empty_like(stream)
    for part, (x,) in runner.batches(stream):
        for i in range(len(x)):  # one sequence's logits at a time: (length, vocabulary) is large
            row = x[i].detach().requires_grad_(True)
            logits = head_logits(ends, arch.norm_eps, row)
            with torch.no_grad():
                labels = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)[:, 0]
            loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
            gradient[part.start + i] = torch.autograd.grad(loss, row)[0].cpu()
    return gradient


def head_logits(ends: Weights, eps: float, x: Tensor) -> Tensor:
    """Last norm, head map and head of a folded model: (..., d) -> (..., vocabulary)."""
    h = rms_normalise(x, eps)
    if "model.head_map.weight" in ends:
        weight = ends["model.head_map.weight"]
        h = h @ weight.T if weight.dim() == 2 else h * weight
        if "model.head_map.bias" in ends:
            h = h + ends["model.head_map.bias"]
    logits = h @ ends.get("lm_head.weight", ends["model.embed_tokens.weight"]).T
    return logits + ends["lm_head.bias"] if "lm_head.bias" in ends else logits
