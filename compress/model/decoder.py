"""The compressed causal LM in PyTorch, and its config: what `AutoModelForCausalLM.from_pretrained` loads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, sliding_window_overlay
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compress.errors import UsageError
from compress.model.attention import eager_attention
from compress.model.blocks import Attend, Block, Rotary, RotaryFrequencies, rms_normalise
from compress.model.config import ProcrustesConfig
from compress.model.masks import check_mask, mask_unless_causal, positions_for


class HeadMap(nn.Module):
    """What the last norm's scale gamma (and shift) become before a tied head: Q^T diag(gamma) Q, or gamma itself.

    The scale can only be folded into a head of its own; a tied head stays tied and pays this instead: d x d
    where the stream is rotated, a vector (d,) where it is not.
    """

    def __init__(self, width: int, diagonal: bool, bias: bool) -> None:
        super().__init__()
        shape = (width,) if diagonal else (width, width)
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(width), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 2:
            return F.linear(x, self.weight, self.bias)
        scaled = x * self.weight
        return scaled if self.bias is None else scaled + self.bias


class FactoredEmbedding(nn.Module):
    """Rows of E = U R, U (vocabulary, rank) and R (rank, d): (...) ids -> (..., d)."""

    def __init__(self, vocabulary: int, width: int, rank: int) -> None:
        super().__init__()
        self.U = nn.Parameter(torch.empty(vocabulary, rank), requires_grad=False)
        self.R = nn.Parameter(torch.empty(rank, width), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.U) @ self.R


class FactoredHead(FactoredEmbedding):
    """h E^T (+ bias) with E = U R: (..., d) -> (..., vocabulary)."""

    def __init__(self, vocabulary: int, width: int, rank: int, bias: bool) -> None:
        super().__init__(vocabulary, width, rank)
        self.bias = nn.Parameter(torch.empty(vocabulary), requires_grad=False) if bias else None

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(F.linear(h, self.R), self.U, self.bias)


class Decoder(nn.Module):
    """Embeddings, blocks and the last norm."""

    def __init__(self, config: ProcrustesConfig) -> None:
        super().__init__()
        self.config = config
        self.arch = arch = config.parsed_architecture()
        structures = config.parsed_structures()
        self.embed_tokens: nn.Module = nn.Embedding(arch.vocab_size, arch.hidden_size)
        rank, _ = config.parsed_ranks()
        if rank:
            self.embed_tokens = FactoredEmbedding(arch.vocab_size, arch.hidden_size, rank)
        if arch.positions == "learned":
            self.embed_positions = nn.Embedding(arch.max_positions + arch.position_offset, arch.hidden_size)
        if config.center_embedding:
            self.center = nn.Parameter(torch.empty(arch.hidden_size), requires_grad=False)
        skips, biases = config.parsed_skips(), config.parsed_extra_biases()
        blocks = [Block(arch, structures, i, skips[2 * i : 2 * i + 2], biases) for i in range(arch.num_layers)]
        for block in blocks:
            block.attn.config = config  # for attention functions that look there
        self.layers = nn.ModuleList(blocks)
        self.rotary_frequencies = RotaryFrequencies(arch) if arch.positions == "rope" else None
        self.head_map: HeadMap | None = None
        if config.head_map:
            self.head_map = HeadMap(arch.hidden_size, config.rotation == "none", arch.norm == "layernorm")

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """(batch, length) ids -> (batch, length, d)."""
        x: Tensor = self.embed_tokens(input_ids)
        if self.arch.positions == "learned":
            x = x + self.embed_positions(position_ids + self.arch.position_offset)
        if hasattr(self, "center"):
            x = x - (x @ self.center)[..., None] * self.center
        return x

    def rotary(self, position_ids: Tensor) -> Rotary | None:
        """cos and sin for (batch, length) positions, or None for learned positions."""
        return None if self.rotary_frequencies is None else self.rotary_frequencies(position_ids)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: Cache | None,
        **options: Any,
    ) -> Tensor:
        """The normalised stream (batch, length, d); `options` are passed on to the attention function."""
        x, rotary = self.embed(input_ids, position_ids), self.rotary(position_ids)
        mask = self._mask(x, attention_mask, position_ids, cache)
        options = {"attend": self._attention(), "sliding_window": self.arch.sliding_window, **options}
        for block in self.layers:
            x = block(x, rotary, mask, cache, **options)
        x = rms_normalise(x, self.arch.norm_eps)
        return x if self.head_map is None else self.head_map(x)

    def _attention(self) -> Attend:
        """The function of `attn_implementation`, looked up at every call: it may be set and registered at any time."""
        name = self.config._attn_implementation
        if name in (None, "eager"):
            return eager_attention
        attend: Attend = ALL_ATTENTION_FUNCTIONS[name]
        return attend

    def _mask(self, x: Tensor, given: Tensor | None, position_ids: Tensor, cache: Cache | None) -> Any:
        """What the attention function takes: of ours and PyTorch's kernel see `masks`, of others ask transformers."""
        batch, length, _ = x.shape
        name, window = self.config._attn_implementation, self.arch.sliding_window
        if name in (None, "eager", "sdpa"):
            past, keys = past_of(cache), None if cache is None else cache.get_mask_sizes(length, 0)
            eager = name != "sdpa"  # which knows of no causality without a mask
            return mask_unless_causal(given, batch, past, length, window, x.device, keys, x.dtype, always=eager)
        return create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=given,
            past_key_values=cache,
            position_ids=position_ids,
            and_mask_function=None if window is None else sliding_window_overlay(window),
        )


