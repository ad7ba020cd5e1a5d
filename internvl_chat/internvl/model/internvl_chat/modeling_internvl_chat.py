"""The chat model: tiles -> InternViT -> pixel shuffle -> projector -> image tokens of the language model -> loss.

Fed by the collator's batch in training, by `chat` and `batch_chat` in use. Works alike with a plain and with a
LoRA-wrapped vision encoder or language model.
"""

import operator
from functools import partial
from itertools import chain

import torch
import transformers
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import CausalLMOutputWithPast

from internvl.model.internlm2.modeling_internlm2 import InternLM2ForCausalLM
from internvl.model.internvl_chat.adapter_checkpoint import load_adapter_checkpoint
from internvl.model.internvl_chat.chat import ChatMixin, build_conversation
from internvl.model.internvl_chat.checkpoint_keys import older_adapter_names, refuse_wrong_keys
from internvl.model.internvl_chat.configuration_internvl_chat import InternVLChatConfig, count_image_tokens
from internvl.model.internvl_chat.decoder import choose_attention, decode
from internvl.model.internvl_chat.documents import document_weights
from internvl.model.internvl_chat.lora_mixin import LoraMixin
from internvl.model.internvl_chat.modeling_intern_vit import InternVisionModel
from internvl.model.internvl_chat.safe_loading import refuse_unsafe_files
from internvl.model.lora import LORA_RANK_FIELDS, freeze_all_but_adapters, is_peft_model, unwrap_peft
from internvl.model.phi3.modeling_phi3 import Phi3ForCausalLM
from internvl.model.token_loss import balance_loss, compute_logits, keep_logits, scale_logits, token_loss

# Language models this repository brings along; every other causal language model is transformers' class of that name.
LLM_CLASSES = {
    "InternLM2ForCausalLM": InternLM2ForCausalLM,
    "InternLM3ForCausalLM": LlamaForCausalLM,  # the same blocks and names, as published (without biases)
    "Phi3ForCausalLM": Phi3ForCausalLM,
}


def llm_class_of(architecture: str) -> type[PreTrainedModel]:
    return LLM_CLASSES.get(architecture) or getattr(transformers, architecture)


def version_cmp(v1: str, v2: str, op: str = "eq") -> bool:
    """Compares two version strings with the comparison of that name in `operator`."""
    from packaging import version

    return getattr(operator, op)(version.parse(v1), version.parse(v2))


