"""Arguments -> tokenizer, model, data, trainer: the only file that knows both the command line and the objects."""

import importlib.util
import logging
import os

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase, set_seed

from internvl.arguments.training import DataTrainingArguments, ModelArguments, TrainingArguments
from internvl.arguments.validate import validate_gradient_checkpointing
from internvl.checkpoint.safe_load import weights_only_loading
from internvl.constants import IMG_CONTEXT_TOKEN, SPECIAL_TOKENS
from internvl.dist_utils import init_deepspeed, is_collective_error, run_on_rank_0
from internvl.model.activation_checkpointing import apply_gradient_checkpointing, compile_layers
from internvl.model.compose import add_special_tokens, compose, load_projector, resize_image
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import describe_base_checkpoint, weight_files
from internvl.model.internvl_chat.checkpoint_keys import folder_of
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.internvl_chat.safe_loading import one_line_checkpoint_errors
from internvl.model.liger_kernels import use_liger_kernels
from internvl.model.lora import LORA_RANK_FIELDS, PART_FLAGS, unwrap_peft
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.model.varlen_attention import use_varlen_attention
from internvl.train.param_groups import rates_of_part, trainable_parts
from internvl.train.trainable_parameters import continues_adapters, set_trainable, trainable_table

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
    validate_gradient_checkpointing(model_args, training_args)
    model = load_model(model_args, data_args, training_args, tokenizer, model_class)
    set_seed(training_args.seed)  # the same adapters to begin with, whatever loading drew
    set_trainable(model, model_args)
    if not training_args.deepspeed or training_args.lora_fp32:  # else DeepSpeed keeps fp32 master weights by itself
        cast_trainable(model, torch.float32)
    set_up_gradient_checkpointing(model, model_args)
    if model_args.quantize_backbone or model_args.quantize_llm:
        model._hf_peft_config_loaded = True  # to transformers: there are adapters (in the parts)
    logger.info("what trains:\n%s", trainable_table(model, training_args))
    model.config.training_settings = {
        part: rates_of_part(training_args, part)
        | {"quantized": getattr(model_args, f"quantize_{PART_FLAGS[part]}", False)}
        for part in trainable_parts(model)
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
    with (
        one_line_checkpoint_errors(f"the checkpoint {source}{beside}", is_collective_error),
        weights_only_loading(deepspeed=False),
    ):
        return _loaded(model_args, data_args, training_args, tokenizer, model_class)


def _loaded(model_args, data_args, training_args, tokenizer, model_class) -> InternVLChatModel:
    half = torch.bfloat16 if training_args.bf16 or training_args.lora_fp32 else torch.float16
    dtype = half if training_args.bf16 or training_args.fp16 or training_args.lora_fp32 else torch.float32
    more = quantization_options(model_args, training_args, dtype)
    if model_args.allow_pickle:
        more["use_safetensors"] = None  # where there are some, they are taken
    if model_args.model_name_or_path:
        config = build_config(model_args, data_args)
        model = model_class.from_pretrained(model_args.model_name_or_path, config=config, dtype=dtype, **more)
        continue_or_merge_adapters(model, model_args)
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
    resize_to_tokenizer_and_image_size(model, tokenizer, data_args.force_image_size)
    if model_args.use_liger:
        use_liger_kernels(model)
    use_varlen_attention(model.language_model, data_args.use_packed_ds)
    model.config.use_cache = model.language_model.config.use_cache = False
    return model


def continue_or_merge_adapters(model: InternVLChatModel, model_args: ModelArguments) -> None:
    """Go on with the checkpoint's adapters, or merge them; note what the outcome of this run will stand on."""
    held = {part: rank for part, field in LORA_RANK_FIELDS.items() if (rank := getattr(model.config, field))}
    said = ", ".join(f"{LORA_RANK_FIELDS[part]} {rank}" for part, rank in held.items())
    others = [part for part in held if not continues_adapters(model.config, part, model_args)]
    merged = bool(others or (held and model_args.merge_before_training))
    if merged:
        logger.info("the checkpoint's adapters (%s) are merged into its weights before training", said)
        merge_adapters(model)
    elif held:
        logger.info("training goes on with the checkpoint's adapters (%s)", said)
    path = model_args.model_name_or_path
    if model_args.allow_pickle and not weight_files(folder_of(path)):
        logger.info("%s is pickled, which no run can stand on: this one saves the whole model", path)
    elif merged or model.base_checkpoint is None:
        model.base_checkpoint = run_on_rank_0(lambda: describe_base_checkpoint(path, merged))
        model.previously_trained = frozenset()


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


def resize_to_tokenizer_and_image_size(
    model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase, image_size: int
) -> None:
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


def quantization_options(model_args: ModelArguments, training_args: TrainingArguments, dtype: torch.dtype) -> dict:
    """Arguments of `from_pretrained` that load the parts asked for in NF4, scales quantised, too; none if none is.

    Raises:
        ValueError: where it cannot run, in one sentence.
    """
    parts = [part for part, flag in PART_FLAGS.items() if getattr(model_args, f"quantize_{flag}", False)]
    for part in parts:
        if reason := quantization_obstacle(part, model_args, training_args):
            raise ValueError(f"--quantize_{PART_FLAGS[part]} True {reason}.")
    if not parts:
        return {}
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "output", *(part for part in LORA_RANK_FIELDS if part not in parts)],
    )
    return {"quantization_config": settings, "device_map": {"": training_args.device}}


def quantization_obstacle(part: str, model_args: ModelArguments, training_args: TrainingArguments) -> str | None:
    """What is in the way of a part in 4 bits, as the end of a sentence."""
    path = model_args.model_name_or_path
    held = InternVLChatConfig.from_pretrained(path) if path else None
    stage = (training_args.deepspeed or {}).get("zero_optimization", {}).get("stage", 0)
    in_the_way = {
        "needs a CUDA device": not torch.cuda.is_available(),
        "needs the package bitsandbytes": importlib.util.find_spec("bitsandbytes") is None,
        f"needs adapters, set --{LORA_RANK_FIELDS[part]}": not getattr(model_args, LORA_RANK_FIELDS[part]),
        "does not run under ZeRO-3, which cannot partition 4-bit weights; use ZeRO-2": stage == 3,
        "cannot save the whole model: leave out --save_full_model": training_args.save_full_model,
        "cannot begin with PiSSA, which changes the weights; quantise a merged checkpoint": (
            getattr(model_args, f"{PART_FLAGS[part]}_lora_variant") == "pissa"
        ),
        "needs a chat checkpoint, --model_name_or_path": held is None,
        "goes on with adapters on a base only; merge these first with tools/merge_lora.py": (
            held is not None
            and not hasattr(held, "base_model")
            and any(getattr(held, rank) for rank in LORA_RANK_FIELDS.values())
        ),
    }
    return next((reason for reason, found in in_the_way.items() if found), None)


def set_up_gradient_checkpointing(model: InternVLChatModel, args: ModelArguments) -> None:
    """Checkpoints and compiles the layers of both towers as the flags say."""
    vision = args.grad_checkpoint if args.vit_grad_checkpoint is None else args.vit_grad_checkpoint
    for tower, on in ((model.vision_model, vision), (model.language_model, args.grad_checkpoint)):
        apply_gradient_checkpointing(tower, args.checkpoint_every if on else 0, args.checkpoint_keep)
        if args.compile:
            compile_layers(tower)
    # Adapters' hook on the embeddings serves reentrant checkpoints, and is a graph through frozen layers below them.
    unwrap_peft(model.language_model).disable_input_require_grads()
