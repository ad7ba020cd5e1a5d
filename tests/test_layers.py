"""The walls of the house, read off the syntax tree: imports only go down, and the data path knows no process group."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "internvl_chat"

# Lowest first. Inside a line a file may import those to its left.
LAYERS = [
    ["internvl.train.constants", "internvl.train.preemption", "internvl.train"],
    ["internvl.command_line", "internvl.conversation", "internvl.launchers", "internvl.dist_utils"],
    ["internvl.switchboard", "internvl.lifeline"],
    ["internvl.model.internlm2.configuration_internlm2", "internvl.model.phi3.configuration_phi3"],
    [
        "internvl.model.internvl_chat.configuration_intern_vit",
        "internvl.model.internvl_chat.configuration_internvl_chat",
    ],
    [
        "internvl.train.refused",
        "internvl.train.part_arguments",
        "internvl.train.fault_arguments",
        "internvl.train.arguments",
        "internvl.train.files",
        "internvl.train.jsonl",
        "internvl.train.arrow",
        "internvl.train.record",
    ],
    ["internvl.train.image", "internvl.train.video", "internvl.train.upstream_names"],
    [
        "internvl.model.internvl_chat.chat",
        "internvl.model.lora_dropout",
        "internvl.model.lora_linear",
        "internvl.model.lora",
        "internvl.model.token_loss",
    ],
    ["internvl.train.collator", "internvl.train.splitting", "internvl.train.packing", "internvl.train.plan"],
    [
        "internvl.train.metrics",
        "internvl.train.model_flops",
        "internvl.train.device_peak",
        "internvl.train.collectives",
    ],
    ["internvl.train.flops", "internvl.train.schedule", "internvl.train.summary", "internvl.model.varlen"],
    ["internvl.model.internvl_chat.checkpoint_keys", "internvl.model.internvl_chat.strange_files"],
    [f"internvl.model.internvl_chat.{name}" for name in ("adapting", "resize", "merging", "trained")],
    ["internvl.model.saved_tokenizer"],
    ["internvl.model.internlm2.tokenization_internlm2", "internvl.model.internlm2.tokenization_internlm2_fast"],
    ["internvl.model.tokenization_llama", "internvl.model.tokenizer"],
    ["internvl.train.segments", "internvl.train.preprocess"],
    ["internvl.model.internvl_chat.modeling_intern_vit", "internvl.model.internvl_chat.decoder"],
    ["internvl.model.internlm2.modeling_internlm2", "internvl.model.phi3.modeling_phi3"],
    ["internvl.train.dataset", "internvl.model.internvl_chat.modeling_internvl_chat", "internvl.model.internvl_chat"],
    ["internvl.train.lengths", "internvl.train.dataset_packed", "internvl.model.checkpoint", "internvl.model"],
    [
        "internvl.model.tensor_files",
        "internvl.model.adapter_files",
        "internvl.model.combine",
        "internvl.model.hf_format",
        "internvl.model.hf_config",
        "internvl.model.hf_adapter",
        "internvl.model.hf_processor",
    ],
    ["internvl.model.recompute", "internvl.model.compiled"],
    ["internvl.model.liger", "internvl.train.intact", "internvl.train.check", "internvl.train.quantize"],
    ["internvl.train.preference", "internvl.train.preference_loss"],
    [
        "internvl.train.towers",
        "internvl.train.trainable",
        "internvl.train.optimizer_state",
        "internvl.train.pickles",
        "internvl.train.checkpointing",
        "internvl.train.stopping",
        "internvl.train.skipping",
        "internvl.train.scheduled",
        "internvl.train.stacks",
        "internvl.train.watchdog",
        "internvl.train.metered",
        "internvl.train.trainer",
        "internvl.train.trainer_dpo",
    ],
    ["internvl.train.build_data", "internvl.train.build", "internvl.train.build_mpo"],
    ["internvl.train.ending", "internvl.train.run"],
    ["internvl.train.internvl_chat_finetune", "internvl.train.internvl_chat_pretrain"],
    ["internvl.train.internvl_chat_mpo", "tools"],
    ["internvl.patch.pad_data_collator", "internvl.patch.train_sampler_patch", "internvl.patch"],
]
HEIGHT = {module: (level, place) for level, layer in enumerate(LAYERS) for place, module in enumerate(layer)}
DATA_PATH = [
    "files",
    "jsonl",
    "arrow",
    "record",
    "image",
    "video",
    "upstream_names",
    "segments",
    "preprocess",
    "dataset",
]
DATA_PATH += [
    "lengths",
    "splitting",
    "packing",
    "plan",
    "schedule",
    "summary",
    "flops",
    "dataset_packed",
    "collator",
    "preference",
]
FILES = sorted(PACKAGE.glob("internvl/**/*.py")) + sorted(PACKAGE.glob("tools/**/*.py"))


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] == "tools":
        return "tools"
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_of(file).split(".") if file.name == "__init__.py" else module_of(file).split(".")[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([node.module] if node.module else []))
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in HEIGHT else base for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_only_go_down(file):
    module = module_of(file)
    assert module in HEIGHT, f"{module} has no place in the house: give it one in LAYERS"
    above = {name for name in imports_of(file) if name in HEIGHT and name != module and HEIGHT[name] > HEIGHT[module]}
    assert not above, f"{module} imports {above}, which stand above it"
    unknown = {name for name in imports_of(file) if name.startswith("internvl") and name not in HEIGHT}
    assert not unknown, f"{module} imports {unknown}, which have no place in the house"


def test_model_never_imports_train():
    for file in PACKAGE.glob("internvl/model/**/*.py"):
        assert not {name for name in imports_of(file) if name.startswith("internvl.train")}, file


@pytest.mark.parametrize("name", DATA_PATH)
def test_data_path_knows_no_process_group(name):
    names = imports_of(PACKAGE / "internvl" / "train" / f"{name}.py")
    assert not {n for n in names if n.startswith("torch.distributed") or n == "internvl.dist_utils"}


def test_entry_points_and_patch_are_imported_by_nobody():
    entries = {f"internvl.train.internvl_chat_{name}" for name in ("finetune", "pretrain", "mpo")}
    tops = entries | {"internvl.patch"}
    for file in FILES:
        if module_of(file) not in tops:
            assert not imports_of(file) & tops, file