class InternVLChatModel(LoraMixin, ChatMixin, PreTrainedModel):
    """InternViT, projector `mlp1` and a causal language model, under upstream's parameter names.

    Args:
        vision_model, language_model: take these instead of building them from the configuration.
        use_flash_attn: use flash-attn where it is installed and there is a CUDA device; the numbers are the same.
    """

    config_class = InternVLChatConfig
    main_input_name = "pixel_values"
    base_model_prefix = "language_model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternVisionModel"] + [
        f"{llm}DecoderLayer" for llm in ("Llama", "InternLM2", "Phi3", "Qwen2", "Qwen3", "Qwen3Moe", "GptOss")
    ]
    _supports_flash_attn_2 = _supports_flash_attn = _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # tables in old checkpoints, recomputed today
    # For saving what was trained alone (see `trained`): the base, and what earlier runs trained beside adapters.
    base_checkpoint: dict | None = None
    previously_trained: frozenset[str] = frozenset()
    # How the documents of a row weigh in the loss: token, sample or square (`token_loss.REDUCTIONS`).
    loss_reduction: str = "token"

    def __init__(self, config: InternVLChatConfig, vision_model=None, language_model=None, use_flash_attn=True):
        super().__init__(config)
        self.patch_size = config.vision_config.patch_size
        self.select_layer = config.select_layer
        self.template = config.template
        self.downsample_ratio = config.downsample_ratio
        self.num_image_token = count_image_tokens(config)
        self.ps_version = config.ps_version
        self.llm_arch_name = config.llm_config.architectures[0]
        self.img_context_token_id = None  # set from the tokenizer by whoever feeds the model
        self.num_samples = 0
        self.conv_template = build_conversation(config)
        self.system_message = self.conv_template.system_message

        llm_class = llm_class_of(self.llm_arch_name)
        choose_attention(config, llm_class, use_flash_attn)
        self.vision_model = InternVisionModel(config.vision_config) if vision_model is None else vision_model
        self.language_model = llm_class(config.llm_config) if language_model is None else language_model
        self.mlp1 = self._build_projector()
        self.post_init()
        # After `post_init`: it may draw new weights, and fresh adapters must change nothing.
        self.add_configured_adapters(loaded=False)

    def _build_projector(self) -> nn.Sequential:
        wide = self.config.vision_config.hidden_size * int(1 / self.downsample_ratio) ** 2
        narrow = self.config.llm_config.hidden_size
        return nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, narrow), nn.GELU(), nn.Linear(narrow, narrow))

    def _init_weights(self, module):
        """The projector keeps torch's own initial values; both towers know theirs."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads a checkpoint from safetensors, wrapping with LoRA as its config says. No remote code is run.

        One that holds what was trained alone (see `trained`) stands on its base, which is where it was or `base_model`.

        Raises:
            ValueError: keys are missing, unexpected or of another shape, all in the message; a file is not opened.
        """
        refuse_unsafe_files(pretrained_model_name_or_path, not kwargs.get("use_safetensors", True))
        base_model = kwargs.pop("base_model", None)
        config = kwargs.get("config") or cls.config_class.from_pretrained(pretrained_model_name_or_path)
        if getattr(config, "base_model", None):
            kwargs.pop("config", None)
            return load_adapter_checkpoint(cls, pretrained_model_name_or_path, config, base_model, **kwargs)
        want_info = kwargs.pop("output_loading_info", False)
        # Other shapes are ignored so that all can be listed; under ZeRO-3 the model's own are not there to compare.
        lenient = {"ignore_mismatched_sizes": not is_deepspeed_zero3_enabled(), "output_loading_info": True}
        names = older_adapter_names(pretrained_model_name_or_path, config)
        older = {"key_mapping": names} if names else {}  # transformers 5
        kwargs = {"use_safetensors": True, **kwargs, **lenient, **older}
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        refuse_wrong_keys(pretrained_model_name_or_path, info)
        if older:  # else it would be saved under these names again
            model.__dict__.pop("_weight_conversions", None)
        for part in filter(is_peft_model, (getattr(model, part) for part in LORA_RANK_FIELDS)):
            freeze_all_but_adapters(part)
        return (model, info) if want_info else model

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Writes upstream's layout: safetensors, `config.json` and the language model's `generation_config.json`."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            unwrap_peft(self.language_model).generation_config.save_pretrained(save_directory)

    def forward(
        self,
        pixel_values=None,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        image_flags=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        statistics=None,
        loss_weight=None,
        loss_reduction_all_gather=False,
        cu_seqlens=None,
    ):
        """One pass over a batch (B, L).

        Args:
            pixel_values: (T, 3, H, W), the tiles of the whole batch in order; None for text only.
            image_flags: (T,) or (T, 1), 1 for tiles that count and 0 for placeholders of text samples; default all 1.
            position_ids: (B, L); where they restart at 0 without `attention_mask`, another document begins, and no
                token sees another document.
            loss_weight: (B, L) tensor or nested list, weight of each label, default: by `self.loss_reduction`;
                `loss_reduction_all_gather` then divides by the mean over ranks of the summed weights.
            statistics: accepted for upstream's callers.
            cu_seqlens: a list of where documents begin in the rows laid end to end, and B L, so that `position_ids`
                need not be searched. InternVL 3.5's callers give a tensor: all that says is not to mind the mask.

        Returns:
            CausalLMOutputWithPast. In training mode with labels `logits` is None: they never exist as a whole.

        Raises:
            ValueError: image tokens in `input_ids` and visual tokens of the flagged tiles differ in number.
        """
        llm = unwrap_peft(self.language_model)
        bounds = getattr(attention_mask, "dtype", None) == torch.int32  # upstream's packed batches
        attention_mask = None if bounds or cu_seqlens is not None else attention_mask
        outputs = decode(
            llm,
            self._embed(input_ids, pixel_values, image_flags),
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens if isinstance(cu_seqlens, list) else None,
            past_key_values=past_key_values,
            use_cache=bool(use_cache) and labels is None and not self.training,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        states, head, scale = outputs.last_hidden_state, llm.get_output_embeddings(), partial(scale_logits, llm)
        loss = logits = None
        if labels is None or not self.training:
            logits = compute_logits(llm, states)
            states, head, scale = logits, nn.Identity(), keep_logits
        if labels is not None:
            if loss_weight is None and self.loss_reduction != "token":
                loss_weight = document_weights(labels, position_ids, self.loss_reduction)
            average = loss_weight is not None and loss_reduction_all_gather
            loss = token_loss(states, head, labels, position_ids, loss_weight, average, scale)
            if router_logits := getattr(outputs, "router_logits", None):  # as `output_router_logits` of its config says
                loss = loss + balance_loss(llm, router_logits, attention_mask)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if return_dict is not False else output.to_tuple()

    def _embed(self, input_ids, pixel_values=None, image_flags=None, visual_features=None) -> torch.Tensor:
        """Token embeddings (B, L, C), those of the image tokens replaced by the visual tokens, in order."""
        # The vision encoder first, whatever it is shown: under ZeRO-3 all ranks must use weights in the same order.
        shown, unused = pixel_values is not None and len(pixel_values) > 0, 0
        if visual_features is None and shown:
            visual_features = self.extract_feature(pixel_values)
        elif visual_features is None and self._see_anyway():
            unused = 0 * self.extract_feature(self._smallest_picture()).sum()
        embeds = self.get_input_embeddings()(input_ids)
        if visual_features is None:
            return embeds + unused
        if image_flags is not None:
            visual_features = visual_features[image_flags.flatten() == 1]
        if self.img_context_token_id is None:
            raise ValueError("img_context_token_id is not set: give the model the id of the tokenizer's <IMG_CONTEXT>")
        is_image = input_ids == self.img_context_token_id
        visual_tokens = visual_features.flatten(0, 1).to(embeds.dtype)
        if (found := int(is_image.sum())) != (seen := len(visual_tokens)):
            raise ValueError(f"{found} image tokens in input_ids, but {seen} visual tokens from the tiles")
        return embeds.masked_scatter(is_image[..., None], visual_tokens)

    def _see_anyway(self) -> bool:
        """Whether the vision encoder must run without a picture: its weights train, or lie on all ranks (ZeRO-3)."""
        weights = chain(self.vision_model.parameters(), self.mlp1.parameters())
        return any((self.training and weight.requires_grad) or hasattr(weight, "ds_id") for weight in weights)

    def _smallest_picture(self) -> torch.Tensor:
        """Black, of one visual token. Asks no weight by name, which ZeRO-3 would gather: not all ranks come here."""
        side = self.config.vision_config.patch_size * round(1 / self.downsample_ratio)
        weight = next(unwrap_peft(self.vision_model).embeddings.patch_embedding.parameters())
        return torch.zeros(1, 3, side, side, dtype=weight.dtype, device=weight.device)

    def extract_feature(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Tiles (T, 3, H, W) -> visual tokens (T, num_image_token, language model's hidden size)."""
        deeper = self.select_layer != -1
        outputs = self.vision_model(pixel_values=pixel_values, output_hidden_states=deeper, return_dict=True)
        states = outputs.hidden_states[self.select_layer] if deeper else outputs.last_hidden_state
        patches = states[:, 1:]  # without the class token
        side = int(patches.shape[1] ** 0.5)
        patches = self.pixel_shuffle(patches.unflatten(1, (side, side)), self.downsample_ratio)
        return self.mlp1(patches.flatten(1, 2))

    def pixel_shuffle(self, x: torch.Tensor, scale_factor: float = 0.5) -> torch.Tensor:
        """(N, R, C, K) -> (N, R s, C s, K / s^2): each m x m neighbourhood (m = 1 / s), row by row, becomes one token.

        Version `v1` gives the grid transposed, as the first checkpoints were trained.
        """
        m = round(1 / scale_factor)
        x = x.unflatten(2, (-1, m)).unflatten(1, (-1, m))  # (N, R/m, m, C/m, m, K)
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
        """Generated ids (B, new tokens). `visual_features` (T, tokens, C) spare a second pass over known tiles."""
        embeds = self._embed(input_ids, pixel_values, visual_features=visual_features)
        return unwrap_peft(self.language_model).generate(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            generation_config=generation_config,
            output_hidden_states=output_hidden_states,
            use_cache=True,
            **generate_kwargs,
        )

    def get_input_embeddings(self) -> nn.Module:
        return unwrap_peft(self.language_model).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        unwrap_peft(self.language_model).set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return unwrap_peft(self.language_model).get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        unwrap_peft(self.language_model).set_output_embeddings(value)

    @property
    def lm_head(self) -> nn.Module:
        return self.get_output_embeddings()
