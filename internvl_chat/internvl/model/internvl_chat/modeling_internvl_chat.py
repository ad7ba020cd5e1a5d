"""The chat model: InternViT, projector and LLM.

Tiles -> InternViT -> pixel shuffle -> projector -> LLM -> loss. The visual tokens of the projector replace the
embeddings of image tokens in the LLM's input. Each part may have LoRA adapters.

Shapes: B rows, L tokens, T tiles of the batch, C hidden size of the LLM.
"""

import copy
import operator
from functools import partial
from itertools import chain
from typing import Any

import torch
import transformers
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import CausalLMOutputWithPast

from internvl.model.internlm2.modeling_internlm2 import InternLM2ForCausalLM
from internvl.model.internvl_chat.adapter_checkpoint import load_adapter_checkpoint
from internvl.model.internvl_chat.chat import ChatMixin, build_conversation
from internvl.model.internvl_chat.checkpoint_keys import (
    build_legacy_key_mapping,
    check_checkpoint_keys,
    find_checkpoint_dir,
)
from internvl.model.internvl_chat.configuration_internvl_chat import InternVLChatConfig, count_image_tokens
from internvl.model.internvl_chat.decoder import CACHE_NAME, configured_attention, get_requested_attention, run_decoder
from internvl.model.internvl_chat.documents import (
    compute_label_weights,
    find_loss_indices,
    find_true,
    normalize_document_boundaries,
    select_loss_tokens,
)
from internvl.model.internvl_chat.generation import (
    default_generation_config,
    save_generation_config,
    set_generation_config,
)
from internvl.model.internvl_chat.lora_mixin import LoraMixin
from internvl.model.internvl_chat.modeling_intern_vit import InternVisionModel
from internvl.model.internvl_chat.safe_loading import one_line_checkpoint_errors, refuse_unsafe_files
from internvl.model.internvl_chat.weight_shapes import check_adapter_ranks, check_model_fits_weights
from internvl.model.internvl_chat.zero3 import is_partitioned
from internvl.model.lora import (
    LORA_RANK_FIELDS,
    freeze_all_but_adapters,
    is_adapter_parameter,
    is_peft_model,
    unwrap_peft,
)
from internvl.model.phi3.modeling_phi3 import Phi3ForCausalLM
from internvl.model.token_loss import (
    compute_logits,
    compute_router_aux_loss,
    compute_token_loss,
    compute_token_losses,
    scale_logits,
)
from internvl.torch_internals import is_collective_error

# LLMs implemented here; every other causal language model is the class of that name in transformers.
LLM_CLASSES = {
    "InternLM2ForCausalLM": InternLM2ForCausalLM,
    "InternLM3ForCausalLM": LlamaForCausalLM,  # the same blocks and names, as published (without biases)
    "Phi3ForCausalLM": Phi3ForCausalLM,
}


def get_llm_class(architecture: str) -> type[PreTrainedModel]:
    """Return the class of a causal language model by its name."""
    return LLM_CLASSES.get(architecture) or getattr(transformers, architecture)


def version_cmp(v1: str, v2: str, op: str = "eq") -> bool:
    """Compare two versions by a function of `operator`; upstream's public helper."""
    from packaging import version

    return getattr(operator, op)(version.parse(v1), version.parse(v2))


