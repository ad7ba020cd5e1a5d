"""Arguments -> tokenizer, model, data, trainer: the only file that knows both the command line and the objects."""

import logging
import os
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from internvl.dist_utils import collective_failed, from_first_rank, init_deepspeed
from internvl.model.checkpoint import add_special_tokens, compose, load_projector, resize_image
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.checkpoint_keys import folder_of
from internvl.model.internvl_chat.merging import merge_adapters
from internvl.model.internvl_chat.strange_files import reported
from internvl.model.internvl_chat.trained import note_of_base, weight_files
from internvl.model.liger import use_liger_kernels
from internvl.model.lora import FLAGS, RANKS
from internvl.model.recompute import recomputed_share
from internvl.model.tokenizer import load_tokenizer
from internvl.model.varlen import use_varlen_attention
from internvl.train.arguments import DataTrainingArguments, ModelArguments, TrainingArguments
from internvl.train.build_data import Data, allowed_bad_samples
from internvl.train.collator import row_collator
from internvl.train.constants import IMG_CONTEXT_TOKEN, SPECIAL_TOKENS
from internvl.train.flops import Passes, step_cost
from internvl.train.image import NORMALIZE
from internvl.train.pickles import data_alone
from internvl.train.plan import Layout
from internvl.train.quantize import quantization
from internvl.train.schedule import Schedule
from internvl.train.summary import summary
from internvl.train.towers import check_towers, set_up_towers
from internvl.train.trainable import goes_on, rates, set_trainable, trainable_table, trained_parts
from internvl.train.trainer import InternVLTrainer

logger = logging.getLogger(__name__)


def build_tokenizer(model_args: ModelArguments, data_args: DataTrainingArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of the chat checkpoint, else of the language model; `model_max_length` carries --max_seq_length."""
    # Samples are tokenised one by one, by several processes: threads within a sample would only cost.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
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
    check_towers(model_args, training_args)
    model = load_model(model_args, data_args, training_args, tokenizer, model_class)
    set_seed(training_args.seed)  # the same adapters to begin with, whatever loading drew
    set_trainable(model, model_args)
    if not training_args.deepspeed or training_args.lora_fp32:  # else DeepSpeed keeps fp32 master weights by itself
        cast_trainable(model, torch.float32)
    set_up_towers(model, model_args)
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
    """The checkpoint, fitted to tokenizer and tile size; nothing frozen, no adapters added.

    Raises:
        ValueError: whatever a file of it is to blame for.
    """
    source = model_args.model_name_or_path or f"{model_args.vision_path} and {model_args.llm_path}"
    beside = " as DeepSpeed is configured" if training_args.deepspeed else ""
    if training_args.deepspeed:
        init_deepspeed()
    with reported(f"the checkpoint {source}{beside}", collective_failed), data_alone(deepspeed=False):
        return _loaded(model_args, data_args, training_args, tokenizer, model_class)


def _loaded(model_args, data_args, training_args, tokenizer, model_class) -> InternVLChatModel:
    half = torch.bfloat16 if training_args.bf16 or training_args.lora_fp32 else torch.float16
    dtype = half if training_args.bf16 or training_args.fp16 or training_args.lora_fp32 else torch.float32
    more = quantization(model_args, training_args, dtype)
    if model_args.allow_pickle:
        more["use_safetensors"] = None  # where there are some, they are taken
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
            allow_pickle=model_args.allow_pickle,
            downsample_ratio=data_args.down_sample_ratio,
            **chat_settings(model_args, data_args),
        )
    if model_args.mlp_path:
        load_projector(model, model_args.mlp_path)
    fit(model, tokenizer, data_args.force_image_size)
    if model_args.use_liger:
        use_liger_kernels(model)
    use_varlen_attention(model.language_model, data_args.use_packed_ds)
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
    path = model_args.model_name_or_path
    if model_args.allow_pickle and not weight_files(folder_of(path)):
        logger.info("%s is pickled, which no run can stand on: this one saves the whole model", path)
    elif merged or model.stands_on is None:
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
    for part in (config.vision_config, config.llm_config):
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, int | float) and not 0 <= value < 1:
                raise ValueError(f"{model_args.model_name_or_path}: {name} {value} in config.json is no probability.")
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


def build_trainer(
    model: InternVLChatModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    trainer_class: type[InternVLTrainer] = InternVLTrainer,
    collator: Callable = row_collator,
    **kwargs,
) -> InternVLTrainer:
    """Plan the epochs and put everything into a trainer; `kwargs` go to it, too."""
    schedule = Schedule(data.lengths, data.digests, build_layout(model, data_args, training_args), data.weights)
    logger.info("the data:\n%s", summary(data.lengths, schedule.plan(0), schedule.layout, len(data.bad_samples)))
    model.loss_reduction = data_args.loss_reduction
    collator = partial(collator, pad_id=tokenizer.pad_token_id)
    if data_args.use_packed_ds and data_args.strict_mode:
        collator = partial(collator, max_item_length=data_args.max_packed_tokens)
    return trainer_class(
        model=model,
        args=training_args,
        train_dataset=data.rows,
        data_collator=collator,
        processing_class=tokenizer,
        schedule=schedule,
        bad_samples=list(map(str, data.bad_samples)),
        max_bad_samples=allowed_bad_samples(data_args, len(data.lengths.tokens)),
        preprocessor=preprocessor_config(data_args),
        accept_changed_data=data_args.accept_changed_data,
        all_gather=data_args.loss_reduction_all_gather,
        **kwargs,
    )


def build_layout(
    model: InternVLChatModel, data_args: DataTrainingArguments, training_args: TrainingArguments
) -> Layout:
    """What the flags say about rows and steps; cost is that of this model, of which these parts train."""

    def passes(part: nn.Module) -> int:
        trained = [name for name, parameter in part.named_parameters() if parameter.requires_grad]
        whole = any("lora_" not in name for name in trained)
        return 1 + recomputed_share(part) + 1 + whole if trained else 1

    llm = max(passes(model.language_model), passes(model.vision_model), 2)  # gradients go through it in any case
    return Layout(
        seed=training_args.seed if training_args.data_seed is None else training_args.data_seed,
        world_size=training_args.world_size,
        micro_batch=training_args.per_device_train_batch_size,
        accumulation=training_args.gradient_accumulation_steps,
        group_by_length=training_args.group_by_length and not data_args.use_packed_ds,
        packed=data_args.use_packed_ds,
        max_tokens=data_args.max_packed_tokens,
        max_tiles=data_args.num_images_expected,
        cost=step_cost(model.config, Passes(vision=passes(model.vision_model), llm=llm)),
    )
