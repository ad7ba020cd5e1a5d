"""Arguments -> tokenizer, model, data, trainer: the only file that knows both the command line and the objects."""

import logging
import os
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from internvl.dist_utils import from_first_rank, init_deepspeed
from internvl.model.checkpoint import add_special_tokens, compose, load_projector, resize_image
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.merging import merge_adapters
from internvl.model.internvl_chat.trained import note_of_base
from internvl.model.liger import use_liger_kernels
from internvl.model.lora import FLAGS, RANKS
from internvl.model.tokenizer import load_tokenizer
from internvl.train.arguments import DataTrainingArguments, ModelArguments, TrainingArguments
from internvl.train.collator import concat_pad_data_collator
from internvl.train.constants import IMG_CONTEXT_TOKEN, SPECIAL_TOKENS
from internvl.train.dataset import LazySupervisedDataset, load_meta
from internvl.train.dataset_packed import RowDataset
from internvl.train.image import NORMALIZE
from internvl.train.lengths import Lengths, measure
from internvl.train.plan import plan_epoch
from internvl.train.quantize import quantization
from internvl.train.trainable import goes_on, rates, set_trainable, trainable_table, trained_parts
from internvl.train.trainer import InternVLTrainer, too_many_bad_samples

logger = logging.getLogger(__name__)


class Data(NamedTuple):
    """The training data of a run, and what measuring told about it (arrays over all samples, in order)."""

    rows: RowDataset
    tokens: np.ndarray
    tiles: np.ndarray
    bad_samples: list[str]
    weights: np.ndarray | None  # how often each sample is drawn relative to the others; None: all once an epoch

    @property
    def usable(self) -> np.ndarray:
        return self.tokens > 0


