"""Tiny random models for the validation tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from compress.architecture import Architecture
from compress.cli.entry import run_cli
from compress.model.config import ProcrustesConfig
from compress.model.decoder import ProcrustesForCausalLM
from compress.pipeline import compress_model
from compress.recipe import Calibration, Recipe
from compress.source.resolve import resolve
from compress.structures import Structure, structure_from_config
from export.graph.decoder import export_onnx
from tests import tiny
from validate.run import main as validate_main

MakeModel = Callable[..., ProcrustesForCausalLM]

LLAMA = Architecture(
    family="llama",
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=199,
    max_positions=128,
    norm="rmsnorm",
    norm_eps=1e-5,
    positions="rope",
    position_offset=0,
    rope={"rope_type": "default", "rope_theta": 10000.0},
    activation="silu",
    gated=True,
    attention_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tied=False,
    sliding_window=None,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
OPT = replace(
    LLAMA,
    family="opt",
    norm="layernorm",
    num_kv_heads=4,
    positions="learned",
    position_offset=2,
    rope=None,
    activation="relu",
    gated=False,
    attention_bias=True,
    output_bias=True,
    mlp_bias=True,
    tied=True,
)


def _structures(arch: Architecture, name: str) -> dict[str, Structure]:
    """Every linear at 3/4, by the structure of that name."""
    found = {}
    for layer in range(arch.num_layers):
        for role, (n, m) in arch.linears().items():
            if name == "kron":
                mix = "explicit" if role.startswith("attn") else "leading"
                config = {"structure": "kron", "blocks": 4, "terms": 3, "side": arch.side(role), "mix": mix}
            elif name == "gs":
                config = {"structure": "gs", "left_blocks": 2, "right_blocks": 2, "rank": 8}
            else:
                config = {"structure": name, "rank": 16}
            config |= {"in_features": m, "out_features": n}
            found[f"layers.{layer}.{role}"] = structure_from_config(config)
    return found


def _config(kind: str) -> ProcrustesConfig:
    base, _, variant = kind.partition("-")
    arch = {"llama": LLAMA, "opt": OPT}[base]
    if variant == "block":  # the published form: a rotation a position, skip matrices, a d x d map before the head
        return ProcrustesConfig.from_architecture(
            arch,
            _structures(arch, "kron"),
            rotation="block",
            skip="dense",
            head_map=True,
            center_embedding=True,
            tie_word_embeddings=True,
        )
    structures = _structures(arch, variant) if variant else {}
    return ProcrustesConfig.from_architecture(
        arch, structures, tie_word_embeddings=False, head_bias=base == "opt", rotation="shared"
    )


def fill(model: ProcrustesForCausalLM, seed: int = 0) -> None:
    """Random weights that keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = p.shape[-1] ** -0.5 if p.dim() > 1 and "embed" not in name else 1.0
            if name.endswith(".A"):
                p.copy_(torch.linalg.qr(torch.randn(p.shape[::-1], generator=generator))[0].T)
            else:
                p.copy_(scale * torch.randn(p.shape, generator=generator))


def build(kind: str, seed: int = 0) -> ProcrustesForCausalLM:
    """A model in eval mode; kinds: llama, opt, each with nothing, -kron, -gs, -lowrank, and opt-block."""
    model = ProcrustesForCausalLM(_config(kind))
    fill(model, seed)
    return model.requires_grad_(False).eval()


@pytest.fixture
def make_model() -> MakeModel:
    """`make_model(kind, seed=0)`, see `build`."""
    torch.set_num_threads(1)
    return build


@dataclass(frozen=True)
class Built:
    """A complete artefact without reports, its source folder and the text that it was calibrated on."""

    out: Path
    source: Path
    text: Path

    def copy(self, to: Path) -> Built:
        """For tests that write or damage."""
        shutil.copytree(self.out, to)
        return replace(self, out=to)

    def run(self, *flags: str) -> int:
        """`python -m validate.run` on it, as small as it can be; later flags override."""
        small = [flag for part, its in SMALL.items() if f"--skip {part}" not in " ".join(flags) for flag in its]
        return run_cli(validate_main, [str(self.out), "--model", str(self.source), *small, *flags])


SMALL = {
    "perplexity": ("--sequence-length", "64", "--max-windows", "4"),
    "speed": ("--prefill", "16", "--past", "8", "--batch-sizes", "1,2", "--seconds", "0.05"),
}
"""Part -> what makes it small; flags of a part that is skipped are refused."""


@pytest.fixture(scope="session")
def built(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A tied Llama at 3/4 of its size, mostly Kronecker, exported. Not to be changed: copy it first."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("validate")
    source, text, out = tiny_model("tiny_llama_tied"), root / "text.txt", root / "out"
    text.write_text(tiny.TEXT, encoding="utf-8")
    recipe = Recipe(
        structure="kron",
        inner=(),
        ratio=0.75,
        unit=16,
        sensitivity_samples=2,
        rotation_iterations=2,
        calibration=Calibration(data=str(text), samples=4, sequence_length=64),
    )
    artifact = compress_model(resolve(str(source)), recipe, out)
    with artifact.stage("onnx", inputs=["checkpoint"]) as folder:
        export_onnx(out / "checkpoint", folder)
    return Built(out, source, text)
