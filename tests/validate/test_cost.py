"""The cost model against work that is really counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compress.model.config import ProcrustesConfig
from compress.model.decoder import ProcrustesForCausalLM
from validate.cost import ModelCost, decode_limit, flops_limit

MakeModel = Callable[..., ProcrustesForCausalLM]
KINDS = ["llama", "llama-gs", "llama-kron", "llama-lowrank", "opt", "opt-block", "opt-kron"]


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_equal_those_of_the_model(kind: str, make_model: MakeModel) -> None:
    model = make_model(kind)
    cost = ModelCost.of(model.config)
    assert cost.parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_flops_equal_those_that_torch_counts(kind: str, make_model: MakeModel) -> None:
    model = make_model(kind)
    cost = ModelCost.of(model.config)
    batch, tokens = 2, 7
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(batch, tokens, dtype=torch.long), use_cache=False)
    counted = counter.get_total_flops()
    # torch counts matrix products alone: no rotary angles, no centre of a tied OPT (a matrix by a vector).
    assert sum(cost.flops(batch, tokens).values()) == counted


@pytest.mark.parametrize("kind", KINDS)
def test_decode_bytes_are_those_of_the_tensors_that_a_step_uses(kind: str, make_model: MakeModel) -> None:
    model = make_model(kind)
    arch = model.config.parsed_architecture()
    batch, past, size = 3, 11, 2
    used = 0
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.startswith("model.embed_"):
            used += batch * arch.hidden_size * size  # the rows of the batch's tokens
        else:
            used += tensor.numel() * (4 if name.endswith(".A") else size)
    read = batch * past * 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * size
    written = read // past
    counted = sum(ModelCost.of(model.config).decode_bytes(batch, past, torch.float16).values())
    assert counted == used + read + written


def test_limits_follow_from_the_counts_by_hand(make_model: MakeModel) -> None:
    """One layer, everything but the projections left out of the ratio by comparing the difference."""
    dense, compressed = (ModelCost.of(make_model(k).config) for k in ("llama", "llama-kron"))
    kept = compressed.projection_parameters() / dense.projection_parameters()
    assert kept < 0.8
    decode = decode_limit(dense, compressed, batch=1, past=0, dtype=torch.float32)
    saved = 4 * (dense.projection_parameters() - compressed.projection_parameters())
    assert decode.dense - decode.compressed == saved
    assert 1 < decode.speedup < 1 / kept
    one, all_ = (flops_limit(dense, compressed, 1, 64, logits=n) for n in (1, None))
    assert one.speedup > all_.speedup > 1  # a larger head in the count leaves less to gain


def test_config_round_trip_costs_the_same(make_model: MakeModel) -> None:
    model = make_model("opt-block")
    again = ProcrustesConfig.from_dict(model.config.to_dict())
    with torch.device("meta"):
        ProcrustesForCausalLM(again)
    assert ModelCost.of(again) == ModelCost.of(model.config)
