"""transformers' attention interface: eager and fused give the same logits, other functions are called with what the
caller gives, static caches and a compiled decode step are right, rotary frequencies are computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from compress.checkpoint.loading import load_model
from compress.checkpoint.rewritten import write_dense
from compress.model import blocks
from compress.model.blocks import RotaryFrequencies
from compress.model.decoder import ProcrustesForCausalLM
from tests import tiny
from tests.compress.helpers import TinyModel, relative, tiny_source

LENGTH = 24
IDS = tiny.token_ids(2, LENGTH)
PADDING = torch.ones(2, LENGTH, dtype=torch.int64)
PADDING[1, :5] = 0
FAMILIES = ["tiny_llama", "tiny_opt", "tiny_mistral", "tiny_qwen3"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(
    request: pytest.FixtureRequest, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> ProcrustesForCausalLM:
    folder = tmp_path_factory.mktemp("attention")
    write_dense(tiny_source(tiny_model, request.param), folder)
    return load_model(folder)


@pytest.fixture
def llama(tiny_model: TinyModel, tmp_path: Any) -> ProcrustesForCausalLM:
    write_dense(tiny_source(tiny_model, "tiny_llama"), tmp_path)
    return load_model(tmp_path)


def in_steps(model: Any, cache: Any, step: Any = None, prefill: int = 10) -> Tensor:
    """The logits of a prefill, of a few tokens more and of single ones, with no mask."""
    found = [model(IDS[:, :prefill], past_key_values=cache).logits]
    found.append(model(IDS[:, prefill : prefill + 3], past_key_values=cache).logits)
    for at in range(prefill + 3, LENGTH):
        found.append((model if step is None else step)(IDS[:, at : at + 1], past_key_values=cache).logits)
    return torch.cat(found, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("room", [LENGTH, 2 * LENGTH])
def test_a_static_cache_without_a_mask(model: ProcrustesForCausalLM, room: int, implementation: str) -> None:
    whole = model(IDS, use_cache=False).logits
    model.set_attn_implementation(implementation)
    try:
        found = in_steps(model, StaticCache(config=model.config, max_cache_len=room))
        first = in_steps(model, StaticCache(config=model.config, max_cache_len=room), prefill=1)
    finally:
        model.set_attn_implementation("sdpa")
    assert relative(found, whole) < 1e-5
    assert relative(first, whole) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_eager_is_fused(model: ProcrustesForCausalLM, masked: bool) -> None:
    mask = PADDING if masked else None
    fused = model(IDS, mask).logits
    model.set_attn_implementation("eager")
    try:
        eager = model(IDS, mask).logits
        cache = DynamicCache()
        model(IDS[:, :-1], None if mask is None else mask[:, :-1], past_key_values=cache)
        last = model(IDS[:, -1:], mask, past_key_values=cache).logits
    finally:
        model.set_attn_implementation("sdpa")
    kept = PADDING.bool() if masked else torch.ones_like(PADDING).bool()
    assert relative(eager[kept], fused[kept]) < 1e-5
    assert not torch.equal(eager, fused), "another function has run"
    assert relative(last, fused[:, -1:]) < 1e-5


@torch.no_grad()
def test_a_function_of_the_caller(model: ProcrustesForCausalLM) -> None:
    """As vLLM registers one: it is given each layer's module and what the caller gives `forward`."""
    calls: list[tuple[int, Any]] = []

    def recorded(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        arch = model.model.arch
        assert query.shape == (2, arch.num_heads, LENGTH, arch.head_dim)
        assert key.shape == value.shape == (2, arch.num_kv_heads, LENGTH, arch.head_dim)
        assert module.num_key_value_groups == arch.num_heads // arch.num_kv_heads
        assert module.config is model.config
        assert options["scaling"] == arch.head_dim**-0.5
        assert options["sliding_window"] == arch.sliding_window
        calls.append((module.layer_idx, options["instances"]))
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        if arch.sliding_window is not None:
            causal &= ~causal.tril(-arch.sliding_window)
        return sdpa_attention_forward(module, query, key, value, causal[None, None], **options)

    AttentionInterface.register("recorded", recorded)
    whole, given = model(IDS).logits, object()
    model.set_attn_implementation("recorded")
    try:
        found = model(IDS, instances=given, use_cache=False).logits
    finally:
        model.set_attn_implementation("sdpa")
    assert calls == [(layer, given) for layer in range(model.config.num_hidden_layers)]
    assert relative(found, whole) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("cache", ["static", pytest.param("growing", marks=pytest.mark.slow)])
def test_a_decode_step_compiles_as_one_graph(model: ProcrustesForCausalLM, cache: str) -> None:
    """Traced as it is compiled, with the graph run as it is."""
    torch._dynamo.reset()
    whole = model(IDS).logits
    step = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    held = StaticCache(config=model.config, max_cache_len=2 * LENGTH) if cache == "static" else DynamicCache()
    assert relative(in_steps(model, held, step, prefill=LENGTH - 6), whole) < 1e-5


@torch.no_grad()
@pytest.mark.slow
def test_a_compiled_decode_step(model: ProcrustesForCausalLM) -> None:
    torch._dynamo.reset()
    whole = model(IDS).logits
    step = torch.compile(model, fullgraph=True)
    held = StaticCache(config=model.config, max_cache_len=2 * LENGTH)
    assert relative(in_steps(model, held, step), whole) < 1e-5


@torch.no_grad()
def test_rotary_frequencies_are_computed_once(llama: ProcrustesForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llama(IDS).logits

    def again(arch: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(blocks, "rope_frequencies", again)
    assert torch.equal(llama(IDS).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rotary_frequencies_stay_in_float32(llama: ProcrustesForCausalLM, dtype: torch.dtype, tmp_path: Any) -> None:
    """Cast, emptied and loaded by transformers, they are those of the config."""
    computed, _ = blocks.rope_frequencies(llama.model.arch)
    llama.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    for each in (llama.to(dtype), loaded, llama.to("meta").to_empty(device="cpu")):
        rotary = each.model.rotary_frequencies
        assert isinstance(rotary, RotaryFrequencies)
        assert rotary.frequencies.dtype == torch.float32
        assert torch.equal(rotary.frequencies, computed)
    assert not [name for name in llama.state_dict() if "rotary" in name]
