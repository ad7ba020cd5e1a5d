"""Composing a chat model from its parts, and adding tokens.

Under ZeRO-3, where every rank holds a slice of each weight, all ranks call these functions together; each function
gathers the weights that it changes.
"""

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from internvl.dist_utils import is_collective_error
from internvl.model.internvl_chat import InternVisionConfig, InternVisionModel, InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import strip_peft_prefix
from internvl.model.internvl_chat.checkpoint_keys import find_checkpoint_dir
from internvl.model.internvl_chat.config_values import check_llm_config, describe_config_file
from internvl.model.internvl_chat.decoder import select_attn_implementation
from internvl.model.internvl_chat.generation import load_generation_config
from internvl.model.internvl_chat.modeling_internvl_chat import get_llm_class
from internvl.model.internvl_chat.resize import resize_embeddings
from internvl.model.internvl_chat.safe_loading import one_line_checkpoint_errors, refuse_unsafe_files
from internvl.model.internvl_chat.weight_shapes import check_model_fits_weights
from internvl.model.internvl_chat.zero3 import gathered_parameters, get_full_shape
from internvl.model.safetensors_io import abbreviate_names
from internvl.regular_files import MAX_LFS_POINTER_BYTES, open_regular_file, refuse_lfs_pointer


def compose_chat_model(
    vision_path: str | Path,
    llm_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    drop_path_rate: float = 0.0,
    seed: int = 0,
    model_class: type[InternVLChatModel] = InternVLChatModel,
    allow_pickle: bool = False,
    **config_fields,
) -> InternVLChatModel:
    """Compose a chat model from a vision encoder and an LLM.

    The projector between them is new.

    Args:
        vision_path: an InternViT checkpoint, or a chat checkpoint to take the vision encoder from.
        llm_path: a causal LM that transformers or this repository supports.
        seed: seed of the projector's initialization.
        allow_pickle: accept weights in `pytorch_model*.bin`; nothing but tensors is unpickled.
        config_fields: fields of InternVLChatConfig (template, select_layer, ...).

    Raises:
        ValueError: a checkpoint of another kind, with adapters, or with missing weights.
    """
    use_safetensors = None if allow_pickle else True
    with one_line_checkpoint_errors(f"the vision encoder {vision_path}", is_collective_error):
        refuse_unsafe_files(vision_path, allow_pickle)
        vision = _load_vision_encoder(vision_path, dtype, drop_path_rate, use_safetensors=use_safetensors)
    with one_line_checkpoint_errors(f"the LLM {llm_path}", is_collective_error):
        refuse_unsafe_files(llm_path, allow_pickle)
        generation_config = load_generation_config(llm_path)
        llm = _load_llm(llm_path, dtype, use_safetensors=use_safetensors)
        llm.generation_config = generation_config or llm.generation_config
    # Copies: InternVLChatModel writes into its sub-configurations, which would change those of the loaded parts.
    config = InternVLChatConfig(vision.config.to_dict(), llm.config.to_dict(), **config_fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config, vision, llm)
    model.mlp1.to(dtype)
    return model


def _load_vision_encoder(path: str | Path, dtype: torch.dtype, drop_path_rate: float, **kwargs) -> InternVisionModel:
    """Load a vision encoder from its own or a chat checkpoint."""
    config = InternVisionConfig.from_pretrained(path)
    fields = PretrainedConfig.get_config_dict(path)[0]
    if fields.get("use_backbone_lora") or fields.get("base_model"):
        raise ValueError(f"{path} holds LoRA adapters, not plain weights: merge them first with `internvl merge`")
    config.drop_path_rate = drop_path_rate
    # In a chat checkpoint the names of the vision encoder have this prefix; other names are ignored.
    key_mapping = {r"^vision_model\.": ""}
    model, missing = _load_part(InternVisionModel, path, config, dtype, key_mapping, **kwargs)
    _require_complete(path, "vision encoder", missing)
    return model


