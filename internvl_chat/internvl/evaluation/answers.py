"""Answer the questions of evaluation sets, through the model's own `batch_chat`.

    samples -> questions            questions.py; each rank reads its share
            -> batches              similar lengths, longest first; dealt out to the ranks
            -> answers              greedy; gathered on all ranks

Every rank runs equally many batches. Under ZeRO-3, where all ranks must run the same modules, a rank without questions
runs a short prompt.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from internvl.constants import UnusableSample
from internvl.data.chat_segments import IMAGE_PLACEHOLDER, IMAGE_TOKENS, get_template_rules
from internvl.data.images import normalize_tiles
from internvl.dist_utils import count_cores_per_rank, gather_objects, get_rank, get_world_size
from internvl.evaluation.evaluation_data import EvaluationData
from internvl.evaluation.model_mode import evaluation_mode
from internvl.evaluation.questions import Question, build_question
from internvl.evaluation.sample_measurement import wait_for_batches
from internvl.evaluation.settings import EvaluationSettings
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.zero3 import is_partitioned
from internvl.planning.packed_dataset import PackedDataset
from internvl.runtime.dataloader_workers import build_worker_loader

SHORT_PROMPT = "?"  # of a rank without questions


class MeasuredQuestion(NamedTuple):
    """A question and the number of tokens of its prompt."""

    question: Question
    num_tokens: int


class Answers(NamedTuple):
    """Answers by sample, and the unusable samples with their file, line and reason."""

    texts: dict[int, str]
    skipped: list[str]


def generate_answers(
    model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase, data: EvaluationData, settings: EvaluationSettings
) -> dict[int, str]:
    """Answer the questions of the sets that have a metric. A collective.

    Args:
        model: not wrapped by an engine.

    Returns:
        Answers by sample, the same on every rank. Samples that turn out to be unusable are reported and left out.
    """
    samples = select_samples(data, settings.num_samples)
    answers = answer_questions(model, tokenizer, data.dataset, samples, settings)
    settings.report_skipped_fn(answers.skipped)
    return answers.texts


def select_samples(data: EvaluationData, num_samples: int | None) -> list[int]:
    """Select the samples that are answered: of each set with a metric, `num_samples`.

    A set's name is the seed, so they are the same in every evaluation.
    """
    return [
        sample
        for position, entry in enumerate(data.sets)
        if entry.metric
        for sample in draw_samples(entry.name, data.list_samples(position), num_samples)
    ]


def draw_samples(set_name: str, samples: Sequence[int], num_samples: int | None) -> list[int]:
    """Draw samples of a set, in their order; None draws all."""
    if num_samples is None or num_samples >= len(samples):
        return list(samples)
    generator = np.random.default_rng([*set_name.encode()])
    return sorted(generator.choice(samples, num_samples, replace=False).tolist())


def answer_questions(
    model: InternVLChatModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PackedDataset,
    samples: Sequence[int],
    settings: EvaluationSettings,
    shows_progress: bool = True,
) -> Answers:
    """Answer the questions of samples greedily. A collective.

    Returns:
        The same on every rank.
    """
    questions, skipped = read_questions(model, tokenizer, dataset, samples)
    batches = plan_batches(questions, settings.batch_size)
    num_rounds = -(-len(batches) // get_world_size())
    batches_of_rank = batches[get_rank() :: get_world_size()]
    batches_of_rank += [[]] * (num_rounds - len(batches_of_rank))
    is_synchronized = get_world_size() > 1 and any(map(is_partitioned, model.parameters()))
    max_tiles = max((sum(sum(questions[s].question.num_tiles) for s in batch) for batch in batches), default=0)
    loader = build_worker_loader(
        _QuestionTiles(dataset, questions),
        batches_of_rank,
        _collate_tiles,
        num_workers=min(settings.num_workers, count_cores_per_rank(), num_rounds),
        max_batch_bytes=max_tiles * 3 * dataset.datasets[0].data_args.force_image_size ** 2,
        multiprocessing_context=settings.multiprocessing_context,
        is_pinned=torch.cuda.is_available(),
    )
    answers: dict[int, str] = {}
    skipped_on_rank: list[str] = []
    with evaluation_mode(model):
        for batch in wait_for_batches(loader, "Answering questions", shows_progress):
            skipped_on_rank += batch["skipped"]
            batch_questions = [questions[sample].question for sample in batch["samples"]]
            if batch_questions or is_synchronized:
                texts = answer_batch(
                    model, tokenizer, batch_questions, batch["pixel_values"], settings, is_synchronized
                )
                answers |= zip(batch["samples"], texts, strict=True)
            settings.check_stop_fn()
    gathered = gather_objects((answers, skipped_on_rank))
    merged = {sample: text for of_rank, _ in gathered for sample, text in of_rank.items()}
    skipped += [sentence for _, of_rank in gathered for sentence in of_rank]
    return Answers({sample: merged[sample] for sample in samples if sample in merged}, skipped)


# -- questions ---------------------------------------------------------------------------------------------------------


def read_questions(
    model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase, dataset: PackedDataset, samples: Sequence[int]
) -> tuple[dict[int, MeasuredQuestion], list[str]]:
    """Read and measure the questions of samples. A collective.

    Returns:
        Questions by sample, and the unusable samples with their reasons; the same on every rank.
    """
    questions, skipped = {}, []
    for sample in samples[get_rank() :: get_world_size()]:
        source, index = dataset.locate(sample)
        try:
            question = build_question(source, index)
            questions[sample] = MeasuredQuestion(question, count_prompt_tokens(model, tokenizer, question))
        except UnusableSample as error:
            skipped.append(f"{source.describe(index)}: {error}")
    all_questions, all_skipped = {}, []
    for questions_of_rank, skipped_of_rank in gather_objects((questions, skipped)):
        all_questions |= questions_of_rank
        all_skipped += skipped_of_rank
    return all_questions, all_skipped


def count_prompt_tokens(model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase, question: Question) -> int:
    """Count the tokens of a question's prompt, image tokens included.

    Raises:
        UnusableSample: something in the text becomes an image token.
    """
    with use_system_message(model, question.system_message):
        prompt = model.build_prompt(question.text, question.history)
    num_images = len(question.num_tiles)
    ids = tokenizer(prompt.replace(IMAGE_PLACEHOLDER, "".join(IMAGE_TOKENS), num_images))["input_ids"]
    # The tokenizer may normalize other characters to this token.
    if ids.count(tokenizer.convert_tokens_to_ids(IMAGE_TOKENS[1])) != num_images:
        raise UnusableSample(f"its text contains what becomes {IMAGE_TOKENS[1]}: remove it")
    return len(ids) + sum(question.num_tiles) * model.num_image_token - num_images


def plan_batches(questions: Mapping[int, MeasuredQuestion], batch_size: int) -> list[list[int]]:
    """Plan batches of samples with similar prompt lengths, the longest first.

    The questions of a batch have the same system message, which `batch_chat` takes from the model.
    """

    def get_length(sample: int) -> int:
        return questions[sample].num_tokens

    def get_system_message(sample: int) -> tuple[bool, str]:
        message = questions[sample].question.system_message
        return message is not None, message or ""

    batches = []
    for _, group in groupby(sorted(questions, key=get_system_message), get_system_message):
        samples = sorted(group, key=lambda sample: (-get_length(sample), sample))
        batches += [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    return sorted(batches, key=lambda batch: (-get_length(batch[0]), batch[0]))


@contextmanager
def use_system_message(model: InternVLChatModel, message: str | None) -> Iterator[None]:
    """Replace the model's system message, within a context, unless it is None."""
    own_message = model.system_message
    model.system_message = own_message if message is None else message
    try:
        yield
    finally:
        model.system_message = own_message


