"""What is done to a whole chat model outside training: composed from parts, tokens added, adapters merged.

Used by `train/build.py`, the trainer and `tools/`. Under ZeRO-3, where every rank holds a slice of each weight, all
ranks call these functions together and each gathers what it touches.
"""

from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from internvl.model.internvl_chat import InternVisionConfig, InternVisionModel, InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import strip_peft_prefix
from internvl.model.internvl_chat.decoder import attention_of
from internvl.model.internvl_chat.modeling_internvl_chat import llm_class_of
from internvl.model.internvl_chat.resize import gathered_parameters, resize_image, resize_tokens
from internvl.model.internvl_chat.safe_loading import refuse_unsafe_files

__all__ = ["add_special_tokens", "compose", "load_projector", "resize_image"]


def compose(
    vision_path: str | Path,
    llm_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    drop_path_rate: float = 0.0,
    seed: int = 0,
    model_class: type[InternVLChatModel] = InternVLChatModel,
    allow_pickle: bool = False,
    **settings,
) -> InternVLChatModel:
    """A chat model made of a vision encoder and a language model, with a fresh projector between them.

    Args:
        vision_path: an InternViT checkpoint, or a chat checkpoint, whose vision encoder is taken.
        llm_path: a causal language model that transformers or this repository knows.
        seed: of the projector's first weights.
        allow_pickle: either may be `pytorch_model*.bin`, of which tensors alone are read.
        settings: fields of InternVLChatConfig (template, select_layer, ...).

    Raises:
        ValueError: a checkpoint that is something else, or lacks weights.
    """
    for path in (vision_path, llm_path):
        refuse_unsafe_files(path, allow_pickle)
    safe = None if allow_pickle else True
    vision = _load_vision(vision_path, dtype, drop_path_rate, use_safetensors=safe)
    llm = _load_llm(llm_path, dtype, use_safetensors=safe)
    # Copies: the chat model notes in its configuration what a model yet to be built shall do, and these are built.
    config = InternVLChatConfig(vision.config.to_dict(), llm.config.to_dict(), **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config, vision, llm)
    model.mlp1.to(dtype)
    return model


def _load_vision(path: str | Path, dtype: torch.dtype, drop_path_rate: float, **kwargs) -> InternVisionModel:
    fields = PretrainedConfig.get_config_dict(path)[0]
    if fields.get("use_backbone_lora") or fields.get("base_model"):
        raise ValueError(f"{path} holds LoRA adapters, not plain weights: merge them first with tools/merge_lora.py")
    config = InternVisionConfig.from_pretrained(path)
    config.drop_path_rate = drop_path_rate
    model, missing = _load(InternVisionModel, path, config, dtype, key_mapping={r"^vision_model\.": ""}, **kwargs)
    _complain(path, "vision encoder", missing)
    return model


def _load_llm(path: str | Path, dtype: torch.dtype, **kwargs) -> PreTrainedModel:
    fields = PretrainedConfig.get_config_dict(path)[0]
    config = InternVLChatConfig(llm_config=dict(fields)).llm_config
    name = config.architectures[0]
    llm_class = llm_class_of(name)
    kwargs["attn_implementation"] = attention_of(llm_class, dtype)
    model, missing = _load(llm_class, path, config, dtype, **kwargs)
    head = model.get_output_embeddings()
    tied = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    if missing == tied and fields.get("tie_word_embeddings") is not False:
        # The checkpoint's head is its input embedding; a chat model has both, and they go apart from here on.
        with gathered_parameters(head.weight, model.get_input_embeddings().weight), torch.no_grad():
            head.weight.copy_(model.get_input_embeddings().weight)
    else:
        _complain(path, name, missing)
    return model


def _load(cls: type[PreTrainedModel], path, config, dtype, **kwargs) -> tuple[PreTrainedModel, set[str]]:
    """The model and the names of weights that `path` lacks or has in another shape."""
    model, info = cls.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        ignore_mismatched_sizes=not is_deepspeed_zero3_enabled(),
        output_loading_info=True,
        **kwargs,
    )
    return model, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}


def _complain(path, what: str, missing: set[str]):
    if missing:
        listed = ", ".join(sorted(missing)[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(f"{path} is no {what} of its configuration; it lacks, or has in another shape: {listed}")


def load_projector(model: InternVLChatModel, path: str | Path):
    """Loads the projector from a state dict: a file of `torch.save` (nothing but tensors is read) or of safetensors.

    Raises:
        ValueError: it is no such file, or does not fit; the message has both lists of names and shapes.
    """
    try:
        safe = Path(path).suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    except (OSError, RuntimeError, EOFError, AttributeError, UnpicklingError, SafetensorError) as error:
        raise ValueError(f"the projector file {path} cannot be read as a state dict ({error})") from error
    own = dict(model.mlp1.named_parameters())
    wanted = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in own.items()}
    if found != wanted:
        raise ValueError(f"the projector file {path} holds {found}, but the model's projector is {wanted}")
    with gathered_parameters(*own.values()), torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def add_special_tokens(model: InternVLChatModel, tokenizer, tokens: list[str]) -> int:
    """Adds those of `tokens` that the tokenizer lacks, and their rows to both embeddings: the mean of the old rows.

    Embeddings of published models have more rows than the tokenizer has tokens; they are resized, as upstream's, only
    if something was added (or a token has no row), and then to the length of the tokenizer. Returns the number of
    tokens added.
    """
    added = tokenizer.add_tokens(list(tokens), special_tokens=True)
    old_rows = min(model.get_input_embeddings().num_embeddings, len(tokenizer) - added)
    if old_rows == len(tokenizer):
        return 0
    resize_tokens(model, len(tokenizer), old_rows)
    if (
        model.base_checkpoint and "known_tokens" in model.base_checkpoint
    ):  # grown before: now the rows themselves must be saved
        ends = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        names = {strip_peft_prefix(name) for name, p in model.named_parameters() if any(p is end for end in ends)}
        model.previously_trained |= names
    elif model.base_checkpoint:
        model.base_checkpoint = {**model.base_checkpoint, "known_tokens": old_rows}
    return added
