"""Conversion of weights between the custom and the HF format.

"Custom" is the format of `InternVLChatModel`, "HF" that of transformers' `InternVLForConditionalGeneration`. Both
directions read the same table, the lists of `KeyMapping` below. `hf/config.py` converts configurations;
`tools/internvl_custom2hf.py` and `tools/internvl_hf2custom.py` are the command lines.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from internvl.model.safetensors_io import StateDict


class KeyMapping(NamedTuple):
    """One custom tensor and the HF tensors it corresponds to.

    In a key, `#` stands for a layer number and `*` for the rest. `split_fn(tensor, llm_config)` splits the custom
    tensor into the HF ones, and `join_fn(tensors, llm_config)` is its inverse. None: one tensor, which is not changed.
    """

    custom_key: str
    hf_keys: tuple[str, ...]
    split_fn: Callable | None = None
    join_fn: Callable | None = None


def split_qkv(qkv: torch.Tensor, llm_config=None) -> list[torch.Tensor]:
    """Split fused qkv: (3C, ...) -> 3 x (C, ...)."""
    return [part.clone() for part in qkv.chunk(3)]


def join_qkv(parts: list[torch.Tensor], llm_config=None) -> torch.Tensor:
    """Join q, k and v: 3 x (C, ...) -> (3C, ...)."""
    return torch.cat(parts)


def split_grouped_qkv(wqkv: torch.Tensor, llm_config: PretrainedConfig) -> list[torch.Tensor]:
    """Split InternLM2's fused `wqkv` into q, k and v.

    Its rows are grouped by key/value head: first the query heads of the group, then its key head, then its value head.
    """
    group_size, head_dim = _get_attention_shape(llm_config)
    grouped = wqkv.unflatten(0, (-1, group_size + 2, head_dim))  # (num_kv_heads, group_size + 2, head_dim, ...)
    return [part.flatten(0, 2).clone() for part in grouped.split((group_size, 1, 1), dim=1)]


def join_grouped_qkv(parts: list[torch.Tensor], llm_config: PretrainedConfig) -> torch.Tensor:
    """Interleave q, k and v to InternLM2's fused `wqkv`."""
    group_size, head_dim = _get_attention_shape(llm_config)
    grouped = [part.unflatten(0, (-1, n, head_dim)) for part, n in zip(parts, (group_size, 1, 1), strict=True)]
    return torch.cat(grouped, dim=1).flatten(0, 2)


def copy_head(parts: list[torch.Tensor], llm_config=None) -> torch.Tensor:
    """Copy the LM head.

    A tied head shares the embedding's memory, which safetensors files do not support.
    """
    return parts[0].clone()


def _get_attention_shape(llm_config: PretrainedConfig) -> tuple[int, int]:
    """Return the query heads per key head, and the head dimension."""
    num_heads = llm_config.num_attention_heads
    return num_heads // llm_config.num_key_value_heads, llm_config.hidden_size // num_heads


VIT_EMBEDDINGS, VIT_LAYER = "vision_model.embeddings", "vision_model.encoder.layers.#"
HF_VIT_EMBEDDINGS, HF_VIT_LAYER = "model.vision_tower.embeddings", "model.vision_tower.encoder.layer.#"
LLM, HF_LLM = "language_model.model", "model.language_model"
HF_HEAD, HF_EMBEDDING = "lm_head.weight", f"{HF_LLM}.embed_tokens.weight"

