"""Tokens that a user has added to a tokenizer, and that the LLM has no rows for yet."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from internvl.constants import SPECIAL_TOKENS


def find_new_tokens(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, untrained_ids: Iterable[int] | None = None
) -> dict[int, str]:
    """Find the tokens that have no trained row: id -> token.

    These are the tokens beyond the rows of the embeddings, and those that earlier runs added without training them.

    InternVL's own image tokens are left out: a composed model gets their rows as upstream's does.

    Args:
        vocab_size: number of rows of the LLM's embeddings, before they are resized.
        untrained_ids: `untrained_token_ids` of the configuration.
    """
    known = set(untrained_ids or ())
    new = {index: token for token, index in tokenizer.get_vocab().items() if index >= vocab_size or index in known}
    return {index: new[index] for index in sorted(new) if new[index] not in SPECIAL_TOKENS}
