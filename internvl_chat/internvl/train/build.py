"""Arguments -> tokenizer, model, data, trainer: the only file that knows both the command line and the objects."""

import logging
import os
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import get_last_checkpoint

from internvl.conversation import conv_templates
from internvl.dist_utils import from_first_rank, init_deepspeed
from internvl.model.checkpoint import add_special_tokens, resize_image
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.tokenizer import load_tokenizer
from internvl.train.arguments import DataTrainingArguments, ModelArguments, TrainingArguments
from internvl.train.collator import concat_pad_data_collator
from internvl.train.constants import IMG_CONTEXT_TOKEN, SPECIAL_TOKENS
from internvl.train.dataset import LazySupervisedDataset, load_meta
from internvl.train.dataset_packed import RowDataset
from internvl.train.lengths import measure
from internvl.train.plan import plan_epoch
from internvl.train.trainable import set_trainable, trainable_table
from internvl.train.trainer import InternVLTrainer, too_many_bad_samples

logger = logging.getLogger(__name__)

# Flags of upstream that do not act yet: refused when set, rather than ignored.
UNSUPPORTED = ("vision_path", "llm_path", "mlp_path", "use_liger", "use_data_resampling", "use_packed_ds")


class Data(NamedTuple):
    """The training data of a run, and what measuring told about it (arrays over all samples, in order)."""

    rows: RowDataset
    tokens: np.ndarray
    tiles: np.ndarray
    bad_samples: list[str]

    @property
    def usable(self) -> np.ndarray:
        return self.tokens > 0


def check(model_args: ModelArguments, data_args: DataTrainingArguments) -> None:
    """Refuse what can be seen to be wrong from the command line alone."""
    for args in (model_args, data_args):
        for name in UNSUPPORTED:
            if getattr(args, name, None):
                raise ValueError(f"--{name} {getattr(args, name)}: not supported yet.")
    if not model_args.model_name_or_path:
        raise ValueError("--model_name_or_path is missing: which checkpoint shall the run start from?")
    if not data_args.meta_path:
        raise ValueError("--meta_path is missing: which JSON file lists the data sets?")
    if not 1 <= data_args.min_dynamic_patch <= data_args.max_dynamic_patch:
        raise ValueError(
            f"--min_dynamic_patch {data_args.min_dynamic_patch} --max_dynamic_patch {data_args.max_dynamic_patch}: "
            "fewest and most tiles of an image are at least 1, and the fewest not above the most."
        )
    if data_args.conv_style not in conv_templates:
        raise ValueError(f"--conv_style {data_args.conv_style}: known templates are {', '.join(conv_templates)}.")


def build_tokenizer(model_args: ModelArguments, data_args: DataTrainingArguments) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; `model_max_length` carries --max_seq_length to the data path."""
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    tokenizer.model_max_length = data_args.max_seq_length
    return tokenizer


def build_model(
    model_args: ModelArguments,
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> InternVLChatModel:
    """Load the checkpoint, fit it to the flags, freeze and wrap it."""
    if training_args.deepspeed:
        init_deepspeed()
    config = build_config(model_args, data_args)
    dtype = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32
    model = InternVLChatModel.from_pretrained(model_args.model_name_or_path, config=config, dtype=dtype)
    fit(model, tokenizer, data_args.force_image_size)
    model.config.use_cache = model.language_model.config.use_cache = False
    if model_args.grad_checkpoint:
        # Not reentrant: adapters in a frozen tower get gradients although its input needs none.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    set_seed(training_args.seed)  # the same adapters to begin with, whatever loading drew
    set_trainable(model, model_args)
    if not training_args.deepspeed:  # DeepSpeed keeps fp32 master weights by itself
        cast_trainable(model, torch.float32)
    logger.info("what trains:\n%s", trainable_table(model, training_args.learning_rate))
    return model


def build_config(model_args: ModelArguments, data_args: DataTrainingArguments) -> InternVLChatConfig:
    """The checkpoint's configuration with what the flags override."""
    config = InternVLChatConfig.from_pretrained(model_args.model_name_or_path)
    if config.downsample_ratio != data_args.down_sample_ratio:
        raise ValueError(
            f"--down_sample_ratio {data_args.down_sample_ratio} differs from the checkpoint's "
            f"{config.downsample_ratio}; the projector only fits the latter."
        )
    if config.template not in (None, data_args.conv_style):
        logger.warning("the checkpoint speaks template %s, --conv_style is %s", config.template, data_args.conv_style)
    config.vision_config.drop_path_rate = model_args.drop_path_rate
    config.select_layer = model_args.vision_select_layer
    config.ps_version = model_args.ps_version
    config.template = data_args.conv_style
    for name in ("dynamic_image_size", "use_thumbnail", "min_dynamic_patch", "max_dynamic_patch", "pad2square"):
        setattr(config, name, getattr(data_args, name))
    return config


