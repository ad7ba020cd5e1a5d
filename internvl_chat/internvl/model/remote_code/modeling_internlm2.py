"""InternLM2 in a checkpoint's own code, for inference.

It runs under transformers 4.37 to 5, with torch's attention. Shapes: B rows, L new tokens, S = cached + new tokens, C
hidden size, D size of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast

from internvl.model.remote_code.configuration_internlm2 import InternLM2Config
from internvl.model.remote_code.modeling_intern_vit import InternRMSNorm

# Name of the KV cache in outputs: transformers 5.24 renamed it.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def compute_rotation(config, positions, dtype):
    """Compute cos and sin (B, 1, L, D) of the rotary embedding at positions (B, L).

    Of the two kinds of scaling, `linear` divides the positions, and `dynamic` enlarges the base if a position exceeds
    `max_position_embeddings`.
    """
    rope = config.rope_parameters or {"rope_theta": config.rope_theta, **(config.rope_scaling or {})}
    base, kind, factor = rope["rope_theta"], rope.get("type", rope.get("rope_type")), rope.get("factor", 1.0)
    size, positions = config.hidden_size // config.num_attention_heads, positions.float()
    if kind == "linear":
        positions = positions / factor
    if kind == "dynamic":
        growth = factor * (positions.max() + 1) / config.max_position_embeddings - (factor - 1)
        base = base * growth.clamp(min=1.0) ** (size / (size - 2))
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
    angles = (positions[:, None, :, None] * (1.0 / base**exponents)).repeat(1, 1, 1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class InternLM2Attention(nn.Module):
    """Grouped-query attention with a fused projection.

    The rows of `wqkv` are grouped by key/value head: the query heads of the group, its key head, its value head.
    """

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.num_groups = layer, config.num_key_value_heads
        self.group_size = config.num_attention_heads // self.num_groups
        num_rows = (self.group_size + 2) * config.hidden_size // self.group_size
        self.wqkv = nn.Linear(config.hidden_size, num_rows, bias=config.bias)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, x, rotation, mask, cache):
        qkv = self.wqkv(x).unflatten(-1, (self.num_groups, self.group_size + 2, -1)).transpose(1, 2)
        q, k, v = qkv.split([self.group_size, 1, 1], dim=3)  # (B, groups, L, heads of a group, D)
        q, k, v = rotate(q.transpose(2, 3).flatten(1, 2), *rotation), rotate(k.squeeze(3), *rotation), v.squeeze(3)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = (y.repeat_interleave(self.group_size, dim=1) for y in (k, v))  # (B, heads, S, D)
        return self.wo(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class InternLM2MLP(nn.Module):
    """Gated MLP: w2(act(w1 x) * w3 x)."""

    def __init__(self, config):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(config.hidden_size, config.intermediate_size, bias=False) for _ in "13")
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class InternLM2DecoderLayer(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config, layer):
        super().__init__()
        self.attention, self.feed_forward = InternLM2Attention(config, layer), InternLM2MLP(config)
        self.attention_norm = InternRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = InternRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rotation, mask, cache):
        x = x + self.attention(self.attention_norm(x), rotation, mask, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class InternLM2Model(nn.Module):
    """The decoder without its head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([InternLM2DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = InternRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, attention_mask, position_ids, cache):
        """Return the embeddings, the output of each layer, and the normalized output of the last one."""
        num_cached = 0 if cache is None else cache.get_seq_length()
        num_new, device = x.shape[1], x.device
        if attention_mask is None:
            attention_mask = torch.ones(len(x), num_cached + num_new, dtype=torch.long, device=device)
        keys = torch.arange(num_cached + num_new, device=device)
        queries = keys[num_cached:, None]
        position_ids = keys[None, num_cached:] if position_ids is None else position_ids
        # (B, 1, L, S); a query of padding sees itself, because a row without any key would be NaN
        mask = (keys <= queries) & attention_mask[:, None, None, :].bool() | (keys == queries)
        rotation = compute_rotation(self.config, position_ids, x.dtype)
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], rotation, mask, cache))
        return (*states[:-1], self.norm(states[-1]))


class InternLM2ForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder with its LM head `output`."""

    config_class = InternLM2Config
    base_model_prefix = "model"
    _no_split_modules = ["InternLM2DecoderLayer"]
    _tied_weights_keys = {"output.weight": "model.tok_embeddings.weight"}
    _supports_sdpa = _supports_cache_class = True

    def __init__(self, config):
        super().__init__(config)
        self.model = InternLM2Model(config)
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

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        cache: Any = None,
        **_,
    ):
        """Compute logits (B, L, V) of ids or embeddings; `past_key_values` is called `cache` from 5.24 on."""
        embeds = self.model.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        states = self.model(embeds, attention_mask, position_ids, cache)
        logits, loss = self.output(states[-1]), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        fields: Any = {CACHE_NAME: cache, "hidden_states": states if output_hidden_states else None}
        output = CausalLMOutputWithPast(loss, logits, **fields)
        return output if return_dict is not False else output.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, cache=None, **kwargs
    ):
        """Select the embeddings of the prompt (`input_ids` has the generated tokens only), then the last token."""
        cache = past_key_values if cache is None else cache
        inputs = {"attention_mask": attention_mask, CACHE_NAME: cache, "use_cache": kwargs.get("use_cache")}
        if inputs_embeds is not None and input_ids.shape[1] == 0:
            inputs["inputs_embeds"], num_new = inputs_embeds, inputs_embeds.shape[1]
        else:
            is_cached = cache is not None and cache.get_seq_length() > 0
            num_new = 1 if is_cached else input_ids.shape[1]
            inputs["input_ids"] = input_ids[:, -num_new:]
        if attention_mask is not None:
            inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -num_new:]
        return inputs

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        """Reorder the cache in beam search; transformers 4 calls it."""
        past_key_values.reorder_cache(beam_idx)
        return past_key_values
