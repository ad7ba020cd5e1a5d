"""InternLM2 models, built on transformers' Llama classes.

InternLM2 differs from Llama in its fused `wqkv`, its rotary embedding and its parameter names. Masks, caches, attention
kernels, generation and gradient checkpointing are Llama's. Its code finds InternLM2's modules through the properties
below (`self_attn`, `mlp`, `lm_head`, ...).
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
    repeat_kv,
    rotate_half,
)
from transformers.utils import TransformersKwargs

from internvl.model.internlm2.configuration_internlm2 import InternLM2Config
from internvl.model.internvl_chat.modeling_intern_vit import compute_rms_norm, has_flash_attn

__all__ = [
    "INTERNLM2_ATTENTION_CLASSES",
    "InternLM2Attention",
    "InternLM2Config",
    "InternLM2DecoderLayer",
    "InternLM2FlashAttention2",
    "InternLM2ForCausalLM",
    "InternLM2ForSequenceClassification",
    "InternLM2MLP",
    "InternLM2Model",
    "InternLM2PreTrainedModel",
    "InternLM2RMSNorm",
    "InternLM2RotaryEmbedding",
    "apply_rotary_pos_emb",
    "has_flash_attn",
    "repeat_kv",
    "rotate_half",
]


# What Llama's layers pass on to attention, beside the arguments of `InternLM2Attention.forward`.
ATTENTION_KEYWORDS = {*TransformersKwargs.__annotations__, "use_cache", "cache_position", "documents"}


class InternLM2RMSNorm(LlamaRMSNorm):
    """Llama's RMS norm, in one kernel where torch has it."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return compute_rms_norm(hidden_states, self.weight, self.variance_epsilon)


class InternLM2RotaryEmbedding(nn.Module):
    """Rotary embedding: positions (B, L) -> cos and sin (B, L, D).

    Of the two kinds of `rope_scaling`, `linear` divides the positions, and `dynamic` enlarges the base if a position
    exceeds `max_position_embeddings`. Everything is computed in each call: a long input does not affect the next one,
    and there is no buffer that loading on the meta device would lose.
    """

    def __init__(self, config: InternLM2Config):
        super().__init__()
        self.dim = config.hidden_size // config.num_attention_heads
        self.base = float(config.rope_theta)
        self.max_positions = config.max_position_embeddings
        scaling = config.rope_scaling or {"type": "none", "factor": 1.0}
        self.scaling_type, self.factor = scaling["type"], scaling["factor"]

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        positions, base = position_ids.float(), self.base
        if self.scaling_type == "linear":
            positions = positions / self.factor
        if self.scaling_type == "dynamic":
            growth = self.factor * (positions.max() + 1) / self.max_positions - (self.factor - 1)
            base = base * growth.clamp(min=1.0) ** (self.dim / (self.dim - 2))
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=x.device) / self.dim
        angles = positions[..., None] * (1.0 / base**exponents)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class InternLM2Attention(nn.Module):
    """Grouped-query attention with a fused projection `wqkv`.

    The rows of `wqkv` are grouped by key/value head: the query heads of the group, its key head, its value head.
    """

    apply_rotary_fn = staticmethod(apply_rotary_pos_emb)  # `liger_kernels.py` replaces it

    def __init__(self, config: InternLM2Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        qkv_size = (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim
        self.wqkv = nn.Linear(config.hidden_size, qkv_size, bias=config.bias)
        self.wo = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.bias)

    def forward(
        self, hidden_states, position_embeddings, attention_mask=None, cache=None, past_key_values=None, **kwargs
    ):
        """Return attended states (B, L, C) and attention weights.

        The weights are None for kernels that do not return them. `cache` is the name of `past_key_values` from
        transformers 5.24 on.

        Raises:
            TypeError: a keyword is unknown. A new version of transformers may have renamed one that matters.
        """
        if unknown := kwargs.keys() - ATTENTION_KEYWORDS:
            raise TypeError(f"InternLM2Attention does not support the arguments {', '.join(sorted(unknown))}")
        cache = past_key_values if cache is None else cache
        groups = self.num_key_value_groups
        # (B, L, num_key_value_heads, groups + 2, head_dim)
        qkv = self.wqkv(hidden_states).unflatten(-1, (self.num_key_value_heads, groups + 2, self.head_dim))
        # `split`, not slices: the backward pass of a slice makes a tensor of the size of `qkv`.
        q, k, v = (x.flatten(2, 3).transpose(1, 2) for x in qkv.split((groups, 1, 1), dim=3))  # (B, heads, L, head_dim)
        q, k = self.apply_rotary_fn(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        implementation = str(self.config._attn_implementation)
        attention_fn = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attended, weights = attention_fn(self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.wo(attended.flatten(2)), weights


# Upstream's names. Here one class supports all attention kernels.
InternLM2FlashAttention2 = InternLM2Attention
INTERNLM2_ATTENTION_CLASSES = {"eager": InternLM2Attention, "flash_attention_2": InternLM2Attention}


class InternLM2MLP(nn.Module):
    """Gated MLP: w2(act(w1 x) * w3 x)."""

    def __init__(self, config: InternLM2Config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class InternLM2DecoderLayer(LlamaDecoderLayer):
    """A Llama layer whose modules have InternLM2's names."""

    self_attn = property(lambda self: self.attention)
    mlp = property(lambda self: self.feed_forward)
    input_layernorm = property(lambda self: self.attention_norm)
    post_attention_layernorm = property(lambda self: self.ffn_norm)

    def __init__(self, config: InternLM2Config, layer_idx: int):
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        self.attention = InternLM2Attention(config, layer_idx)
        self.feed_forward = InternLM2MLP(config)
        self.attention_norm = InternLM2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn_norm = InternLM2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class InternLM2PreTrainedModel(LlamaPreTrainedModel):
    config: InternLM2Config
    config_class = InternLM2Config
    base_model_prefix = "model"
    _no_split_modules = ["InternLM2DecoderLayer"]
    _can_record_outputs = {"hidden_states": InternLM2DecoderLayer, "attentions": InternLM2Attention}


class InternLM2Model(InternLM2PreTrainedModel, LlamaModel):
    """The decoder without its head."""

    embed_tokens = property(lambda self: self.tok_embeddings)

    def __init__(self, config: InternLM2Config):
        PreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([InternLM2DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = InternLM2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = InternLM2RotaryEmbedding(config)  # pyrefly: ignore[bad-assignment]  # same interface
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.tok_embeddings

    def set_input_embeddings(self, value):
        self.tok_embeddings = value


class InternLM2ForCausalLM(InternLM2PreTrainedModel, LlamaForCausalLM):
    """The decoder with its LM head `output`."""

    _tied_weights_keys = {"output.weight": "model.tok_embeddings.weight"}
    lm_head = property(lambda self: self.output)

    def __init__(self, config: InternLM2Config):
        PreTrainedModel.__init__(self, config)
        self.model = InternLM2Model(config)
        self.vocab_size = config.vocab_size
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.tok_embeddings

    def set_input_embeddings(self, value):
        self.model.tok_embeddings = value

    def get_output_embeddings(self):
        return self.output

    def set_output_embeddings(self, value):
        self.output = value


class InternLM2ForSequenceClassification(GenericForSequenceClassification, InternLM2PreTrainedModel):
    """Classifier on the hidden state of each sequence's last token."""

    def __init__(self, config: InternLM2Config):
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = InternLM2Model(config)
        # pyrefly: ignore[bad-argument-type]  # `num_labels` is never None once the configuration is built
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
