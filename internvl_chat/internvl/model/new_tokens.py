"""Tokens that a user has added to a tokenizer, and that the LLM has no rows for yet."""

from transformers import PreTrainedTokenizerBase

from internvl.constants import SPECIAL_TOKENS


def find_new_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[int, str]:
    """Find the tokens beyond the rows of the embeddings: id -> token.

    InternVL's own image tokens are left out: a composed model gets their rows as upstream's does.

    Args:
        vocab_size: number of rows of the LLM's embeddings, before they are resized.
    """
    new = {index: token for token, index in tokenizer.get_vocab().items() if index >= vocab_size}
    return {index: new[index] for index in sorted(new) if new[index] not in SPECIAL_TOKENS}
