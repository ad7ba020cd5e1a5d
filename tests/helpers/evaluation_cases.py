"""A model with every kind of noise in training, and evaluation sets of every kind of sample."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from helpers.lora_models import add_lora, randomize_adapters
from helpers.samples import make_turns
from helpers.tiny_models import TINY_LLM, TINY_LLMS, TINY_VITS, randomize_weights
from helpers.token_loss_cases import add_head_lora
from PIL import Image

from internvl.arguments.data import DataTrainingArguments
from internvl.constants import IMG_CONTEXT_TOKEN
from internvl.data.images import NORMALIZATION_STATS, normalize_tiles
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.evaluation.evaluation_data import EvaluationData, EvaluationSet
from internvl.evaluation.settings import EvaluationSettings
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.planning.packed_dataset import PackedDataset
from internvl.planning.sample_lengths import measure_dataset

# Set -> records, or number of records and image files of each.
TEXTS = [make_turns(f"Question {i}?", "An answer. " * (1 + i), "And?", f"No, {i}.") for i in range(5)]
SETS = {
    "one_tile": ["small.png"],
    "tiles": ["wide.png", ["small.png", "wide.png"]],
    "texts": [None] * 5,
    "base": [None, "small.png"],
}
BASE_SET = "base"
NUM_SAMPLES = sum(map(len, SETS.values()))


def make_record(index: int, images: str | list[str] | None) -> dict:
    turns = TEXTS[index]
    if images is None:
        return {"conversations": turns}
    num_images = 1 if isinstance(images, str) else len(images)
    question = "<image>\n" * num_images + turns[0]["value"]
    return {"image": images, "conversations": [turns[0] | {"value": question}, *turns[1:]]}


def write_evaluation_sets(folder: Path, sets: dict[str, list] = SETS) -> None:
    """Write the annotation file of each set, and the images."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    noise.save(folder / "small.png")
    noise.resize((300, 60)).save(folder / "wide.png")
    for name, images in sets.items():
        records = [make_record(index, files) for index, files in enumerate(images)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))


def open_evaluation_sets(folder: Path, tokenizer_path: Path, sets: dict[str, list] = SETS) -> EvaluationData:
    """Open the sets that `write_evaluation_sets` has written."""
    tokenizer = load_tokenizer(tokenizer_path)
    flags = {"force_image_size": 56, "dynamic_image_size": True, "use_thumbnail": True, "max_dynamic_patch": 4}
    data_args = DataTrainingArguments(conv_style="internvl2_5", **flags)
    datasets = [
        LazySupervisedDataset(
            name, {"root": str(folder), "annotation": str(folder / f"{name}.jsonl")}, tokenizer, 4, data_args
        )
        for name in sets
    ]
    measured = [measure_dataset(dataset, cache_dir=str(folder / "cache"), show_progress=False) for dataset in datasets]
    lengths = np.concatenate([measurements.lengths for measurements in measured])
    splits = {BASE_SET: "base_answers"}
    entries = [EvaluationSet(name=name, split=splits.get(name, "eval")) for name in sets]
    return EvaluationData(dataset=PackedDataset(datasets, lengths), sets=entries, lengths=lengths)


def make_settings(max_tokens: int = 512, max_tiles: int = 16, **changes) -> EvaluationSettings:
    mean, std = NORMALIZATION_STATS["imagenet"]
    values = {"batch_size": 2, "max_new_tokens": 8, "num_samples": None, "image_mean": mean, "image_std": std}
    return EvaluationSettings(max_tokens=max_tokens, max_tiles=max_tiles, **values | changes)


def build_noisy_model(tokenizer, llm: str = "qwen2", **llm_fields) -> InternVLChatModel:
    """Build a model in training mode, with adapters that have an effect, dropout and drop path."""
    torch.manual_seed(0)
    config = InternVLChatConfig(
        TINY_VITS["300M"] | {"drop_path_rate": 0.4},
        TINY_LLM | TINY_LLMS[llm] | {"attention_dropout": 0.2} | llm_fields,
        template="internvl2_5",
        force_image_size=56,
    )
    model = InternVLChatModel(config)
    randomize_weights(model, 0.2)
    add_lora(model, "both", dropout=0.4)
    randomize_adapters(model, std=0.2)
    model.img_context_token_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
    return model.train()


def build_model_with_adapted_head(tokenizer) -> InternVLChatModel:
    model = build_noisy_model(tokenizer)
    model.language_model = model.language_model.unload()
    add_head_lora(model)
    randomize_adapters(model, std=0.2)
    return model.train()


# Name -> function that builds the model for a tokenizer.
MODELS = {
    "adapters": build_noisy_model,
    "head": build_model_with_adapted_head,
    "experts": partial(build_noisy_model, llm="qwen3_moe", output_router_logits=True),
}
# (max_tokens, max_tiles) of a row: all samples in one, several rows, one sample a row.
ROW_SIZES = [(2000, 100), (300, 12), (150, 12)]
# Entries of DeepSpeed's configuration; none without DeepSpeed.
ZERO_CONFIGS = {
    "none": {},
    **{f"zero{n}": {"zero_optimization": {"stage": n}} for n in (1, 2)},
    # Small parameters are partitioned, too.
    "zero3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "zero3-bf16": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
}


def compute_losses_by_transformers(model: InternVLChatModel, data: EvaluationData) -> list[tuple[float, int, int]]:
    """Compute the sum of the cross entropy, loss tokens and correct tokens of each sample.

    This is independent of the token loss: one sample at a time, the LLM's own logits, and a cross entropy in float64.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    results = []
    for sample in range(len(data.lengths)):
        dataset, index = data.dataset.locate(sample)
        row = dataset.get(index, 0)
        labels = row["labels"][1:]
        with torch.no_grad():
            tiles = normalize_tiles(row["pixel_values"], *NORMALIZATION_STATS["imagenet"])
            embeds = model.embed_inputs(row["input_ids"][None], tiles, row["image_flags"])
            logits = model.language_model(inputs_embeds=embeds).logits[0, :-1].double()
        loss = F.cross_entropy(logits, labels, reduction="sum")  # -100 is ignored
        is_correct = (logits.argmax(-1) == labels)[labels != -100]
        results.append((loss.item(), len(is_correct), int(is_correct.sum())))
    for module, is_training in modes:
        module.training = is_training
    return results
