"""The InternVL chat model; its classes are imported when first asked for, so that its small modules load alone."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .configuration_intern_vit import InternVisionConfig
    from .configuration_internvl_chat import InternVLChatConfig
    from .modeling_intern_vit import InternVisionModel
    from .modeling_internvl_chat import InternVLChatModel

__all__ = ["InternVLChatConfig", "InternVLChatModel", "InternVisionConfig", "InternVisionModel"]
HOMES = {
    "InternVisionConfig": "configuration_intern_vit",
    "InternVisionModel": "modeling_intern_vit",
    "InternVLChatConfig": "configuration_internvl_chat",
    "InternVLChatModel": "modeling_internvl_chat",
}


def __getattr__(name: str):
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{HOMES[name]}", __name__), name)
