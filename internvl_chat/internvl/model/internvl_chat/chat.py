"""Chatting with the model.

Question and tiles -> prompt -> generated ids -> answer.
`InternVLChatModel` inherits `chat` and `batch_chat` from `ChatMixin`. This file is also written into checkpoints (see
`model/code_files.py`), and imports only torch and the templates.
"""

from itertools import takewhile
from typing import Any

import torch

from internvl.conversation import get_conv_template

IMAGE_PLACEHOLDER = "<image>"


class ChatMixin:
    """Methods `chat` and `batch_chat`, with upstream's arguments.

    - `pixel_values` (T, 3, H, W): the tiles of all images of all questions in order, those of a history first.
    - `generation_config`: a dict of arguments of `generate` (`max_new_tokens`, `do_sample`, `streamer`, ...). It is not
      modified. As in upstream, the settings of the checkpoint's `generation_config.json` are not used.
    - `history`: a list of (question, answer).

    An answer ends at the end marker of the template or the end-of-text token of the tokenizer. Special tokens are
    removed from its text, except under the template internvl3_5_gpt_oss, where they mark channels: the answer begins
    with `<|channel|>final<|message|>`, as in upstream. The history of the next prompt needs these tokens.
    """

    # Attributes of the model class that inherits from this mixin.
    template: Any
    system_message: str
    num_image_token: int
    get_input_embeddings: Any
    generate: Any

    def chat(
        self,
        tokenizer,
        pixel_values,
        question,
        generation_config,
        history=None,
        return_history=False,
        num_patches_list=None,
        IMG_START_TOKEN="<img>",
        IMG_END_TOKEN="</img>",
        IMG_CONTEXT_TOKEN="<IMG_CONTEXT>",
        verbose=False,
    ):
        """Answer one question.

        Args:
            num_patches_list: number of tiles of each image; default: all tiles belong to one image.

        Returns:
            The answer; with `return_history`, (answer, history with this question and answer).

        Raises:
            ValueError: `num_patches_list` does not sum to the number of tiles, or there are more images than `<image>`.
        """
        if num_patches_list is None:
            num_patches_list = [] if pixel_values is None else [len(pixel_values)]
        answers, histories = self.batch_chat(
            tokenizer,
            pixel_values,
            [question],
            generation_config,
            num_patches_list=[num_patches_list],
            history=[history],
            return_history=True,
            IMG_START_TOKEN=IMG_START_TOKEN,
            IMG_END_TOKEN=IMG_END_TOKEN,
            IMG_CONTEXT_TOKEN=IMG_CONTEXT_TOKEN,
            verbose=verbose,
        )
        return (answers[0], histories[0]) if return_history else answers[0]

    def batch_chat(
        self,
        tokenizer,
        pixel_values,
        questions,
        generation_config,
        num_patches_list=None,
        history=None,
        return_history=False,
        IMG_START_TOKEN="<img>",
        IMG_END_TOKEN="</img>",
        IMG_CONTEXT_TOKEN="<IMG_CONTEXT>",
        verbose=False,
        image_counts=None,
    ):
        """Answer several questions in one batch.

        Args:
            num_patches_list: for each question the number of tiles of its image, or a list with the number of tiles of
                each of its images (those of its history first); 0 or [] without images. Required if there are tiles.
            history: for each question its history or None.
            image_counts: upstream's former name of `num_patches_list`.

        Returns:
            The answers; with `return_history`, (answers, histories with these questions and answers).
        """
        num_patches_list = num_patches_list if image_counts is None else image_counts
        tile_counts = _normalize_tile_counts(num_patches_list, pixel_values, len(questions))
        histories = [None] * len(questions) if history is None else history
        if len(histories) != len(questions):
            raise ValueError(f"{len(questions)} questions, but {len(histories)} histories")
        self.img_context_token_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)

        full_questions, prompts = [], []
        for question, image_tiles, past in zip(questions, tile_counts, histories, strict=True):
            if past is None and image_tiles and IMAGE_PLACEHOLDER not in question:
                question = (IMAGE_PLACEHOLDER + "\n") * len(image_tiles) + question
            prompt = self.build_prompt(question, past or [])
            num_placeholders = prompt.count(IMAGE_PLACEHOLDER)
            if num_placeholders < len(image_tiles):
                raise ValueError(
                    f"{len(image_tiles)} images, but {num_placeholders} {IMAGE_PLACEHOLDER} in the question and its "
                    "history"
                )
            if verbose:
                print(prompt)
            for num_tiles in image_tiles:
                image = IMG_START_TOKEN + IMG_CONTEXT_TOKEN * (self.num_image_token * num_tiles) + IMG_END_TOKEN
                prompt = prompt.replace(IMAGE_PLACEHOLDER, image, 1)
            full_questions.append(question)
            prompts.append(prompt)

        answers = self._generate_answers(tokenizer, pixel_values, prompts, generation_config)
        if not return_history:
            return answers
        pairs = zip(full_questions, answers, strict=True)
        return answers, [[*(past or []), pair] for past, pair in zip(histories, pairs, strict=True)]

    def build_prompt(self, question: str, history) -> str:
        """Render history, question and the beginning of the answer by the template."""
        template = get_conv_template(self.template)
        template.system_message = self.system_message
        for earlier_question, earlier_answer in history:
            template.append_message(template.roles[0], earlier_question)
            template.append_message(template.roles[1], earlier_answer)
        template.append_message(template.roles[0], question)
        template.append_message(template.roles[1], None)
        return template.get_prompt()

    def _generate_answers(self, tokenizer, pixel_values, prompts: list[str], generation_config: dict) -> list[str]:
        """Generate the texts that follow the prompts.

        Shorter prompts are padded on the left. The tokenizer may have no token for padding, which is masked.
        """
        rows = tokenizer(prompts)["input_ids"]
        longest, pad_id = max(map(len, rows)), tokenizer.pad_token_id or 0
        input_ids = torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows])  # (B, L)
        attention_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        template = get_conv_template(self.template)
        end_marker = get_end_marker(template)
        end_ids = {tokenizer.convert_tokens_to_ids(end_marker), tokenizer.eos_token_id} - {None}
        device = self.get_input_embeddings().weight.device
        with torch.inference_mode():
            output = self.generate(
                pixel_values=pixel_values,
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                **{"pad_token_id": pad_id, **generation_config, "eos_token_id": sorted(end_ids) or None},
            )
        # A row that ended early is padded to the longest answer of the batch.
        answers = [list(takewhile(lambda token_id: token_id not in end_ids, row)) for row in output.tolist()]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=not has_channels(template))
        return [text.split(end_marker)[0].strip() for text in texts]