def past_of(cache: Cache | None) -> int | Tensor:
    """Tokens in the cache. That of a static one stays a tensor where it is compiled, and would be a constant."""
    past = 0 if cache is None else cache.get_seq_length()
    return past if torch.compiler.is_compiling() else int(past)


class ProcrustesForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A compressed causal LM that loads with `AutoModelForCausalLM.from_pretrained` after `import compress`."""

    config_class = ProcrustesConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_cache_class = True

    def __init__(self, config: ProcrustesConfig) -> None:
        super().__init__(config)
        arch = config.parsed_architecture()
        self.model = Decoder(config)
        _, rank = config.parsed_ranks()
        self.lm_head: nn.Module = nn.Linear(arch.hidden_size, arch.vocab_size, bias=config.head_bias)
        if rank:
            self.lm_head = FactoredHead(arch.vocab_size, arch.hidden_size, rank, config.head_bias)
            self._tied_weights_keys = {f"lm_head.{name}": f"model.embed_tokens.{name}" for name in ("U", "R")}
        self.post_init()  # type: ignore[no-untyped-call]

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None = None, **unused: Any) -> Tensor | None:
        """What `generate` gives `forward` with a static cache. transformers' own would know of no sliding window."""
        return attention_mask

    def _init_weights(self, module: nn.Module) -> None:
        """A compressed checkpoint brings every weight; the rotary frequencies are computed, not stored."""
        if isinstance(module, RotaryFrequencies):
            module.restore()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        labels: Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, length, vocabulary), or of the last `logits_to_keep` positions when that is not 0.

        input_ids: (batch, length); attention_mask: (batch, past + length), 0 on (left) padding, or four axes, see
        `masks`; position_ids: (batch, length), when not given as in transformers: counted from the start of the
        cache, learned positions with a mask of two axes from the first token that is not padding. Other options go to
        the attention function (`attn_implementation`). Raises UsageError for a mask that could be read in more than one
        way, and for ids that are not in the vocabulary, which a tokenizer that is longer gives.
        """
        _check_ids(input_ids, self.config.vocab_size)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        (batch, length), past = input_ids.shape, past_of(past_key_values)
        if attention_mask is not None and isinstance(past, int):
            keys = (length, 0) if past_key_values is None else past_key_values.get_mask_sizes(length, 0)
            arch = self.model.arch
            check_mask(attention_mask, batch, past, length, keys, arch.num_heads, arch.sliding_window)
        if position_ids is None:
            learned = self.model.arch.positions == "learned"
            position_ids = positions_for(attention_mask, batch, past, length, input_ids.device, learned)
        hidden = self.model(input_ids, attention_mask, position_ids, past_key_values, **options)
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None)


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    """On a GPU an id out of range ends the process, and on a CPU it is an IndexError that names nothing."""
    if torch.compiler.is_compiling() or ids.device.type == "meta" or not ids.numel():
        return
    least, most = (int(extreme) for extreme in torch.aminmax(ids))
    if least < 0 or most >= vocab_size:
        raise UsageError(
            f"input_ids hold {least if least < 0 else most}, and this model has the tokens 0 to {vocab_size - 1}: the "
            f"text has a token that only the tokenizer knows, or the tokenizer belongs to another model"
        )