def build_tokenizer(model_args: ModelArguments, data_args: DataTrainingArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of the chat checkpoint, else of the language model; `model_max_length` carries --max_seq_length."""
    tokenizer = load_tokenizer(model_args.model_name_or_path or model_args.llm_path)
    tokenizer.model_max_length = data_args.max_seq_length
    return tokenizer


def build_model(
    model_args: ModelArguments,
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    model_class: type[InternVLChatModel] = InternVLChatModel,
) -> InternVLChatModel:
    """Load the checkpoint, fit it to the flags, freeze and wrap it."""
    model = load_model(model_args, data_args, training_args, tokenizer, model_class)
    if model_args.grad_checkpoint:
        # Not reentrant: adapters in a frozen tower get gradients although its input needs none.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    set_seed(training_args.seed)  # the same adapters to begin with, whatever loading drew
    set_trainable(model, model_args)
    if not training_args.deepspeed or training_args.lora_fp32:  # else DeepSpeed keeps fp32 master weights by itself
        cast_trainable(model, torch.float32)
    if model_args.quantize_backbone or model_args.quantize_llm:
        model._hf_peft_config_loaded = True  # to transformers: there are adapters (in the parts)
    logger.info("what trains:\n%s", trainable_table(model, training_args))
    model.config.training_settings = {
        part: rates(training_args, part) | {"quantized": getattr(model_args, f"quantize_{FLAGS[part]}", False)}
        for part in trained_parts(model)
    }
    return model


def load_model(
    model_args: ModelArguments,
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    model_class: type[InternVLChatModel] = InternVLChatModel,
) -> InternVLChatModel:
    """The checkpoint, fitted to tokenizer and tile size; nothing frozen, no adapters added."""
    if training_args.deepspeed:
        init_deepspeed()
    half = torch.bfloat16 if training_args.bf16 or training_args.lora_fp32 else torch.float16
    dtype = half if training_args.bf16 or training_args.fp16 or training_args.lora_fp32 else torch.float32
    more = quantization(model_args, training_args, dtype)
    if model_args.model_name_or_path:
        config = build_config(model_args, data_args)
        model = model_class.from_pretrained(model_args.model_name_or_path, config=config, dtype=dtype, **more)
        take_over(model, model_args)
    else:
        model = compose(
            model_args.vision_path,
            model_args.llm_path,
            dtype=dtype,
            drop_path_rate=model_args.drop_path_rate,
            seed=training_args.seed,
            model_class=model_class,
            downsample_ratio=data_args.down_sample_ratio,
            **chat_settings(model_args, data_args),
        )
    if model_args.mlp_path:
        load_projector(model, model_args.mlp_path)
    fit(model, tokenizer, data_args.force_image_size)
    if model_args.use_liger:
        use_liger_kernels(model)
    model.config.use_cache = model.language_model.config.use_cache = False
    return model


def take_over(model: InternVLChatModel, model_args: ModelArguments) -> None:
    """Go on with the checkpoint's adapters, or merge them; note what the outcome of this run will stand on."""
    held = {part: rank for part, field in RANKS.items() if (rank := getattr(model.config, field))}
    said = ", ".join(f"{RANKS[part]} {rank}" for part, rank in held.items())
    others = [part for part in held if not goes_on(model.config, part, model_args)]
    merged = bool(others or (held and model_args.merge_before_training))
    if merged:
        logger.info("the checkpoint's adapters (%s) are merged into its weights before training", said)
        merge_adapters(model)
    elif held:
        logger.info("training goes on with the checkpoint's adapters (%s)", said)
    if merged or model.stands_on is None:
        path = model_args.model_name_or_path
        model.stands_on = from_first_rank(lambda: note_of_base(path, merged))
        model.trained_before = frozenset()


def chat_settings(model_args: ModelArguments, data_args: DataTrainingArguments) -> dict:
    """The fields of a chat model's configuration that the flags decide."""
    recorded = ("dynamic_image_size", "use_thumbnail", "min_dynamic_patch", "max_dynamic_patch", "pad2square")
    return {
        "template": data_args.conv_style,
        "select_layer": model_args.vision_select_layer,
        "ps_version": model_args.ps_version,
        **{name: getattr(data_args, name) for name in recorded},
    }


def build_config(model_args: ModelArguments, data_args: DataTrainingArguments) -> InternVLChatConfig:
    """The checkpoint's configuration with what the flags override."""
    config = InternVLChatConfig.from_pretrained(model_args.model_name_or_path)
    if config.downsample_ratio != data_args.down_sample_ratio:
        raise ValueError(
            f"--down_sample_ratio {data_args.down_sample_ratio} differs from the checkpoint's "
            f"{config.downsample_ratio}; the projector only fits the latter."
        )
    config.vision_config.drop_path_rate = model_args.drop_path_rate
    for name, value in chat_settings(model_args, data_args).items():
        before = getattr(config, name)
        if name in ("template", "select_layer", "ps_version") and before not in (None, value):
            logger.warning("the checkpoint was made with %s %s, this run uses %s", name, before, value)
        setattr(config, name, value)
    return config


def fit(model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase, image_size: int) -> None:
    """Give model and tokenizer the image tokens they lack, and the model position embeddings for tiles of this size."""
    layers = model.config.vision_config.num_hidden_layers
    if not -layers - 1 <= model.select_layer <= layers:
        raise ValueError(
            f"--vision_select_layer {model.select_layer}: the vision encoder has {layers} layers, so that its hidden "
            f"states are {-layers - 1} to {layers}."
        )
    if missing := sorted(set(SPECIAL_TOKENS) - tokenizer.get_vocab().keys()):
        logger.info("adding the image tokens %s", ", ".join(missing))
    add_special_tokens(model, tokenizer, SPECIAL_TOKENS)
    model.img_context_token_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
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
    dataset_class: type[LazySupervisedDataset] = LazySupervisedDataset,
) -> Data:
    """Open the data sets of the meta file and measure every sample: rank 0 measures, all ranks receive."""
    datasets = [
        dataset_class(name, meta, tokenizer, num_image_token, data_args, seed=training_args.seed)
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
        weights=np.concatenate([square_root_weights(m) for m in lengths]) if data_args.use_data_resampling else None,
    )
    for sentence in bad[:20]:
        logger.warning("left out: %s", sentence)
    if len(bad) > allowed_bad_samples(data_args, len(data.tokens)) or not data.usable.any():
        raise too_many_bad_samples(bad, allowed_bad_samples(data_args, len(data.tokens)))
    return data


def square_root_weights(measured: Lengths) -> np.ndarray:
    """Weight of each sample of a data set that is to weigh the square root of the number of its usable samples."""
    usable = max(1, int((measured.tokens > 0).sum()))
    return np.full(len(measured.tokens), usable**-0.5)


def preprocessor_config(data_args: DataTrainingArguments) -> dict:
    """`preprocessor_config.json` as published checkpoints have it: size, mean and deviation of a tile."""
    mean, std = NORMALIZE[data_args.normalize_type]
    return {
        "crop_size": data_args.force_image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(mean),
        "image_std": list(std),
        "resample": 3,
        "size": data_args.force_image_size,
    }


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
    trainer_class: type[InternVLTrainer] = InternVLTrainer,
    collator: Callable = concat_pad_data_collator,
    **kwargs,
) -> InternVLTrainer:
    """Plan the epochs and put everything into a trainer; `kwargs` go to it, too."""
    planned = partial(
        plan_epoch,
        data.tokens,
        usable=data.usable,
        weights=data.weights,
        seed=training_args.seed if training_args.data_seed is None else training_args.data_seed,
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
    return trainer_class(
        model=model,
        args=training_args,
        train_dataset=data.rows,
        data_collator=partial(collator, pad_id=tokenizer.pad_token_id),
        processing_class=tokenizer,
        plan=plan,
        bad_samples=data.bad_samples,
        max_bad_samples=allowed_bad_samples(data_args, len(data.tokens)),
        preprocessor=preprocessor_config(data_args),
        **kwargs,
    )
