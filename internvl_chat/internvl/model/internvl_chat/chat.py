"""Dialogue with a model: question and tiles -> prompt -> generated ids -> answer. `InternVLChatModel` mixes this in."""

from itertools import takewhile

import torch

from internvl.conversation import get_conv_template

IMAGE = "<image>"


class ChatMixin:
    """`chat` and `batch_chat` on top of the model's `generate`, with upstream's arguments.

    `pixel_values` (T, 3, H, W) are the tiles of all images of all questions (history first), one after the other.
    `generation_config` is a dict of arguments for `generate` (`max_new_tokens`, `do_sample`, `streamer`, ...), left
    as it is. `history` is a list of (question, answer). An answer ends at the template's end marker or the tokenizer's
    own end-of-text token. It is text without special tokens; but under internvl3_5_gpt_oss, which marks its channels by
    such tokens, it keeps them and begins with `<|channel|>final<|message|>`, as `history` and upstream's users expect.
    """

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
        """Answers one question; with `return_history`, (answer, longer history).

        Args:
            num_patches_list: tiles of each image; default: all tiles belong to one image.

        Raises:
            ValueError: tiles and `num_patches_list` differ in number, or there are more images than `<image>`.
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
        """Answers several questions at once; with `return_history`, (answers, longer histories).

        Args:
            num_patches_list: for each question the tiles of its image, or a list with the tiles of each of its images
                (those of its history first); 0 or [] for none. Only without tiles may it be left out.
            history: for each question its history or None. `image_counts` is upstream's old name of `num_patches_list`.
        """
        patches = _patches(num_patches_list if image_counts is None else image_counts, pixel_values, len(questions))
        histories = [None] * len(questions) if history is None else history
        if len(histories) != len(questions):
            raise ValueError(f"{len(questions)} questions, but {len(histories)} histories")
        self.img_context_token_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)

        asked, prompts = [], []
        for question, tiles, earlier in zip(questions, patches, histories, strict=True):
            if earlier is None and tiles and IMAGE not in question:
                question = (IMAGE + "\n") * len(tiles) + question
            prompt = self._prompt(question, earlier or [])
            if prompt.count(IMAGE) < len(tiles):
                raise ValueError(
                    f"{len(tiles)} images, but {prompt.count(IMAGE)} {IMAGE} in the question and its history"
                )
            if verbose:
                print(prompt)
            for count in tiles:
                image = IMG_START_TOKEN + IMG_CONTEXT_TOKEN * (self.num_image_token * count) + IMG_END_TOKEN
                prompt = prompt.replace(IMAGE, image, 1)
            asked.append(question)
            prompts.append(prompt)

        answers = self._answer(tokenizer, pixel_values, prompts, generation_config)
        if not return_history:
            return answers
        longer = [[*(old or []), pair] for old, pair in zip(histories, zip(asked, answers, strict=True), strict=True)]
        return answers, longer

    def _prompt(self, question: str, history) -> str:
        """The dialogue so far, the question and an open answer, as the template renders them."""
        template = get_conv_template(self.template)
        template.system_message = self.system_message
        for earlier_question, earlier_answer in history:
            template.append_message(template.roles[0], earlier_question)
            template.append_message(template.roles[1], earlier_answer)
        template.append_message(template.roles[0], question)
        template.append_message(template.roles[1], None)
        return template.get_prompt()

    def _answer(self, tokenizer, pixel_values, prompts: list[str], generation_config: dict) -> list[str]:
        """Texts that follow the prompts (of different lengths: padded on the left, the tokenizer left as it was)."""
        padding_side = tokenizer.padding_side
        tokenizer.padding_side = "left"
        try:
            inputs = tokenizer(prompts, return_tensors="pt", padding=len(prompts) > 1)
        finally:
            tokenizer.padding_side = padding_side
        template = get_conv_template(self.template)
        end = end_marker(template)
        ends = {tokenizer.convert_tokens_to_ids(end), tokenizer.eos_token_id} - {None}
        device = self.get_input_embeddings().weight.device
        with torch.inference_mode():
            output = self.generate(
                pixel_values=pixel_values,
                input_ids=inputs["input_ids"].to(device),
                attention_mask=inputs["attention_mask"].to(device),
                **{"pad_token_id": tokenizer.pad_token_id, **generation_config, "eos_token_id": sorted(ends)},
            )
        answers = [list(takewhile(lambda index: index not in ends, row)) for row in output.tolist()]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=not has_channels(template))
        return [text.split(end)[0].strip() for text in texts]


def build_conversation(config):
    """The template that a chat model talks in, with its own system message if the config has one."""
    template = get_conv_template(config.template)
    own = getattr(config, "system_message", None)
    template.system_message = template.system_message if own is None else own
    return template


def has_channels(template) -> bool:
    """Whether special tokens mark what is thought and what is said, as in GPT-OSS."""
    return template.sep_style.name == "MPT_TWO"


def end_marker(template) -> str:
    """The token that ends an answer."""
    return (template.sep2 if has_channels(template) else template.sep).strip()


def _patches(num_patches_list, pixel_values, questions: int) -> list[list[int]]:
    """For each question the tiles of each of its images, checked against the number of questions and of tiles."""
    tiles = 0 if pixel_values is None else len(pixel_values)
    if num_patches_list is None:
        if tiles:
            raise ValueError(f"{tiles} tiles for {questions} questions: num_patches_list must say whose they are")
        num_patches_list = [[]] * questions
    if len(num_patches_list) != questions:
        raise ValueError(f"{questions} questions, but num_patches_list has {len(num_patches_list)} entries")
    patches = [[n for n in ([entry] if isinstance(entry, int) else entry) if n] for entry in num_patches_list]
    if (listed := sum(map(sum, patches))) != tiles:
        raise ValueError(f"num_patches_list speaks of {listed} tiles, pixel_values has {tiles}")
    return patches
