"""Private names of libraries: each one that is used is listed, and exists in the installed version.

A new version of a library that moves one fails here with its name. Other tests hold the process groups of torch, the
optimizers of DeepSpeed, and the methods of transformers.Trainer that are overridden.
"""

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE_DIR = Path(__file__).parents[1] / "internvl_chat"
# Private name -> the library's class or module that has it, and the files that use it.
LIBRARY_NAMES = {
    "_attn_implementation": (
        "transformers.PretrainedConfig",
        ["decoder", "modeling_internlm2", "modeling_internvl_chat", "varlen_attention", "contenders", "machine"],
    ),
    "_from_model_config": ("transformers.GenerationConfig", ["generation"]),
    "_supports_attention_backend": ("transformers.PreTrainedModel", ["varlen_attention"]),
    "_is_stateful": ("transformers.PreTrainedModel", ["varlen_attention"]),
    "_gradient_checkpointing_func": (
        "transformers.modeling_layers.GradientCheckpointingLayer",
        ["activation_checkpointing", "modeling_intern_vit"],
    ),
    "_hf_peft_config_loaded": ("transformers.integrations.peft.PeftAdapterMixin", ["quantization"]),
    "_save_optimizer_and_scheduler": ("transformers.Trainer", ["training_states"]),
    "_save_pretrained": ("transformers.PreTrainedTokenizerBase", ["tokenization_internlm2"]),
    "_register_custom_module": ("peft.LoraConfig", ["lora_linear"]),
    "_modules": ("torch.nn.Module", ["lora_linear"]),
    "_forward_pre_hooks": ("torch.nn.Module", ["lora_linear"]),
    "_forward_hooks": ("torch.nn.Module", ["lora_linear"]),
    "_world": ("torch.distributed.distributed_c10d", ["torch_internals"]),
    "_dynamo": ("torch", ["activation_checkpointing"]),
    "_set_pg_timeout": ("torch.distributed.distributed_c10d", ["torch_internals"]),
    "_get_norm_groups": ("deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3", ["deepspeed_internals"]),
    # Documented by Python in spite of the underscore.
    "_exit": ("os", ["signals", "parent"]),
    "_current_frames": ("sys", ["watchdog"]),
}
NAMEDTUPLE_METHODS = {"_replace", "_asdict", "_fields"}


def find_private_uses(file: Path) -> set[str]:
    """Find private attributes of objects other than self, cls and super()."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            is_super = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
            if owner not in ("self", "cls") and not is_super:
                names.add(node.attr)
    return names - NAMEDTUPLE_METHODS


def test_every_private_name_is_listed_with_its_files():
    used: dict[str, set[str]] = {}
    for file in [*PACKAGE_DIR.glob("internvl/**/*.py"), *PACKAGE_DIR.glob("tools/**/*.py")]:
        for name in find_private_uses(file):
            used.setdefault(name, set()).add(file.stem)
    assert used == {name: set(files) for name, (_, files) in LIBRARY_NAMES.items()}


@pytest.mark.parametrize(("name", "owner"), [(name, owner) for name, (owner, _) in LIBRARY_NAMES.items()])
def test_private_name_has_not_moved(name, owner):
    module, _, attribute = owner.rpartition(".")
    found = import_module(owner) if not module or owner.endswith("c10d") else getattr(import_module(module), attribute)
    # Instance attributes are not on the class: they stand in its source, or in that of a base class.
    sources = [inspect.getsource(base) for base in getattr(found, "__mro__", ()) if base.__module__ != "builtins"]
    assert hasattr(found, name) or any(f"self.{name}" in source for source in sources), f"{owner} has lost {name}"