class InternVLChatModel(LoraMixin, ChatMixin, PreTrainedModel):
    """InternViT, projector `mlp1` and an LLM, under upstream's parameter names.

    Args:
        vision_model, language_model: parts to use instead of building them from the configuration.
        use_flash_attn: use flash-attn if it is installed and there is a CUDA device.
    """

    config_class = InternVLChatConfig
    main_input_name = "pixel_values"
    base_model_prefix = "language_model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternVisionModel"] + [
        f"{llm}DecoderLayer" for llm in ("Llama", "InternLM2", "Phi3", "Qwen2", "Qwen3", "Qwen3Moe", "GptOss")
    ]
    _supports_flash_attn_2 = _supports_flash_attn = _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # buffers of old checkpoints
    # For `adapter_checkpoint.py`: the base checkpoint, and the names of parameters (not adapters) that earlier runs
    # trained.
    base_checkpoint: dict | None = None
    previously_trained: frozenset[str] = frozenset()
    # Tokens that the tokenizer has and the checkpoint has no row for, beside the image tokens.
    new_token_ids: tuple[int, ...] = ()
    # Weight of documents in the loss, a key of `documents.LOSS_REDUCTIONS`.
    loss_reduction: str = "token"
    config: InternVLChatConfig
    vision_model: Any  # InternVisionModel, maybe in a PeftModel
    language_model: Any  # of one of many LLM classes, maybe in a PeftModel
    mlp1: Any  # nn.Sequential, maybe in a PeftModel

    def __init__(self, config: InternVLChatConfig, vision_model=None, language_model=None, use_flash_attn=True):
        super().__init__(config)
        self.patch_size = config.vision_config.patch_size
        self.select_layer = config.select_layer
        self.template = config.template
        self.downsample_ratio = config.downsample_ratio
        self.num_image_token = count_image_tokens(config)
        self.ps_version = config.ps_version
        self.llm_arch_name = config.llm_config.architectures[0]
        self.img_context_token_id = None  # the caller sets it from its tokenizer
        self.num_samples = 0
        self.conv_template = build_conversation(config)
        self.system_message = self.conv_template.system_message

        llm_class = get_llm_class(self.llm_arch_name)
        with configured_attention(config, llm_class, use_flash_attn):
            self.vision_model = InternVisionModel(config.vision_config) if vision_model is None else vision_model
            self.language_model = llm_class(config.llm_config) if language_model is None else language_model
        self.mlp1 = self._build_projector()
        self.post_init()
        # After `post_init`, which may initialize weights: new adapters must keep B = 0.
        self.add_configured_adapters(has_base_weights=False)

    def _build_projector(self) -> nn.Sequential:
        # Pixel shuffle concatenates the features of (1 / downsample_ratio)^2 patches.
        vision_size = self.config.vision_config.hidden_size * int(1 / self.downsample_ratio) ** 2
        llm_size = self.config.llm_config.hidden_size
        return nn.Sequential(
            nn.LayerNorm(vision_size), nn.Linear(vision_size, llm_size), nn.GELU(), nn.Linear(llm_size, llm_size)
        )

    def _init_weights(self, module):
        """Keep torch's initial values of the projector; the other parts initialize themselves."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> Any:
        """Load a checkpoint from safetensors, with adapters if its configuration has them.

        No remote code is run. If the checkpoint contains only trained tensors (see `adapter_checkpoint.py`), its base
        checkpoint is loaded first, from the recorded path or from `base_model`.

        Args:
            attn_implementation: one of `decoder.ATTN_IMPLEMENTATIONS`; only `eager` gives `output_attentions`.
            kwargs: `base_model`, and those of transformers.

        Raises:
            ValueError: a file is unsafe or damaged, the configuration is invalid, or keys of the weights are missing,
                unexpected or of another shape. Sizes are compared before memory is taken.
        """
        path = pretrained_model_name_or_path
        note = " as DeepSpeed is configured" if is_deepspeed_zero3_enabled() else ""
        with one_line_checkpoint_errors(f"the checkpoint {path}{note}", is_collective_error):
            refuse_unsafe_files(path, not kwargs.get("use_safetensors", True))
            base_model = kwargs.pop("base_model", None)
            config = kwargs.get("config") or InternVLChatConfig.from_pretrained(path)
            if attn_implementation := kwargs.pop("attn_implementation", None):
                kwargs["config"] = config = copy.deepcopy(config)
                config.attn_implementation = attn_implementation
            get_requested_attention(config, get_llm_class(config.llm_config.architectures[0]))
            if getattr(config, "base_model", None):
                kwargs.pop("config", None)
                check_adapter_ranks(config, find_checkpoint_dir(path))
                return load_adapter_checkpoint(cls, path, config, base_model, **kwargs)
            return cls._load_full_checkpoint(path, *args, **kwargs | {"config": config})

    @classmethod
    def _load_full_checkpoint(cls, path, *args, config, **kwargs) -> Any:
        """Load a checkpoint that has all weights; adapters may be among them."""
        returns_info = kwargs.pop("output_loading_info", False)
        # Other shapes must not raise in transformers: `check_checkpoint_keys` lists all problems. Under ZeRO-3
        # transformers has no shapes to compare: parameters are partitioned and their own shapes are empty.
        kwargs |= {"ignore_mismatched_sizes": not is_deepspeed_zero3_enabled(), "output_loading_info": True}
        key_mapping = build_legacy_key_mapping(path, config)
        check_model_fits_weights(cls, config, find_checkpoint_dir(path), key_mapping)
        if key_mapping:
            kwargs["key_mapping"] = key_mapping  # an argument of transformers 5 only
        kwargs.setdefault("use_safetensors", True)
        # pyrefly: ignore[not-iterable]  # a pair with output_loading_info
        model, info = super().from_pretrained(path, *args, config=config, **kwargs)
        check_checkpoint_keys(path, info)
        if key_mapping:  # transformers would apply it in reverse when saving
            model.__dict__.pop("_weight_conversions", None)
        for module in (getattr(model, part) for part in LORA_RANK_FIELDS):
            if is_peft_model(module):
                freeze_all_but_adapters(module)
        set_generation_config(model, path)
        return (model, info) if returns_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save upstream's layout: safetensors, `config.json`, `generation_config.json` of the LLM."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            save_generation_config(self, save_directory)

    def forward(
        self,
        pixel_values=None,
        input_ids=None,
        attention_mask=None,
        position_ids: Any = None,
        image_flags=None,
        past_key_values=None,
        labels: Any = None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        statistics=None,
        loss_weight=None,
        loss_reduction_all_gather=False,
        cu_seqlens=None,
        per_token_loss=False,
        loss_indices=None,
        image_token_indices=None,
        tile_indices=None,
    ) -> Any:
        """Compute logits, and the loss if there are labels.

        Args:
            pixel_values: (T, 3, H, W), the tiles of the batch in order; None for text only.
            input_ids, labels: (B, L); labels are -100 where there is no loss.
            attention_mask: (B, L), for padding. Upstream's packed batches have cumulative document lengths here, see
                `documents.normalize_document_boundaries`.
            position_ids: (B, L). Without `attention_mask` a document begins wherever they are 0, and no token sees
                another document.
            image_flags: (T,) or (T, 1), 1 for tiles of images, 0 for placeholder tiles of text samples; default: all 1.
            loss_weight: (B, L) tensor or nested list, weight of each label; default: by `self.loss_reduction`.
            loss_reduction_all_gather: divide the loss by the mean over ranks of the summed `loss_weight`.
            statistics: ignored; upstream's callers pass it.
            cu_seqlens: cumulative document lengths over the flattened rows, a list [0, ..., B * L]. They save searching
                `position_ids`. For InternVL 3.5's callers it may be a tensor.
            per_token_loss: for evaluation, compute only what `compute_token_losses` returns.
            loss_indices: (n,) of `documents.find_loss_indices`. The collator computes it and the next two on the CPU;
                without them they are computed here, for which the CPU waits for the GPU.
            image_token_indices: (m,), the image tokens in the flattened rows.
            tile_indices: (t,), tiles of image flag 1. With `image_token_indices`, None stands for all tiles.

        Returns:
            CausalLMOutputWithPast, or a tuple with `return_dict=False`. In training mode with labels, `logits` is None:
            the full logits (B, L, V) never exist. With `per_token_loss`, the unweighted cross entropy of each of the n
            loss tokens of the batch, (n,) float32, and whether it has the largest logit, (n,) bool.

        Raises:
            ValueError: the numbers of image tokens in `input_ids` and of visual tokens differ.
        """
        attention_mask, cu_seqlens = normalize_document_boundaries(attention_mask, cu_seqlens)
        llm = unwrap_peft(self.language_model)
        outputs = run_decoder(
            llm,
            self.embed_inputs(input_ids, pixel_values, image_flags, None, image_token_indices, tile_indices),
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            **{CACHE_NAME: past_key_values},
            use_cache=bool(use_cache) and labels is None and not self.training,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        states = outputs.last_hidden_state  # (B, L, C)
        head, scale_fn = llm.get_output_embeddings(), partial(scale_logits, llm)
        if per_token_loss:
            if loss_indices is None:
                loss_indices = find_loss_indices(labels, position_ids)
            return compute_token_losses(head, *select_loss_tokens(states, labels, loss_indices), scale_fn)
        loss = logits = None
        if labels is None or not self.training:
            logits = compute_logits(llm, states)
        if labels is not None:
            if loss_weight is None and self.loss_reduction != "token":
                loss_weight = compute_label_weights(labels, position_ids, self.loss_reduction)
            average = loss_weight is not None and loss_reduction_all_gather
            loss_args = (labels, position_ids, loss_weight, average)
            if logits is None:  # only the states of loss tokens go through the head, in chunks
                loss = compute_token_loss(states, head, *loss_args, scale_fn, loss_indices)
            else:
                loss = compute_token_loss(logits, nn.Identity(), *loss_args, None, loss_indices)
            # The LLM returns router logits if its configuration has `output_router_logits`.
            if router_logits := getattr(outputs, "router_logits", None):
                loss = loss + compute_router_aux_loss(llm, router_logits, attention_mask)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if return_dict is not False else output.to_tuple()

    def embed_inputs(
        self,
        input_ids,
        pixel_values: Any = None,
        image_flags=None,
        visual_features=None,
        image_token_indices=None,
        tile_indices=None,
    ) -> torch.Tensor:
        """Compute input embeddings (B, L, C) of text and image tokens.

        The arguments are those of `forward`. `visual_features` (T, tokens, C) replace the features of `pixel_values`,
        if these are known already.
        """
        # The vision encoder runs before the embeddings in every batch: under ZeRO-3 all ranks must use weights in the
        # same order.
        has_tiles = pixel_values is not None and len(pixel_values) > 0
        zero_term = 0  # keeps the vision encoder in the graph of a batch without tiles
        if visual_features is None and has_tiles:
            visual_features = self.extract_feature(pixel_values)
        elif visual_features is None and self._must_run_vision_encoder():
            zero_term = 0 * self.extract_feature(self._make_dummy_tile()).sum()
        embeds = self.get_input_embeddings()(input_ids)
        if visual_features is None:
            return embeds + zero_term
        if image_token_indices is None:
            if self.img_context_token_id is None:
                raise ValueError("img_context_token_id is not set: set it to the tokenizer's id of <IMG_CONTEXT>")
            image_token_indices = find_true(input_ids == self.img_context_token_id)
            tile_indices = None if image_flags is None else find_true(image_flags == 1)
        if tile_indices is not None:
            visual_features = visual_features.index_select(0, tile_indices)
        visual_tokens = visual_features.flatten(0, 1).to(embeds.dtype)  # (tokens of all tiles, C)
        if (num_image_tokens := len(image_token_indices)) != len(visual_tokens):
            raise ValueError(
                f"{num_image_tokens} image tokens in input_ids, but {len(visual_tokens)} visual tokens from the tiles"
            )
        return embeds.flatten(0, 1).index_copy(0, image_token_indices, visual_tokens).view_as(embeds)

    def _must_run_vision_encoder(self) -> bool:
        """Return whether the vision encoder must run in batches without tiles, too.

        All ranks must use the same weights if these are trainable (gradients are reduced) or partitioned (ZeRO-3).
        """
        weights = chain(self.vision_model.parameters(), self.mlp1.parameters())
        return any((self.training and weight.requires_grad) or is_partitioned(weight) for weight in weights)

    def _make_dummy_tile(self) -> torch.Tensor:
        """Make a black tile of one visual token.

        The dtype comes from an iteration over parameters. Reading a weight as an attribute would make ZeRO-3 gather it,
        while ranks with tiles never call this function.
        """
        side = self.config.vision_config.patch_size * round(1 / self.downsample_ratio)
        weight = next(unwrap_peft(self.vision_model).embeddings.patch_embedding.parameters())
        return torch.zeros(1, 3, side, side, dtype=weight.dtype, device=weight.device)

    def extract_feature(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compute visual tokens (T, num_image_token, C) of tiles (T, 3, H, W)."""
        is_last_layer = self.select_layer == -1
        outputs = self.vision_model(pixel_values=pixel_values, output_hidden_states=not is_last_layer, return_dict=True)
        states = outputs.last_hidden_state if is_last_layer else outputs.hidden_states[self.select_layer]
        patches = states[:, 1:]  # without the class token
        side = int(patches.shape[1] ** 0.5)
        patches = self.pixel_shuffle(patches.unflatten(1, (side, side)), self.downsample_ratio)
        return self.mlp1(patches.flatten(1, 2))

    def pixel_shuffle(self, x: torch.Tensor, scale_factor: float = 0.5) -> torch.Tensor:
        """Join m x m patches to one token.

        (T, rows, columns, K) -> (T, rows / m, columns / m, K * m^2) with m = 1 / scale_factor. The patches of a token
        are in row order. Version `v1` transposes the grid of tokens; the first checkpoints were trained like this.
        """
        m = round(1 / scale_factor)
        x = x.unflatten(2, (-1, m)).unflatten(1, (-1, m))  # (T, rows / m, m, columns / m, m, K)
        order = (0, 3, 1, 2, 4, 5) if self.ps_version == "v1" else (0, 1, 3, 2, 4, 5)
        return x.permute(*order).flatten(3)

    @torch.no_grad()
    def generate(
        self,
        pixel_values=None,
        input_ids=None,
        attention_mask=None,
        visual_features=None,
        generation_config=None,
        output_hidden_states=None,
        **generate_kwargs,
    ) -> torch.Tensor:
        """Generate token ids (B, new tokens).

        `visual_features` (T, tokens, C) replace `pixel_values`, as in `embed_inputs`.
        """
        embeds = self.embed_inputs(input_ids, pixel_values, visual_features=visual_features)
        return unwrap_peft(self.language_model).generate(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            generation_config=generation_config,
            output_hidden_states=output_hidden_states,
            use_cache=True,
            **generate_kwargs,
        )

    def _generate_answers(self, *args) -> list[str]:
        with default_generation_config(self):
            return super()._generate_answers(*args)

    def get_input_embeddings(self) -> nn.Module:
        return unwrap_peft(self.language_model).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        unwrap_peft(self.language_model).set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return unwrap_peft(self.language_model).get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        unwrap_peft(self.language_model).set_output_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, **kwargs) -> nn.Module:
        """Resize both embeddings of the LLM and record their size, as transformers' models do.

        Afterwards the base checkpoint lacks rows, so the model is saved with all its weights.

        Raises:
            ValueError: an embedding has adapters.
        """
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.get_input_embeddings()
        llm = unwrap_peft(self.language_model)
        layers = (llm.get_input_embeddings(), llm.get_output_embeddings())
        if any(is_adapter_parameter(f".{name}") for layer in layers for name, _ in layer.named_parameters()):
            raise ValueError(
                "resize_token_embeddings is not supported while an embedding has adapters: merge them first."
            )
        embeddings = llm.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, **kwargs)
        self.config.llm_config.vocab_size, self.base_checkpoint = llm.config.vocab_size, None
        return embeddings

    @property
    def lm_head(self) -> nn.Module:
        return self.get_output_embeddings()
