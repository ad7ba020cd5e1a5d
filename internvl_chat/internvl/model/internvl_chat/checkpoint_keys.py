"""Names of a checkpoint's tensors: older ones, and whether they are the model's; for `from_pretrained`."""

import re
from pathlib import Path

from safetensors import safe_open
from transformers.utils import cached_file

from internvl.model.lora import LLM_TARGETS, LORA_RANK_FIELDS, PROJECTOR_TARGETS, VISION_TARGETS


def folder_of(path: str | Path) -> Path:
    """The folder of a checkpoint, also of one from the hub that is there already."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(cached_file(str(path), "config.json", local_files_only=True)).parent
    except OSError as error:
        raise ValueError(f"there is no checkpoint {str(path)!r}") from error


def older_adapter_names(path: str | Path, config) -> dict[str, str]:
    """Pattern -> replacement for a checkpoint with adapters from before PEFT 0.6; none for others.

    The weight of an adapted layer was called `qkv.weight` then, and is `qkv.base_layer.weight` today.
    """
    llm = LLM_TARGETS.get(config.llm_config.architectures[0], LLM_TARGETS["LlamaForCausalLM"])
    targets = {"vision_model": VISION_TARGETS, "mlp1": PROJECTOR_TARGETS, "language_model": llm}
    patterns = {}
    for part in (part for part, rank in LORA_RANK_FIELDS.items() if getattr(config, rank)):
        ends = "|".join(map(re.escape, targets[part].modules))
        patterns[rf"^({part}\.base_model\.model\.(?:.*\.)?(?:{ends}))\.(?=(?:weight|bias)$)"] = r"\1.base_layer."
    names = stored_names(folder_of(path)) if patterns else ()
    return {pattern: new for pattern, new in patterns.items() if any(re.match(pattern, name) for name in names)}


def stored_names(folder: Path) -> list[str]:
    """Names of the tensors in a folder's safetensors files."""
    names = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names += opened.keys()
    return names


def refuse_wrong_keys(name: str, info: dict) -> None:
    """Raises a ValueError that lists every missing, unexpected or mismatched key of checkpoint `name`.

    `info` is the loading report of transformers' `from_pretrained`; ours may have `not_finite_keys`, too.
    """
    kinds = ("missing", "unexpected", "mismatched", "not_finite")
    problems = {kind: sorted(info.get(f"{kind}_keys") or ()) for kind in kinds}
    problems["mismatched"] = [f"{key} {tuple(a)} for {tuple(b)}" for key, a, b in problems["mismatched"]]
    if any(problems.values()):
        listed = "\n".join(f"{kind.replace('_', ' ')}: {', '.join(keys)}" for kind, keys in problems.items() if keys)
        raise ValueError(f"{name} is no checkpoint of this model. Its keys:\n{listed}")