VISION_MAPPINGS = [
    KeyMapping(f"{VIT_EMBEDDINGS}.class_embedding", (f"{HF_VIT_EMBEDDINGS}.cls_token",)),
    KeyMapping(f"{VIT_EMBEDDINGS}.position_embedding", (f"{HF_VIT_EMBEDDINGS}.position_embeddings",)),
    KeyMapping(f"{VIT_EMBEDDINGS}.patch_embedding.*", (f"{HF_VIT_EMBEDDINGS}.patch_embeddings.projection.*",)),
    KeyMapping(
        f"{VIT_LAYER}.attn.qkv.*",
        tuple(f"{HF_VIT_LAYER}.attention.{name}_proj.*" for name in "qkv"),
        split_qkv,
        join_qkv,
    ),
    KeyMapping(f"{VIT_LAYER}.attn.q_norm.*", (f"{HF_VIT_LAYER}.attention.q_norm.*",)),
    KeyMapping(f"{VIT_LAYER}.attn.k_norm.*", (f"{HF_VIT_LAYER}.attention.k_norm.*",)),
    KeyMapping(f"{VIT_LAYER}.attn.proj.*", (f"{HF_VIT_LAYER}.attention.projection_layer.*",)),
    KeyMapping(f"{VIT_LAYER}.mlp.*", (f"{HF_VIT_LAYER}.mlp.*",)),
    KeyMapping(f"{VIT_LAYER}.norm1.*", (f"{HF_VIT_LAYER}.layernorm_before.*",)),
    KeyMapping(f"{VIT_LAYER}.norm2.*", (f"{HF_VIT_LAYER}.layernorm_after.*",)),
    KeyMapping(f"{VIT_LAYER}.ls1", (f"{HF_VIT_LAYER}.lambda_1",)),
    KeyMapping(f"{VIT_LAYER}.ls2", (f"{HF_VIT_LAYER}.lambda_2",)),
]
PROJECTOR_MAPPINGS = [
    KeyMapping("mlp1.0.*", ("model.multi_modal_projector.layer_norm.*",)),
    KeyMapping("mlp1.1.*", ("model.multi_modal_projector.linear_1.*",)),
    KeyMapping("mlp1.3.*", ("model.multi_modal_projector.linear_2.*",)),
]
# LLMs keep their names, except InternLM2: transformers has no such class, but it is a Llama under other names.
LLM_MAPPINGS = [
    KeyMapping("language_model.lm_head.*", ("lm_head.*",), join_fn=copy_head),
    KeyMapping(f"{LLM}.*", (f"{HF_LLM}.*",)),
]
INTERNLM2_MAPPINGS = [
    KeyMapping("language_model.output.*", ("lm_head.*",), join_fn=copy_head),
    KeyMapping(f"{LLM}.tok_embeddings.*", (f"{HF_LLM}.embed_tokens.*",)),
    KeyMapping(
        f"{LLM}.layers.#.attention.wqkv.*",
        tuple(f"{HF_LLM}.layers.#.self_attn.{name}_proj.*" for name in "qkv"),
        split_grouped_qkv,
        join_grouped_qkv,
    ),
    KeyMapping(f"{LLM}.layers.#.attention.wo.*", (f"{HF_LLM}.layers.#.self_attn.o_proj.*",)),
    KeyMapping(f"{LLM}.layers.#.feed_forward.w1.*", (f"{HF_LLM}.layers.#.mlp.gate_proj.*",)),
    KeyMapping(f"{LLM}.layers.#.feed_forward.w3.*", (f"{HF_LLM}.layers.#.mlp.up_proj.*",)),
    KeyMapping(f"{LLM}.layers.#.feed_forward.w2.*", (f"{HF_LLM}.layers.#.mlp.down_proj.*",)),
    KeyMapping(f"{LLM}.layers.#.attention_norm.*", (f"{HF_LLM}.layers.#.input_layernorm.*",)),
    KeyMapping(f"{LLM}.layers.#.ffn_norm.*", (f"{HF_LLM}.layers.#.post_attention_layernorm.*",)),
    KeyMapping(f"{LLM}.norm.*", (f"{HF_LLM}.norm.*",)),
]
HEAD_AND_EMBEDDING_KEYS = [
    ("language_model.lm_head.weight", f"{LLM}.embed_tokens.weight"),
    ("language_model.output.weight", f"{LLM}.tok_embeddings.weight"),
]

# Prefixes of transformers before 4.52, which newer versions still write, and the current ones. The first match counts.
OLDER_HF_PREFIXES = [
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.(model\.)?"), f"{HF_LLM}."),
    (re.compile(r"^(vision_tower|multi_modal_projector)\."), r"model.\1."),
]
# Rotary tables in old checkpoints; every model computes them itself.
IGNORED_KEYS = re.compile(r"rotary_emb\.inv_freq$")


def select_key_mappings(llm_config: Any | None) -> list[KeyMapping]:
    """Return the table for an LLM (None: any but InternLM2)."""
    is_internlm2 = llm_config is not None and llm_config.architectures[0] == "InternLM2ForCausalLM"
    return VISION_MAPPINGS + PROJECTOR_MAPPINGS + (INTERNLM2_MAPPINGS if is_internlm2 else LLM_MAPPINGS)


