"""The InternVL chat model: configurations, InternViT, LoRA, checkpoints.

Classes are imported on first access: data and planning use the small modules here and must not import
`torch.distributed`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .configuration_intern_vit import InternVisionConfig
    from .configuration_internvl_chat import InternVLChatConfig
    from .modeling_intern_vit import InternVisionModel
    from .modeling_internvl_chat import InternVLChatModel

__all__ = ["InternVLChatConfig", "InternVLChatModel", "InternVisionConfig", "InternVisionModel"]
CLASS_MODULES = {
    "InternVisionConfig": "configuration_intern_vit",
    "InternVisionModel": "modeling_intern_vit",
    "InternVLChatConfig": "configuration_internvl_chat",
    "InternVLChatModel": "modeling_internvl_chat",
}


def __getattr__(name: str):
    if name not in CLASS_MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{CLASS_MODULES[name]}", __name__), name)
