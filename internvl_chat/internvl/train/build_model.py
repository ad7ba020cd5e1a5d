"""Build the tokenizer and the model of a run from its flags.

`build_model` is a pipeline of functions that take the model and return it. Their order affects the numbers:

    load_base_model                       from_pretrained, or composed from parts
    continue_or_merge_adapters            of the checkpoint
    resize_to_tokenizer_and_image_size
    set_kernels
    set_trainable                         freeze, attach adapters, unfreeze
    prepare_for_training                  cast, gradient checkpointing, compile
"""

import logging
import os

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from internvl.arguments.data import DataTrainingArguments
from internvl.arguments.model import ModelArguments
from internvl.arguments.training import TrainingArguments
from internvl.checkpoint.safe_load import weights_only_loading
from internvl.constants import IMG_CONTEXT_TOKEN, SPECIAL_TOKENS
from internvl.dist_utils import init_deepspeed, is_collective_error, run_on_rank_0
from internvl.model.activation_checkpointing import apply_gradient_checkpointing, compile_layers
from internvl.model.compose import add_special_tokens, compose_chat_model, load_projector
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import describe_base_checkpoint, list_weight_files
from internvl.model.internvl_chat.checkpoint_keys import find_checkpoint_dir
from internvl.model.internvl_chat.merge import merge_adapters
from internvl.model.internvl_chat.resize import set_image_size
from internvl.model.internvl_chat.safe_loading import one_line_checkpoint_errors
from internvl.model.liger_kernels import use_liger_kernels
from internvl.model.lora import LORA_RANK_FIELDS, unwrap_peft
from internvl.model.new_tokens import find_new_tokens
from internvl.model.safetensors_io import abbreviate_names
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.model.varlen_attention import use_varlen_attention
from internvl.train.param_groups import find_trainable_parts, resolve_part_rates
from internvl.train.quantization import allow_training_quantized, build_quantization_kwargs, is_quantized
from internvl.train.trainable_parameters import (
    can_continue_adapters,
    find_untrained_tokens,
    format_trainable_table,
    set_trainable,
)

logger = logging.getLogger(__name__)