def _load_llm(path: str | Path, dtype: torch.dtype, **kwargs) -> PreTrainedModel:
    """Load a causal LM with its own weight for the LM head."""
    source = describe_config_file(path)
    fields = PretrainedConfig.get_config_dict(path)[0]
    check_llm_config(fields, source)
    config = InternVLChatConfig(llm_config=dict(fields)).llm_config
    architecture = config.architectures[0]
    llm_class = get_llm_class(architecture)
    kwargs["attn_implementation"] = select_attn_implementation(llm_class, dtype)
    is_tied = fields.get("tie_word_embeddings") is not False
    model, missing = _load_part(llm_class, path, config, dtype, may_lack_head=is_tied, **kwargs)
    head = model.get_output_embeddings()
    head_names = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    if missing == head_names and is_tied:
        # A tied LM head is not in the file. A chat model has both weights, and training may make them differ.
        with gathered_parameters(head.weight, model.get_input_embeddings().weight), torch.no_grad():
            head.weight.copy_(model.get_input_embeddings().weight)
    else:
        _require_complete(path, architecture, missing)
    return model


def _load_part(
    cls: type[PreTrainedModel], path, config, dtype, key_mapping=None, may_lack_head: bool = False, **kwargs
) -> tuple[Any, set[str]]:
    """Load a part; also return the names of missing or mismatched weights."""
    check_model_fits_weights(cls, config, find_checkpoint_dir(path), key_mapping or {}, may_lack_head)
    model, info = cls.from_pretrained(  # pyrefly: ignore[not-iterable]  # a pair with output_loading_info
        path,
        config=config,
        dtype=dtype,
        ignore_mismatched_sizes=not is_deepspeed_zero3_enabled(),  # ZeRO-3 partitions parameters: no shapes to compare
        output_loading_info=True,
        key_mapping=key_mapping,
        **kwargs,
    )
    return model, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}


def _require_complete(path: str | Path, part: str, missing: set[str]) -> None:
    if missing:
        raise ValueError(
            f"the weights in {path} do not match its configuration ({part}): missing or of another shape: "
            f"{abbreviate_names(missing)}"
        )


def load_projector(model: InternVLChatModel, path: str | Path) -> None:
    """Load the projector's weights from a state dict file.

    Args:
        path: written by `torch.save` (nothing but tensors is unpickled) or a safetensors file.

    Raises:
        ValueError: the file is unreadable, or its names and shapes are not the projector's.
    """
    try:
        with open_regular_file(path) as file:
            refuse_lfs_pointer(path, file.read(MAX_LFS_POINTER_BYTES))
        is_safetensors = Path(path).suffix == ".safetensors"
        state = load_file(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    except (OSError, RuntimeError, EOFError, AttributeError, UnpicklingError, SafetensorError) as error:
        raise ValueError(f"the projector file {path} is not readable as a state dict ({error})") from error
    parameters = dict(model.mlp1.named_parameters())
    expected = {name: get_full_shape(parameter) for name, parameter in parameters.items()}
    if shapes != expected:
        raise ValueError(f"the projector file {path} does not fit the model: expected {expected}, got {shapes}")
    with gathered_parameters(*parameters.values()), torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
    model.previously_trained |= {f"mlp1.{name}" for name in parameters}  # an adapter checkpoint must hold it


def add_special_tokens(model: InternVLChatModel, tokenizer, tokens: Sequence[str]) -> int:
    """Add missing tokens to the tokenizer and to both embeddings.

    A new row is the mean of the old rows. Embeddings of published models have more rows than the tokenizer has tokens.
    As in upstream, they are resized only if a token was added or has no row, and then to the tokenizer's length.

    Returns:
        the number of tokens added.

    Raises:
        ValueError: an id of the tokenizer has no row and is not the next one.
    """
    num_added = tokenizer.add_tokens(list(tokens), special_tokens=True)
    num_rows = model.config.llm_config.vocab_size
    last_token, last_id = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last_id >= max(num_rows, len(tokenizer)):
        raise ValueError(
            f"the tokenizer is of another model: token {last_token!r:.80} has the id {last_id}, and the embedding has "
            f"{num_rows} rows"
        )
    num_old_rows = min(num_rows, len(tokenizer) - num_added)
    if num_old_rows == len(tokenizer):
        return 0
    resize_embeddings(model, len(tokenizer), num_old_rows)
    if not model.base_checkpoint:
        return num_added
    if "known_tokens" not in model.base_checkpoint:
        # Loading recomputes the new rows from the base checkpoint's first `known_tokens` rows; they are not saved.
        model.base_checkpoint = {**model.base_checkpoint, "known_tokens": num_old_rows}
    else:
        # Tokens were added twice. The rows no longer follow from the base checkpoint, so both embeddings are saved.
        embeddings = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        names = [name for name, p in model.named_parameters() if any(p is weight for weight in embeddings)]
        model.previously_trained |= {strip_peft_prefix(name) for name in names}
    return num_added
