"""The weights of a chat checkpoint under the names of transformers' own InternVL class, and back.

Two spellings of one model: ours (upstream's, "custom") and that of `InternVLForConditionalGeneration` ("hf"). `ROWS`
says which tensor is which; both directions are read off the same table. `hf_config` does the same for configurations,
`tools/internvl_custom2hf.py` and `tools/internvl_hf2custom.py` are the command lines.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from internvl.model.safetensors_io import Tensors


class Row(NamedTuple):
    """One custom tensor and the hf tensors it is made of; in a name `#` is a number and `*` the rest.

    `split(tensor, llm_config)` gives the parts, `join(parts, llm_config)` the whole; None: there is one part, the same.
    """

    custom: str
    hf: tuple[str, ...]
    split: Callable | None = None
    join: Callable | None = None


def split_thirds(qkv: torch.Tensor, llm_config=None) -> list[torch.Tensor]:
    return [part.clone() for part in qkv.chunk(3)]


def join_thirds(parts: list[torch.Tensor], llm_config=None) -> torch.Tensor:
    return torch.cat(parts)


def split_groups(wqkv: torch.Tensor, llm_config: PretrainedConfig) -> list[torch.Tensor]:
    """InternLM2's rows: for each key head its query heads, then the key, then the value head."""
    groups, dim = _heads(llm_config)
    grouped = wqkv.unflatten(0, (-1, groups + 2, dim))
    return [part.flatten(0, 2).clone() for part in grouped.split((groups, 1, 1), dim=1)]


def join_groups(parts: list[torch.Tensor], llm_config: PretrainedConfig) -> torch.Tensor:
    groups, dim = _heads(llm_config)
    shaped = [part.unflatten(0, (-1, n, dim)) for part, n in zip(parts, (groups, 1, 1), strict=True)]
    return torch.cat(shaped, dim=1).flatten(0, 2)


def own_copy(parts: list[torch.Tensor], llm_config=None) -> torch.Tensor:
    """Of the head, which is the embeddings where they are tied: files cannot share memory."""
    return parts[0].clone()


def _heads(llm_config: PretrainedConfig) -> tuple[int, int]:
    """Query heads to a key head, and the size of a head."""
    heads = llm_config.num_attention_heads
    return heads // llm_config.num_key_value_heads, llm_config.hidden_size // heads


VIT, VIT_LAYER = "vision_model.embeddings", "vision_model.encoder.layers.#"
HF_VIT, HF_VIT_LAYER = "model.vision_tower.embeddings", "model.vision_tower.encoder.layer.#"
LLM, HF_LLM = "language_model.model", "model.language_model"
HF_HEAD, HF_EMBEDDING = "lm_head.weight", f"{HF_LLM}.embed_tokens.weight"

VISION_ROWS = [
    Row(f"{VIT}.class_embedding", (f"{HF_VIT}.cls_token",)),
    Row(f"{VIT}.position_embedding", (f"{HF_VIT}.position_embeddings",)),
    Row(f"{VIT}.patch_embedding.*", (f"{HF_VIT}.patch_embeddings.projection.*",)),
    Row(
        f"{VIT_LAYER}.attn.qkv.*",
        tuple(f"{HF_VIT_LAYER}.attention.{name}_proj.*" for name in "qkv"),
        split_thirds,
        join_thirds,
    ),
    Row(f"{VIT_LAYER}.attn.q_norm.*", (f"{HF_VIT_LAYER}.attention.q_norm.*",)),
    Row(f"{VIT_LAYER}.attn.k_norm.*", (f"{HF_VIT_LAYER}.attention.k_norm.*",)),
    Row(f"{VIT_LAYER}.attn.proj.*", (f"{HF_VIT_LAYER}.attention.projection_layer.*",)),
    Row(f"{VIT_LAYER}.mlp.*", (f"{HF_VIT_LAYER}.mlp.*",)),
    Row(f"{VIT_LAYER}.norm1.*", (f"{HF_VIT_LAYER}.layernorm_before.*",)),
    Row(f"{VIT_LAYER}.norm2.*", (f"{HF_VIT_LAYER}.layernorm_after.*",)),
    Row(f"{VIT_LAYER}.ls1", (f"{HF_VIT_LAYER}.lambda_1",)),
    Row(f"{VIT_LAYER}.ls2", (f"{HF_VIT_LAYER}.lambda_2",)),
]
PROJECTOR_ROWS = [
    Row("mlp1.0.*", ("model.multi_modal_projector.layer_norm.*",)),
    Row("mlp1.1.*", ("model.multi_modal_projector.linear_1.*",)),
    Row("mlp1.3.*", ("model.multi_modal_projector.linear_2.*",)),
]
# A language model keeps its names; InternLM2, which transformers does not know, is a Llama under other names.
LLM_ROWS = [
    Row("language_model.lm_head.*", ("lm_head.*",), join=own_copy),
    Row(f"{LLM}.*", (f"{HF_LLM}.*",)),
]
INTERNLM2_ROWS = [
    Row("language_model.output.*", ("lm_head.*",), join=own_copy),
    Row(f"{LLM}.tok_embeddings.*", (f"{HF_LLM}.embed_tokens.*",)),
    Row(
        f"{LLM}.layers.#.attention.wqkv.*",
        tuple(f"{HF_LLM}.layers.#.self_attn.{name}_proj.*" for name in "qkv"),
        split_groups,
        join_groups,
    ),
    Row(f"{LLM}.layers.#.attention.wo.*", (f"{HF_LLM}.layers.#.self_attn.o_proj.*",)),
    Row(f"{LLM}.layers.#.feed_forward.w1.*", (f"{HF_LLM}.layers.#.mlp.gate_proj.*",)),
    Row(f"{LLM}.layers.#.feed_forward.w3.*", (f"{HF_LLM}.layers.#.mlp.up_proj.*",)),
    Row(f"{LLM}.layers.#.feed_forward.w2.*", (f"{HF_LLM}.layers.#.mlp.down_proj.*",)),
    Row(f"{LLM}.layers.#.attention_norm.*", (f"{HF_LLM}.layers.#.input_layernorm.*",)),
    Row(f"{LLM}.layers.#.ffn_norm.*", (f"{HF_LLM}.layers.#.post_attention_layernorm.*",)),
    Row(f"{LLM}.norm.*", (f"{HF_LLM}.norm.*",)),
]
HEAD_AND_EMBEDDING = [
    ("language_model.lm_head.weight", f"{LLM}.embed_tokens.weight"),
    ("language_model.output.weight", f"{LLM}.tok_embeddings.weight"),
]

