"""The chat model: vision encoder, projector and language model, with upstream's parameter names."""

from .configuration_intern_vit import InternVisionConfig
from .configuration_internvl_chat import InternVLChatConfig
from .modeling_intern_vit import InternVisionModel
from .modeling_internvl_chat import InternVLChatModel

__all__ = ["InternVisionConfig", "InternVisionModel", "InternVLChatConfig", "InternVLChatModel"]
