"""The InternVL chat model in a checkpoint's own code, for inference.

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    answer = model.chat(tokenizer, pixel_values, "What is this?", {"max_new_tokens": 64})

Tiles -> InternViT -> pixel shuffle -> projector `mlp1` -> LLM. Shapes: B rows, L tokens, T tiles, C hidden size of the
LLM.
"""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

# Most versions of transformers copy the files that this one imports, but not those that only they import.
from internvl.conversation import get_conv_template
from internvl.model.internvl_chat.chat import ChatMixin
from internvl.model.remote_code.configuration_intern_vit import InternVisionConfig  # noqa: F401
from internvl.model.remote_code.configuration_internlm2 import InternLM2Config  # noqa: F401
from internvl.model.remote_code.configuration_internvl_chat import InternVLChatConfig
from internvl.model.remote_code.modeling_intern_vit import InternVisionModel
from internvl.model.remote_code.modeling_internlm2 import CACHE_NAME, InternLM2ForCausalLM

LLM_CLASSES = {"InternLM2ForCausalLM": InternLM2ForCausalLM, "InternLM3ForCausalLM": transformers.LlamaForCausalLM}


class InternVLChatModel(ChatMixin, PreTrainedModel, GenerationMixin):
    """InternViT, projector and LLM, with the names of the published models."""

    config_class = InternVLChatConfig
    main_input_name = "pixel_values"
    base_model_prefix = "language_model"
    _no_split_modules = ["InternVisionModel"]
    _supports_flash_attn_2 = _supports_flash_attn = _supports_sdpa = True

    def __init__(self, config, vision_model=None, language_model=None):
        super().__init__(config)
        self.template, self.conv_template = config.template, get_conv_template(config.template)
        system_message = getattr(config, "system_message", None)
        self.system_message = self.conv_template.system_message if system_message is None else system_message
        self.img_context_token_id = None  # `chat` sets it
        vision_config, llm_config = config.vision_config, config.llm_config
        self.factor = round(1 / config.downsample_ratio)  # an image token covers factor x factor patches
        tile_size = config.force_image_size or vision_config.image_size
        self.num_image_token = (tile_size // vision_config.patch_size // self.factor) ** 2

        if config._attn_implementation != "sdpa":  # the default, which the LLM selects itself if it supports it
            llm_config._attn_implementation = config._attn_implementation
        architecture = llm_config.architectures[0]
        llm_class = LLM_CLASSES.get(architecture) or getattr(transformers, architecture)
        self.vision_model = vision_model or InternVisionModel(vision_config)
        self.language_model = language_model or llm_class(llm_config)
        vision_size, llm_size = vision_config.hidden_size * self.factor**2, llm_config.hidden_size
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(vision_size), nn.Linear(vision_size, llm_size), nn.GELU(), nn.Linear(llm_size, llm_size)
        )
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.language_model.set_output_embeddings(value)

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
    ):
        """Run the LLM on text and tiles; the output is the LLM's.

        Args:
            pixel_values: (T, 3, H, W), the tiles of the batch in order.
            image_flags: (T,) or (T, 1), 1 for tiles of images, 0 for placeholder tiles; default: all 1.
        """
        options = {
            "position_ids": position_ids,
            CACHE_NAME: past_key_values,
            "labels": labels,
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        return self.language_model(
            inputs_embeds=self.embed_inputs(input_ids, pixel_values, image_flags),
            attention_mask=attention_mask,
            **{name: value for name, value in options.items() if value is not None},
        )

    def embed_inputs(self, input_ids, pixel_values=None, image_flags=None, visual_features=None):
        """Compute input embeddings (B, L, C) of text and image tokens."""
        embeds = self.get_input_embeddings()(input_ids)
        if visual_features is None and pixel_values is None:
            return embeds
        if visual_features is None:
            visual_features = self.extract_feature(pixel_values)
        if image_flags is not None:
            visual_features = visual_features[image_flags.flatten() == 1]
        if self.img_context_token_id is None:
            raise ValueError("img_context_token_id is not set: set it to the tokenizer's id of <IMG_CONTEXT>")
        is_image_token = input_ids == self.img_context_token_id  # (B, L)
        visual_tokens = visual_features.flatten(0, 1).to(embeds)
        if int(is_image_token.sum()) != len(visual_tokens):
            raise ValueError(f"{int(is_image_token.sum())} image tokens, but {len(visual_tokens)} visual tokens")
        return embeds.masked_scatter(is_image_token[..., None].to(embeds.device), visual_tokens)

    def extract_feature(self, pixel_values):
        """Compute visual tokens (T, num_image_token, C) of tiles (T, 3, H, W)."""
        outputs = self.vision_model(pixel_values=pixel_values, output_hidden_states=True)
        patches = outputs.hidden_states[self.config.select_layer][:, 1:]  # without the class token
        side = int(patches.shape[1] ** 0.5)
        return self.mlp1(self.pixel_shuffle(patches.unflatten(1, (side, side))).flatten(1, 2))

    def pixel_shuffle(self, x):
        """Join m x m patches to one token: (T, rows, columns, K) -> (T, rows / m, columns / m, K * m^2).

        Version `v1` transposes the grid of tokens; the first checkpoints were trained like this.
        """
        x = x.unflatten(2, (-1, self.factor)).unflatten(1, (-1, self.factor))
        order = (0, 3, 1, 2, 4, 5) if self.config.ps_version == "v1" else (0, 1, 3, 2, 4, 5)
        return x.permute(*order).flatten(3)

    @torch.no_grad()
    def generate(self, pixel_values=None, input_ids: Any = None, attention_mask=None, visual_features=None, **options):
        """Generate token ids (B, new tokens); `options` are those of the LLM's `generate`."""
        embeds = self.embed_inputs(input_ids, pixel_values, visual_features=visual_features)
        # Without `inputs`, transformers 4.37 puts a BOS token before the answer.
        options = {"use_cache": True, "inputs": input_ids[:, :0], **options}
        if self.generation_config.eos_token_id is not None:  # from generation_config.json
            options.setdefault("eos_token_id", self.generation_config.eos_token_id)
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **options)