# Files of transformers before 4.52, and those it still writes, spell the hf names in these ways.
OLDER_HF = [
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.(model\.)?"), f"{HF_LLM}."),
    (re.compile(r"^(vision_tower|multi_modal_projector)\."), r"model.\1."),
]
# Rotary tables that old checkpoints carry and every model recomputes.
IGNORED = re.compile(r"rotary_emb\.inv_freq$")


def rows_of(llm_config: PretrainedConfig | None) -> list[Row]:
    """The table for a chat model with this language model (None: one that keeps its names)."""
    internlm2 = llm_config is not None and llm_config.architectures[0] == "InternLM2ForCausalLM"
    return VISION_ROWS + PROJECTOR_ROWS + (INTERNLM2_ROWS if internlm2 else LLM_ROWS)


def to_hf(
    custom: Tensors, llm_config: PretrainedConfig | None = None, tied: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hf name and tensor for every custom tensor; `llm_config` is the custom one, needed for InternLM2.

    Args:
        tied: leave out the head, as the embeddings are it.

    Raises:
        ValueError: some names are in no row; the message lists them. It comes before the first tensor.
    """
    table = [(_pattern(row.custom), row) for row in rows_of(llm_config)]
    found = {name: _find(table, name) for name in custom if not IGNORED.search(name)}
    _refuse([name for name, hit in found.items() if hit is None])
    for name, (row, groups) in found.items():
        names = [_fill(part, groups) for part in row.hf]
        if not (tied and names == [HF_HEAD]):
            parts = row.split(custom[name], llm_config) if row.split else [custom[name]]
            yield from zip(names, parts, strict=True)


def to_custom(
    hf: Tensors, llm_config: PretrainedConfig | None = None, tied: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Custom name and tensor for every hf tensor, old or new spelling; `llm_config` is the custom one.

    Args:
        tied: the hf file may leave the head out, as the embeddings are it; custom checkpoints hold both.

    Raises:
        ValueError: some names are in no row, or are parts of an incomplete one; the message lists them.
    """
    spelled = {newer_name(name): name for name in hf if not IGNORED.search(name)}
    if tied and HF_EMBEDDING in spelled:
        spelled.setdefault(HF_HEAD, spelled[HF_EMBEDDING])
    table = [(_pattern(part), (row, place)) for row in rows_of(llm_config) for place, part in enumerate(row.hf)]
    found = {name: _find(table, name) for name in spelled}
    _refuse([name for name, hit in found.items() if hit is None])
    whole: dict[str, tuple[Row, dict[int, str]]] = {}
    for name, ((row, place), groups) in found.items():
        whole.setdefault(_fill(row.custom, groups), (row, {}))[1][place] = spelled[name]
    _refuse([name for row, parts in whole.values() if len(parts) < len(row.hf) for name in parts.values()])
    for name, (row, parts) in whole.items():
        tensors = [hf[parts[place]] for place in range(len(row.hf))]
        yield name, row.join(tensors, llm_config) if row.join else tensors[0]


def is_tied(custom: Tensors, declared: bool) -> bool:
    """Whether the head of a custom checkpoint is the embeddings: the same numbers, or left out and declared so."""
    head, embedding = next((ends for ends in HEAD_AND_EMBEDDING if ends[1] in custom), HEAD_AND_EMBEDDING[0])
    return torch.equal(custom[head], custom[embedding]) if head in custom else declared


def newer_name(name: str) -> str:
    """The hf name in the spelling of the table."""
    for pattern, replacement in OLDER_HF:
        name, changed = pattern.subn(replacement, name)
        if changed:
            break
    return name


def _pattern(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"))


def _fill(template: str, groups: tuple[str, ...]) -> str:
    values = iter(groups)
    return re.sub(r"[#*]", lambda _: next(values), template)


def _find(table, name: str):
    return next(((entry, hit.groups()) for pattern, entry in table if (hit := pattern.fullmatch(name))), None)


def _refuse(names: list[str]) -> None:
    if names:
        raise ValueError(f"{len(names)} tensors have no counterpart in the other format: {', '.join(sorted(names))}")