def fit(model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase, image_size: int) -> None:
    """Give model and tokenizer the image tokens they lack, and the model position embeddings for tiles of this size."""
    missing = sorted(set(SPECIAL_TOKENS) - tokenizer.get_vocab().keys())
    size = model.config.vision_config.image_size
    if is_deepspeed_zero3_enabled() and (missing or size != image_size):
        raise ValueError(
            f"the checkpoint has tiles of {size} pixels and lacks {len(missing)} image tokens; with --force_image_size "
            f"{image_size} its weights must change, which ZeRO-3 cannot do: use ZeRO-2 for the first run."
        )
    if missing:
        logger.info("adding the image tokens %s", ", ".join(missing))
        add_special_tokens(model, tokenizer, SPECIAL_TOKENS)
    model.img_context_token_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
    if size != image_size:
        resize_image(model, image_size)


def cast_trainable(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def build_data(
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    num_image_token: int,
) -> Data:
    """Open the data sets of the meta file and measure every sample: rank 0 measures, all ranks receive."""
    datasets = [
        LazySupervisedDataset(name, meta, tokenizer, num_image_token, data_args, seed=training_args.seed)
        for name, meta in load_meta(data_args.meta_path).items()
    ]
    lengths = from_first_rank(lambda: [measure(dataset, num_workers=os.cpu_count()) for dataset in datasets])
    bad = [
        f"{dataset.describe(index)}: {reason}"
        for dataset, measured in zip(datasets, lengths, strict=True)
        for index, reason in measured.bad
    ]
    data = Data(
        rows=RowDataset(datasets),
        tokens=np.concatenate([measured.tokens for measured in lengths]),
        tiles=np.concatenate([measured.tiles for measured in lengths]),
        bad_samples=bad,
    )
    for sentence in bad[:20]:
        logger.warning("left out: %s", sentence)
    if len(bad) > allowed_bad_samples(data_args, len(data.tokens)) or not data.usable.any():
        raise too_many_bad_samples(bad, allowed_bad_samples(data_args, len(data.tokens)))
    return data


def allowed_bad_samples(data_args: DataTrainingArguments, samples: int) -> int:
    """--max_bad_samples as a count."""
    limit = data_args.max_bad_samples
    return int(limit * samples) if limit < 1 else int(limit)


def build_trainer(
    model: InternVLChatModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
) -> InternVLTrainer:
    """Plan the epochs and put everything into a trainer."""
    planned = partial(
        plan_epoch,
        data.tokens,
        usable=data.usable,
        seed=training_args.seed,
        world_size=training_args.world_size,
        micro_batch=training_args.per_device_train_batch_size,
        accumulation=training_args.gradient_accumulation_steps,
        group_by_length=training_args.group_by_length,
    )
    plan = lru_cache(maxsize=2)(lambda epoch: planned(epoch=epoch))
    logger.info(
        "%d samples (%d left out), %d tokens and %d tiles an epoch, in %d steps",
        data.usable.sum(),
        len(data.bad_samples),
        data.tokens.sum(),
        data.tiles.sum(),
        len(plan(0)),
    )
    return InternVLTrainer(
        model=model,
        args=training_args,
        train_dataset=data.rows,
        data_collator=partial(concat_pad_data_collator, pad_id=tokenizer.pad_token_id),
        processing_class=tokenizer,
        plan=plan,
        bad_samples=data.bad_samples,
        max_bad_samples=allowed_bad_samples(data_args, len(data.tokens)),
    )


def resume_point(training_args: TrainingArguments) -> str | None:
    """The checkpoint to go on from: the one asked for, else the last one in the output folder.

    Raises:
        ValueError: there is no such checkpoint; or the output folder holds a finished model and may not be overwritten.
    """
    if asked := training_args.resume_from_checkpoint:
        if not (Path(asked) / "trainer_state.json").is_file():
            raise ValueError(f"--resume_from_checkpoint {asked}: no checkpoint (no trainer_state.json) there.")
        return asked
    folder = Path(training_args.output_dir)
    if training_args.overwrite_output_dir or not folder.is_dir():
        return None
    last = get_last_checkpoint(str(folder))
    if last:
        logger.info("resuming from %s; --overwrite_output_dir starts afresh", last)
    elif (folder / "config.json").exists():
        raise ValueError(
            f"--output_dir {folder} holds a finished model and no checkpoint to resume from: choose another folder, "
            "or say --overwrite_output_dir True."
        )
    return last
