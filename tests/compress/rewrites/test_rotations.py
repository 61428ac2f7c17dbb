"""Folding and rotating change nothing: every tiny model against transformers' own forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.checkpoint.loading import load_model
from compress.checkpoint.reader import read_rotations
from compress.checkpoint.rewritten import write_rewritten
from compress.rewrites.rotations import Rotations, orthogonality_error, unrotate
from compress.source.resolve import resolve
from tests import tiny


def random_rotations(kind: str, width: int, layers: int) -> Rotations:
    generator = torch.Generator().manual_seed(7)
    count = {"none": 0, "shared": 1, "block": 2 * layers + 1}[kind]
    matrices = [torch.randn(width, width, generator=generator, dtype=torch.float64) for _ in range(count)]
    return Rotations(kind, tuple(torch.linalg.qr(m).Q for m in matrices))


def left_padded(vocab: int) -> tuple[Tensor, Tensor]:
    """Two prompts of 9 and 5 tokens, the second padded on the left."""
    ids = torch.randint(0, vocab, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    return ids, mask


def in_full_precision(model: nn.Module) -> None:
    """transformers' RMSNorm rounds to float32 whatever the model's dtype; compute it in the input's own here."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            norm = module

            def forward(x: Tensor, norm: nn.Module = norm) -> Tensor:
                scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
                return norm.weight * x * scale

            module.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["none", "shared", "block"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_rewritten_model_gives_the_same_logits(
    tiny_model_dir: Path, tmp_path: Path, kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    source = resolve(str(tiny_model_dir))
    arch = source.architecture()
    rotations = random_rotations(kind, arch.hidden_size, arch.num_layers)
    write_rewritten(source, rotations, tmp_path, dtype)
    ours, reference = load_model(tmp_path, dtype), source.reference_model(dtype)
    if dtype == torch.float64:
        in_full_precision(reference)
    ids, mask = left_padded(arch.vocab_size)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask, position_ids=position_ids).logits
        seen = ours(ids, attention_mask=mask, position_ids=position_ids).logits
    real = mask.bool()
    error = (seen - expected)[real].abs().max() / expected[real].abs().max()
    assert error < tolerance
    assert expected[real].std() > 0.1  # degenerate logits would compare equal whatever we did


def test_a_wrong_rotation_is_seen(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = resolve(str(tiny_model_dir))
    arch = source.architecture()
    q = random_rotations("shared", arch.hidden_size, arch.num_layers).matrices[0]
    write_rewritten(source, Rotations("shared", (q * 1.01,)), tmp_path, torch.float64)
    ids, mask = left_padded(arch.vocab_size)
    with torch.no_grad():
        expected = source.reference_model(torch.float64)(ids, attention_mask=mask).logits
        seen = load_model(tmp_path, torch.float64)(ids, attention_mask=mask).logits
    assert (seen - expected)[mask.bool()].abs().max() > 1e-3 * expected.abs().max()


def test_tied_embeddings_stay_tied(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = resolve(str(tiny_model_dir))
    arch = source.architecture()
    write_rewritten(source, random_rotations("shared", arch.hidden_size, arch.num_layers), tmp_path)
    model = load_model(tmp_path)
    same = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert same == arch.tied


def test_rotations_survive_the_disk(tmp_path: Path, tiny_model: object) -> None:
    source = resolve(str(tiny_model("tiny_llama")))  # type: ignore[operator]
    rotations = random_rotations("block", 64, source.architecture().num_layers)
    if source.architecture().hidden_size != 64:
        rotations = random_rotations("block", source.architecture().hidden_size, source.architecture().num_layers)
    write_rewritten(source, rotations, tmp_path)
    back = read_rotations(tmp_path)
    assert back.kind == "block"
    assert all(torch.equal(a, b) for a, b in zip(back.matrices, rotations.matrices, strict=True))
    assert orthogonality_error(back.matrices) < 1e-12


def test_unrotate_inverts(tmp_path: Path) -> None:
    q = random_rotations("shared", 8, 1).matrices[0]
    reader, writer = torch.randn(5, 8, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    torch.testing.assert_close(unrotate(reader @ q, "in", q), reader)
    torch.testing.assert_close(unrotate(q.T @ writer, "out", q), writer)


def test_every_tiny_model_is_covered() -> None:
    assert len(tiny.CONFIGS) >= 8