def build_conversation(config):
    """Build the conversation template of a chat model.

    A system message in the configuration replaces that of the template.
    """
    template = get_conv_template(config.template)
    system_message = getattr(config, "system_message", None)
    if system_message is not None:
        template.system_message = system_message
    return template


def has_channels(template) -> bool:
    """Return whether special tokens separate reasoning from the answer, as in GPT-OSS."""
    return template.sep_style.name == "MPT_TWO"


def get_end_marker(template) -> str:
    """Return the token that ends an answer."""
    return (template.sep2 if has_channels(template) else template.sep).strip()


def _normalize_tile_counts(num_patches_list, pixel_values, num_questions: int) -> list[list[int]]:
    """Normalize `num_patches_list` to the tile counts of each question's images.

    Raises:
        ValueError: the numbers do not match the questions or the tiles.
    """
    num_tiles = 0 if pixel_values is None else len(pixel_values)
    if num_patches_list is None:
        if num_tiles:
            raise ValueError(f"{num_tiles} tiles for {num_questions} questions: num_patches_list is required")
        num_patches_list = [[]] * num_questions
    if len(num_patches_list) != num_questions:
        raise ValueError(f"{num_questions} questions, but num_patches_list has {len(num_patches_list)} entries")
    tile_counts = [[n for n in ([entry] if isinstance(entry, int) else entry) if n] for entry in num_patches_list]
    if (num_listed := sum(map(sum, tile_counts))) != num_tiles:
        raise ValueError(f"num_patches_list sums to {num_listed} tiles, but pixel_values has {num_tiles}")
    return tile_counts