# -- tiles -------------------------------------------------------------------------------------------------------------


class _QuestionTiles(Dataset):
    """Tiles of the samples of a batch, for a DataLoader."""

    def __init__(self, dataset: PackedDataset, questions: Mapping[int, MeasuredQuestion]):
        self.dataset, self.questions = dataset, questions

    def __getitem__(self, sample: int) -> dict:
        """Return `sample`, `images` (the tiles of each, (T, 3, S, S)), and `skipped`, why it is unusable."""
        source, index = self.dataset.locate(sample)
        try:
            images = source.load_image_tiles(index)
            num_tiles, expected = [len(tiles) for tiles in images], self.questions[sample].question.num_tiles
            if num_tiles != expected:
                raise UnusableSample(f"its images have {num_tiles} tiles, measured were {expected}: a file changed")
        except UnusableSample as error:
            return {"sample": sample, "images": [], "skipped": f"{source.describe(index)}: {error}"}
        return {"sample": sample, "images": images, "skipped": None}


def _collate_tiles(items: Sequence[dict]) -> dict:
    """Collate to `samples`, `pixel_values` of all their tiles or None, and `skipped`."""
    tiles = [tiles for item in items for tiles in item["images"]]
    return {
        "samples": [item["sample"] for item in items if not item["skipped"]],
        "pixel_values": torch.cat(tiles) if tiles else None,
        "skipped": [item["skipped"] for item in items if item["skipped"]],
    }


# -- answers -----------------------------------------------------------------------------------------------------------


def answer_batch(
    model: InternVLChatModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    pixel_values: torch.Tensor | None,
    settings: EvaluationSettings,
    is_synchronized: bool,
) -> list[str]:
    """Answer questions that have the same system message.

    Args:
        questions: none for a rank that only runs the modules with the others.
        pixel_values: (T, 3, S, S) uint8, the tiles of all questions.
        is_synchronized: go on until all ranks have their answers.
    """
    generation_config = {
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": settings.max_new_tokens if questions else 1,
        "synced_gpus": is_synchronized,
    }
    if pixel_values is not None:
        pixel_values = pixel_values.to(model.device, non_blocking=True)
        pixel_values = normalize_tiles(pixel_values, settings.image_mean, settings.image_std)
    system_message = questions[0].system_message if questions else None
    with settings.autocast_fn(), use_system_message(model, system_message):
        texts: Any = model.batch_chat(
            tokenizer,
            pixel_values,
            [question.text for question in questions] or [SHORT_PROMPT],
            generation_config,
            num_patches_list=[question.num_tiles for question in questions] or [[]],
            history=[question.history for question in questions] or [[]],
        )
    return [extract_final_answer(model.template, text) for text in texts[: len(questions)]]


def extract_final_answer(template_name: str, text: str) -> str:
    """Remove the mark of gpt-oss's channel from an answer."""
    mark = get_template_rules(template_name, []).format_answer("")
    return text.rpartition(mark)[2].strip() if mark else text