def convert_weights_to_hf(
    custom: StateDict, llm_config: PretrainedConfig | None = None, is_tied: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield HF keys and tensors for all custom tensors.

    Args:
        llm_config: the LLM's configuration in the custom checkpoint, required for InternLM2.
        is_tied: leave out the LM head, which is the embedding.

    Raises:
        ValueError: keys without a mapping, which the message lists. It is raised before the first tensor is read.
    """
    table = [(_compile_key(mapping.custom_key), mapping) for mapping in select_key_mappings(llm_config)]
    matches = {key: _match_key(table, key) for key in custom if not IGNORED_KEYS.search(key)}
    _require_counterparts([key for key, match in matches.items() if match is None])
    for key, (mapping, wildcards) in matches.items():  # pyrefly: ignore[not-iterable]  # None: checked above
        hf_keys = [_substitute(hf_key, wildcards) for hf_key in mapping.hf_keys]
        if not (is_tied and hf_keys == [HF_HEAD]):
            tensors = mapping.split_fn(custom[key], llm_config) if mapping.split_fn else [custom[key]]
            yield from zip(hf_keys, tensors, strict=True)


def convert_weights_to_custom(
    hf: StateDict, llm_config: PretrainedConfig | None = None, is_tied: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield custom keys and tensors for all HF tensors.

    Args:
        hf: keys with the prefixes of old or new versions of transformers.
        llm_config: the LLM's configuration in the custom checkpoint, required for InternLM2.
        is_tied: `hf` may lack the LM head, which is the embedding; custom checkpoints hold both.

    Raises:
        ValueError: keys without a mapping, or parts of a fused tensor without the others. The message lists them.
    """
    stored_keys = {normalize_hf_key(key): key for key in hf if not IGNORED_KEYS.search(key)}
    if is_tied and HF_EMBEDDING in stored_keys:
        stored_keys.setdefault(HF_HEAD, stored_keys[HF_EMBEDDING])
    mappings = select_key_mappings(llm_config)
    table = [
        (_compile_key(hf_key), (mapping, position))
        for mapping in mappings
        for position, hf_key in enumerate(mapping.hf_keys)
    ]
    matches = {key: _match_key(table, key) for key in stored_keys}
    _require_counterparts([key for key, match in matches.items() if match is None])
    # Custom key -> its mapping, and the stored key of each HF tensor that it is joined from, by position.
    sources: dict[str, tuple[KeyMapping, dict[int, str]]] = {}
    for key, ((mapping, position), wildcards) in matches.items():  # pyrefly: ignore[not-iterable]  # as above
        custom_key = _substitute(mapping.custom_key, wildcards)
        sources.setdefault(custom_key, (mapping, {}))[1][position] = stored_keys[key]
    incomplete = [keys for mapping, keys in sources.values() if len(keys) < len(mapping.hf_keys)]
    _require_counterparts([key for keys in incomplete for key in keys.values()])
    for custom_key, (mapping, keys) in sources.items():
        tensors = [hf[keys[position]] for position in range(len(mapping.hf_keys))]
        yield custom_key, mapping.join_fn(tensors, llm_config) if mapping.join_fn else tensors[0]


def is_head_tied(custom: StateDict, declared: bool) -> bool:
    """Check whether a custom checkpoint's LM head equals its embedding.

    Args:
        declared: the answer of the configuration, used if the checkpoint holds no head.
    """
    head, embedding = next((pair for pair in HEAD_AND_EMBEDDING_KEYS if pair[1] in custom), HEAD_AND_EMBEDDING_KEYS[0])
    return torch.equal(custom[head], custom[embedding]) if head in custom else declared


def normalize_hf_key(key: str) -> str:
    """Replace a prefix of older transformers versions by the current one."""
    for pattern, replacement in OLDER_HF_PREFIXES:
        key, num_replaced = pattern.subn(replacement, key)
        if num_replaced:
            break
    return key


def _compile_key(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"))


def _substitute(template: str, wildcards: tuple[str, ...]) -> str:
    values = iter(wildcards)
    return re.sub(r"[#*]", lambda _: next(values), template)


def _match_key(table, key: str):
    """Find the first matching entry and the values of its wildcards."""
    return next(((entry, match.groups()) for pattern, entry in table if (match := pattern.fullmatch(key))), None)


def _require_counterparts(unmatched_keys: list[str]) -> None:
    if unmatched_keys:
        listed = ", ".join(sorted(unmatched_keys))
        raise ValueError(f"{len(unmatched_keys)} tensors have no counterpart in the other format: {listed}")
