"""Turns of a record -> (input_ids, labels).

`segments.py` cuts a conversation into what is trained and what is only read. Here the text is tokenised in one piece
where the template was trained so, and the tokenizer's offsets carry the cuts over to the tokens. One road for all
templates; `dataset.py` calls `tokenize_turns`, upstream's functions are the same with truncation and padding.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from internvl.constants import IGNORE_INDEX, IMG_CONTEXT_TOKEN
from internvl.data.chat_segments import (
    IMAGE_TOKENS,
    PRETRAIN,
    WITH_THINK,
    Segment,
    TemplateRules,
    rules_for_record,
    split_into_segments,
)


def tokenize_turns(
    template_name: str,
    turns: Sequence[dict],
    tokenizer,
    image_tokens: Sequence[int],
    text_only: bool = False,
    rules: TemplateRules | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of one conversation, neither truncated nor padded.

    Args:
        turns: the record's `conversations`: `{"from": "system" (first only) | "human" | "gpt", "value": text}`; for
            internvl3_5_gpt_oss also "function"; or one turn from "pretrain", whose text is trained without a template.
        tokenizer: a fast one; what it puts in front of a text by itself (a bos) stands once, in front of all.
        image_tokens: number of image tokens of each image; the j-th `<image>` in human turns becomes the j-th image.
        text_only: leave `<image>` as it is written.
        rules: in place of the template's own.

    Returns:
        input_ids, labels: int64 (L,); labels are IGNORE_INDEX outside answers and their end markers.

    Raises:
        BadSample: no turns, an unknown role, a value that is no text, fewer placeholders than images.
        ValueError: the tokenizer lacks the image token.
    """
    rules = rules or rules_for_record(template_name, turns)
    image_tokens = () if text_only else image_tokens
    messages = split_into_segments(template_name, turns, len(image_tokens), rules)
    bos = tokenizer("").input_ids if tokenizer.num_special_tokens_to_add() else []
    pieces = [(bos, [IGNORE_INDEX] * len(bos)), *_tokenize(tokenizer, messages)]
    input_ids, labels = (np.concatenate(column).astype(np.int64) for column in zip(*pieces, strict=True))
    if rules is PRETRAIN:
        labels[np.isin(input_ids, tokenizer.convert_tokens_to_ids(IMAGE_TOKENS))] = IGNORE_INDEX
    if image_tokens:
        repeats = _image_repeats(tokenizer, input_ids, image_tokens)
        input_ids, labels = np.repeat(input_ids, repeats), np.repeat(labels, repeats)
    return torch.from_numpy(input_ids), torch.from_numpy(labels)


def _image_repeats(tokenizer, input_ids: np.ndarray, image_tokens: Sequence[int]) -> np.ndarray:
    """How often each id is to stand in the end: an image's token as often as the image needs, any other once."""
    places = input_ids == tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
    if places.sum() != len(image_tokens):
        raise ValueError(f"the tokenizer does not know {IMG_CONTEXT_TOKEN} as one token; add it first")
    repeats = np.ones_like(input_ids)
    repeats[places] = image_tokens
    return repeats


def _tokenize(tokenizer, messages: list[list[Segment]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and labels of each message, whose segments are tokenised as one string."""
    encoded = tokenizer(
        ["".join(segment.text for segment in segments) for segments in messages],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    for ids, offsets, segments in zip(encoded.input_ids, encoded.offset_mapping, messages, strict=True):
        ids = np.array(ids, dtype=np.int64)
        yield ids, _labels(ids, offsets, segments)


def _labels(ids: np.ndarray, offsets: list[tuple[int, int]], segments: list[Segment]) -> np.ndarray:
    """Labels of a message; a token that reaches over a cut is not trained."""
    labels = np.full_like(ids, IGNORE_INDEX)
    if not any(segment.trained for segment in segments):
        return labels
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    # The space that some tokenizers put in front of a word claims the word's first character; it ends where it starts.
    inner_ends = np.minimum(ends, np.append(starts[1:], ends[-1:]))
    begin = 0
    for text, trained in segments:
        end = begin + len(text)
        if trained:
            # `ends > begin`: where offsets are trimmed of white space, a line break before the cut lies empty on it.
            inside = (starts >= begin) & (ends > begin) & (inner_ends <= end)
            labels[inside] = ids[inside]
        begin = end
    return labels


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
    """Upstream's call: `tokenize_turns` of the one conversation in `sources`, cut at `tokenizer.model_max_length`.

    Returns:
        input_ids, labels, attention_mask: (1, L); padded on the right to `model_max_length` unless `group_by_length` or
        `use_packed_ds`; never for InternVL 3.5's gpt-oss template and plain text.

    Raises:
        BadSample: as `tokenize_turns`. ValueError: not exactly one conversation.
    """
    if len(sources) != 1:
        raise ValueError(f"expected one conversation, got {len(sources)}")
    rules = rules or rules_for_record(template_name, sources[0])
    columns = tokenize_turns(template_name, sources[0], tokenizer, num_image_token_list[:num_image], text_only, rules)
    longest = tokenizer.model_max_length
    input_ids, labels = (column[:longest] for column in columns)
    if rules.padded and not (group_by_length or use_packed_ds):
        missing = longest - len(input_ids)
        input_ids = torch.nn.functional.pad(input_ids, (0, missing), value=tokenizer.pad_token_id)
        labels = torch.nn.functional.pad(labels, (0, missing), value=IGNORE_INDEX)
    attention_mask = input_ids.ne(tokenizer.pad_token_id)
    return {"input_ids": input_ids[None], "labels": labels[None], "attention_mask": attention_mask[None]}


# The template, not the name of the function, decides; but for the last, which is no template's own.
preprocess_mpt = preprocess_internlm = preprocess_phi3 = preprocess_internvl2_5 = preprocess
preprocess_pretrain = preprocess_internvl3_5_gpt_oss = preprocess
preprocess_internvl3_5_gpt_oss_with_think = partial(preprocess, rules=WITH_THINK)
