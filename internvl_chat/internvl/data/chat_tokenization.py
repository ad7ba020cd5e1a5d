"""Tokenize a conversation: turns to (input_ids, labels).

`chat_segments.py` splits a conversation into segments with and without loss. Here each list of segments is tokenized as
one string, as the published checkpoints were trained, and the tokenizer's offsets decide which tokens have loss. This
holds for all templates. `supervised_dataset.py` calls `tokenize_turns`; upstream's `preprocess_*` functions add
truncation and padding.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from internvl.constants import IGNORE_INDEX, IMG_CONTEXT_TOKEN, UnusableSample, get_pad_id
from internvl.data.chat_segments import (
    GPT_OSS_THINK_RULES,
    IMAGE_TOKENS,
    PRETRAIN_RULES,
    Segment,
    TemplateRules,
    get_template_rules,
    split_into_segments,
)


def tokenize_turns(
    template_name: str,
    turns: Sequence[dict],
    tokenizer,
    tokens_per_image: Sequence[int],
    text_only: bool = False,
    rules: TemplateRules | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenize one conversation, without truncation or padding.

    Args:
        turns: the record's `conversations`: `{"from": "system" (first only) | "human" | "gpt", "value": text}`. With
            internvl3_5_gpt_oss also "function". Or one turn from "pretrain": plain text without a template.
        tokenizer: a fast one. If it adds a bos token, that is added once, before the conversation.
        tokens_per_image: number of context tokens of each image. The j-th `<image>` in human turns becomes image j.
        text_only: leave `<image>` as text.
        rules: override those of the template.

    Returns:
        input_ids, labels: int64 (L,). Labels are IGNORE_INDEX outside answers and their end markers.

    Raises:
        UnusableSample: no turns, an unknown role, a value that is not a string, fewer placeholders than images.
        ValueError: the tokenizer lacks the image token.
    """
    rules = rules or get_template_rules(template_name, turns)
    tokens_per_image = () if text_only else tokens_per_image
    messages = split_into_segments(template_name, turns, len(tokens_per_image), rules)
    bos = tokenizer("").input_ids if tokenizer.num_special_tokens_to_add() else []
    pieces = [(bos, [IGNORE_INDEX] * len(bos)), *_tokenize_messages(tokenizer, messages)]
    input_ids, labels = (np.concatenate(column).astype(np.int64) for column in zip(*pieces, strict=True))
    if rules is PRETRAIN_RULES:  # all of the text has loss, but images never do
        labels[np.isin(input_ids, tokenizer.convert_tokens_to_ids(IMAGE_TOKENS))] = IGNORE_INDEX
    repeats = _count_repeats(tokenizer, input_ids, tokens_per_image)
    input_ids, labels = np.repeat(input_ids, repeats), np.repeat(labels, repeats)
    return torch.from_numpy(input_ids), torch.from_numpy(labels)


def _count_repeats(tokenizer, input_ids: np.ndarray, tokens_per_image: Sequence[int]) -> np.ndarray:
    """Return how often to repeat each token: `tokens_per_image` or once."""
    context_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
    is_known = context_id not in (None, tokenizer.unk_token_id)
    if tokens_per_image and not is_known:
        raise ValueError(f"the tokenizer does not know {IMG_CONTEXT_TOKEN} as one token: add it first")
    is_context = (input_ids == context_id) & is_known
    if is_context.sum() != len(tokens_per_image):  # the tokenizer may normalize other characters to this token
        raise UnusableSample(
            f"its text gives {is_context.sum()} {IMG_CONTEXT_TOKEN} tokens for {len(tokens_per_image)} images: remove "
            "what looks like this token"
        )
    repeats = np.ones_like(input_ids)
    repeats[is_context] = tokens_per_image
    return repeats


def _tokenize_messages(tokenizer, messages: list[list[Segment]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids and labels of each message, tokenized as one string."""
    encoded = tokenizer(
        ["".join(segment.text for segment in segments) for segments in messages],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    for ids, offsets, segments in zip(encoded.input_ids, encoded.offset_mapping, messages, strict=True):
        ids = np.array(ids, dtype=np.int64)
        yield ids, _build_labels(ids, offsets, segments)


def _build_labels(ids: np.ndarray, offsets: list[tuple[int, int]], segments: list[Segment]) -> np.ndarray:
    """Label the tokens that lie in segments with loss.

    A token across a segment border has no loss.

    Args:
        ids: (L,) tokens of the joined segments.
        offsets: (L, 2) first and last-plus-one character of each token.
    """
    labels = np.full_like(ids, IGNORE_INDEX)
    if not any(segment.has_loss for segment in segments):
        return labels
    token_starts, token_ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    # The space that some tokenizers (sentencepiece) put before a word claims the word's first character, which belongs
    # to the next token: such a token ends where the next one starts.
    token_ends_inside = np.minimum(token_ends, np.append(token_starts[1:], token_ends[-1:]))
    start = 0
    for text, has_loss in segments:
        end = start + len(text)
        if has_loss:
            # `token_ends > start`: where offsets are trimmed of white space, a line break before the segment has an
            # empty span on its border.
            is_inside = (token_starts >= start) & (token_ends > start) & (token_ends_inside <= end)
            labels[is_inside] = ids[is_inside]
        start = end
    return labels


# -- upstream's functions ----------------------------------------------------------------------------------------------


def preprocess(
    template_name: str,
    sources: Sequence[Sequence[dict]],
    tokenizer,
    num_image_token_list: Sequence[int],
    text_only: bool = False,
    group_by_length: bool = False,
    use_packed_ds: bool = False,
    ds_name: str | None = None,
    num_image: int = 1,
    rules: TemplateRules | None = None,
) -> dict[str, torch.Tensor]:
    """Tokenize, truncate and pad one conversation, with upstream's signature.

    Returns:
        input_ids, labels, attention_mask: (1, L), truncated to `tokenizer.model_max_length`. Padded to it on the right
        unless `group_by_length` or `use_packed_ds`; never for InternVL 3.5's gpt-oss template and plain text.

    Raises:
        UnusableSample: see `tokenize_turns`.
        ValueError: `sources` is not exactly one conversation.
    """
    if len(sources) != 1:
        raise ValueError(f"expected one conversation, got {len(sources)}")
    rules = rules or get_template_rules(template_name, sources[0])
    columns = tokenize_turns(template_name, sources[0], tokenizer, num_image_token_list[:num_image], text_only, rules)
    max_length = tokenizer.model_max_length
    input_ids, labels = (column[:max_length] for column in columns)
    if rules.pad_to_max_length and not (group_by_length or use_packed_ds):
        num_padding = max_length - len(input_ids)
        input_ids = torch.nn.functional.pad(input_ids, (0, num_padding), value=get_pad_id(tokenizer))
        labels = torch.nn.functional.pad(labels, (0, num_padding), value=IGNORE_INDEX)
    attention_mask = input_ids.ne(get_pad_id(tokenizer))
    return {"input_ids": input_ids[None], "labels": labels[None], "attention_mask": attention_mask[None]}


# Upstream has one function per template. Here the argument `template_name` selects the template, not the function. Only
# the last one has rules that no template name selects.
preprocess_mpt = preprocess_internlm = preprocess_phi3 = preprocess_internvl2_5 = preprocess
preprocess_pretrain = preprocess_internvl3_5_gpt_oss = preprocess
preprocess_internvl3_5_gpt_oss_with_think = partial(preprocess, rules=GPT_OSS_THINK_RULES)