def build_tokenizer(model_args: ModelArguments, data_args: DataTrainingArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the chat checkpoint or of the LLM."""
    # Several processes tokenize one sample each, which threads within a sample would only slow down.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    path = model_args.model_name_or_path or model_args.llm_path
    assert path  # validated
    tokenizer = load_tokenizer(path)
    tokenizer.model_max_length = data_args.max_seq_length
    return tokenizer


def build_model(
    model_args: ModelArguments,
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    model_class: type[InternVLChatModel] = InternVLChatModel,
) -> InternVLChatModel:
    """Load the model and prepare it for training."""
    model = load_model(model_args, data_args, training_args, tokenizer, model_class)
    set_seed(training_args.seed)  # initial adapters do not depend on how many random numbers loading has drawn
    model = set_trainable(model, model_args)
    model.config.untrained_token_ids = [*find_untrained_tokens(model_args, tokenizer)]
    model = prepare_for_training(model, model_args, training_args)
    model = record_training_settings(model, model_args, training_args)
    logger.info("Trainable parameters:\n%s", format_trainable_table(model, training_args))
    return model


def load_model(
    model_args: ModelArguments,
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    model_class: type[InternVLChatModel] = InternVLChatModel,
) -> InternVLChatModel:
    """Load the checkpoint, resized to tokenizer and image size, without new adapters.

    Raises:
        ValueError: a library cannot read the checkpoint's files.
    """
    source = model_args.model_name_or_path or f"{model_args.vision_path} and {model_args.llm_path}"
    config_note = " as DeepSpeed is configured" if training_args.deepspeed else ""
    if training_args.deepspeed:
        init_deepspeed()
    with (
        one_line_checkpoint_errors(f"the checkpoint {source}{config_note}", is_collective_error),
        weights_only_loading(deepspeed=False),
    ):
        model = load_base_model(model_args, data_args, training_args, model_class)
        model = continue_or_merge_adapters(model, model_args)
        if model_args.mlp_path:
            load_projector(model, model_args.mlp_path)
        model = resize_to_tokenizer_and_image_size(model, tokenizer, data_args.force_image_size)
        return set_kernels(model, model_args, data_args)


# -- load --------------------------------------------------------------------------------------------------------------


def load_base_model(
    model_args: ModelArguments,
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    model_class: type[InternVLChatModel],
) -> InternVLChatModel:
    """Load a chat checkpoint, or compose a vision encoder and an LLM."""
    dtype = get_model_dtype(training_args)
    quantization = build_quantization_kwargs(model_args, training_args, dtype)
    if model_args.model_name_or_path:
        # use_safetensors=None makes transformers read safetensors if the checkpoint has them, else pickles.
        pickle = {"use_safetensors": None} if model_args.allow_pickle else {}
        config = load_config(model_args, data_args)
        return model_class.from_pretrained(
            model_args.model_name_or_path, config=config, dtype=dtype, **quantization, **pickle
        )
    assert model_args.vision_path and model_args.llm_path  # validated
    return compose_chat_model(
        model_args.vision_path,
        model_args.llm_path,
        dtype=dtype,
        drop_path_rate=model_args.drop_path_rate,
        seed=training_args.seed,
        model_class=model_class,
        allow_pickle=model_args.allow_pickle,
        downsample_ratio=data_args.down_sample_ratio,
        **chat_config_fields(model_args, data_args),
    )


def get_model_dtype(args: TrainingArguments) -> torch.dtype:
    """Return the dtype that weights are loaded in."""
    if args.bf16 or args.lora_fp32:  # under DeepSpeed, --lora_fp32 replaces --bf16 by autocast
        return torch.bfloat16
    return torch.float16 if args.fp16 else torch.float32


def load_config(model_args: ModelArguments, data_args: DataTrainingArguments) -> InternVLChatConfig:
    """Load the checkpoint's configuration and override it by the flags."""
    path = model_args.model_name_or_path
    assert path
    config = InternVLChatConfig.from_pretrained(path)
    if config.downsample_ratio != data_args.down_sample_ratio:
        raise ValueError(
            f"--down_sample_ratio {data_args.down_sample_ratio} is invalid: expected {config.downsample_ratio}, which "
            "the checkpoint's projector was made for."
        )
    config.vision_config.drop_path_rate = model_args.drop_path_rate
    for name, value in chat_config_fields(model_args, data_args).items():
        checkpoint_value = getattr(config, name)
        if name in ("template", "select_layer", "ps_version") and checkpoint_value not in (None, value):
            logger.warning("%s: the checkpoint has %s, this run uses %s", name, checkpoint_value, value)
        setattr(config, name, value)
    return config


def chat_config_fields(model_args: ModelArguments, data_args: DataTrainingArguments) -> dict:
    """Return the fields of `InternVLChatConfig` that the flags set."""
    return {
        "template": data_args.conv_style,
        "select_layer": model_args.vision_select_layer,
        "ps_version": model_args.ps_version,
        "dynamic_image_size": data_args.dynamic_image_size,
        "use_thumbnail": data_args.use_thumbnail,
        "min_dynamic_patch": data_args.min_dynamic_patch,
        "max_dynamic_patch": data_args.max_dynamic_patch,
        "pad2square": data_args.pad2square,
    }


def continue_or_merge_adapters(model: InternVLChatModel, model_args: ModelArguments) -> InternVLChatModel:
    """Keep the checkpoint's adapters if the flags match, else merge them.

    Also sets `model.base_checkpoint`, to which the adapter checkpoints of this run refer. A composed model has none, so
    its run saves the full model.
    """
    path = model_args.model_name_or_path
    if not path:
        return model
    ranks = {part: rank for part, field in LORA_RANK_FIELDS.items() if (rank := getattr(model.config, field))}
    matches_flags = all(can_continue_adapters(model.config, part, model_args) for part in ranks)
    is_merged = bool(ranks) and (model_args.merge_before_training or not matches_flags)
    listed = ", ".join(f"{LORA_RANK_FIELDS[part]} {rank}" for part, rank in ranks.items())
    if is_merged:
        logger.info("Checkpoint adapters: merged before training (%s)", listed)
        merge_adapters(model)
    elif ranks:
        logger.info("Checkpoint adapters: continued (%s)", listed)
    if model_args.allow_pickle and not list_weight_files(find_checkpoint_dir(path)):
        logger.info("Base checkpoint: none, because %s is pickled; this run saves the full model", path)
    elif is_merged or model.base_checkpoint is None:  # else the model is an adapter checkpoint and has a base already
        model.base_checkpoint = run_on_rank_0(lambda: describe_base_checkpoint(path, is_merged))
        model.previously_trained = frozenset()
    return model


def resize_to_tokenizer_and_image_size(
    model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase, image_size: int
) -> InternVLChatModel:
    """Add missing image tokens, and resize embeddings to tokenizer and tiles.

    The tokens are added to the tokenizer as well.

    Args:
        image_size: side of a tile in pixels.
    """
    num_layers = model.config.vision_config.num_hidden_layers
    if not -num_layers - 1 <= model.select_layer <= num_layers:
        raise ValueError(
            f"--vision_select_layer {model.select_layer} is invalid: the vision encoder has {num_layers} layers and "
            f"{num_layers + 1} hidden states; expected {-num_layers - 1} to {num_layers}."
        )
    if missing := sorted(set(SPECIAL_TOKENS) - tokenizer.get_vocab().keys()):
        logger.info("Image tokens added to the tokenizer: %s", ", ".join(missing))
    untrained_ids = getattr(model.config, "untrained_token_ids", None)
    new_tokens = find_new_tokens(tokenizer, model.config.llm_config.vocab_size, untrained_ids)
    model.new_token_ids = tuple(new_tokens)
    if new_tokens:
        logger.info("New tokens of the tokenizer, with the mean row: %s", abbreviate_names(list(new_tokens.values())))
    add_special_tokens(model, tokenizer, SPECIAL_TOKENS)
    model.img_context_token_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
    set_image_size(model, image_size)
    return model


def set_kernels(
    model: InternVLChatModel, model_args: ModelArguments, data_args: DataTrainingArguments
) -> InternVLChatModel:
    """Select Liger kernels and variable-length attention; disable the KV cache."""
    if model_args.use_liger:
        use_liger_kernels(model)
    use_varlen_attention(model.language_model, data_args.use_packed_ds)
    # transformers 5: with a cache, packed rows whose position_ids restart attend across their documents.
    model.config.use_cache = model.language_model.config.use_cache = False
    return model


# -- prepare -----------------------------------------------------------------------------------------------------------


def prepare_for_training(
    model: InternVLChatModel, model_args: ModelArguments, training_args: TrainingArguments
) -> InternVLChatModel:
    """Cast trainable parameters; set up gradient checkpointing and compilation."""
    if not training_args.deepspeed or training_args.lora_fp32:  # else DeepSpeed keeps fp32 master weights itself
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    model = set_up_gradient_checkpointing(model, model_args)
    if model_args.compile:
        compile_layers(model.vision_model)
        compile_layers(model.language_model)
    if model_args.quantize_backbone or model_args.quantize_llm:
        allow_training_quantized(model)
    return model


def set_up_gradient_checkpointing(model: InternVLChatModel, args: ModelArguments) -> InternVLChatModel:
    """Enable gradient checkpointing in the layers that the flags select."""
    use_in_vision = args.grad_checkpoint if args.vit_grad_checkpoint is None else args.vit_grad_checkpoint
    vision_ratio = args.grad_checkpoint_ratio if use_in_vision else 0.0
    llm_ratio = args.grad_checkpoint_ratio if args.grad_checkpoint else 0.0
    apply_gradient_checkpointing(model.vision_model, vision_ratio, args.grad_checkpoint_keep)
    apply_gradient_checkpointing(model.language_model, llm_ratio, args.grad_checkpoint_keep)
    # PEFT's hook on the embeddings is for reentrant checkpoints. It would build a graph through the frozen layers below
    # the first adapter.
    unwrap_peft(model.language_model).disable_input_require_grads()
    return model


def record_training_settings(
    model: InternVLChatModel, model_args: ModelArguments, training_args: TrainingArguments
) -> InternVLChatModel:
    """Write rates and quantization of each trainable part to the configuration."""
    model.config.training_settings = {
        part: resolve_part_rates(training_args, part) | {"quantized": is_quantized(model_args, part)}
        for part in find_trainable_parts(model)
    }
    return model
