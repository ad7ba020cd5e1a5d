"""What was trainable, the data, and the settings of a run."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from internvl.arguments.deepspeed_config import get_zero_stage
from internvl.arguments.per_part import PART_NAMES
from internvl.arguments.preference import PREFERENCE_ARGUMENTS
from internvl.arguments.training import FINETUNE_ARGUMENTS
from internvl.model.lora import PART_FLAGS
from internvl.tools.inspect_checkpoint import measure_tensors, read_adapter_settings
from internvl.tools.report_page.run_files import Run, is_step
from internvl.tools.report_page.text import clean, render_table

NOT_SET = (None, False, "", [], {}, "no", "none")  # flags of these values are not set
# Shown elsewhere, or set by the launcher.
HIDDEN_FLAGS = {"output_dir", "local_rank", "disable_tqdm", "deepspeed_plugin"}
TRAINABLE_COLUMNS = {
    "part": "part",
    "parameters": "parameters",
    "trainable": "trainable",
    "lora_rank": "LoRA rank",
    "learning_rate": "learning rate",
}


# -- trainable parameters ----------------------------------------------------------------------------------------------


def list_trainable(run: Run) -> list[dict[str, Any]]:
    """List the parts of the model with their trainable parameters.

    Runs of earlier versions did not write them: then the tensors of adapters and trained weights are counted.
    """
    rows = run.settings.get("trainable")
    if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        return rows
    if run.model_dir is None:
        return []
    try:
        sizes, adapters = measure_tensors(run.model_dir), read_adapter_settings(run.model_dir)
    except (OSError, ValueError) as error:
        run.add_problem(run.model_dir, error)
        return []
    rows = []
    for part, flag in PART_FLAGS.items():
        counts = [size.num_parameters for (kind, name), size in sizes.items() if name == part and kind != "weights"]
        if counts:
            adapter = adapters.get(part)
            rank = "-" if adapter is None else f"{adapter['r']} {adapter['variant']}".removesuffix(" lora")
            rows.append({"part": PART_NAMES[flag], "trainable": sum(counts), "lora_rank": rank})
    return rows


def count_trainable(run: Run) -> tuple[int, int]:
    """Return the numbers of trainable and of all parameters; 0 if unknown."""
    rows = list_trainable(run)
    counts = [[row.get(key) for row in rows] for key in ("trainable", "parameters")]
    trainable, total = (sum(filter(is_step, values)) for values in counts)
    return trainable, total


def render_trainable(run: Run) -> str:
    """Render which parameters were trainable; empty if it is unknown."""
    rows = list_trainable(run)
    columns = {key: title for key, title in TRAINABLE_COLUMNS.items() if any(key in row for row in rows)}
    if not rows:
        return ""
    cells = [[format_cell(row.get(key, "")) for key in columns] for row in rows]
    return f"<h2>Trainable parameters</h2>{render_table([*columns.values()], cells)}"


def format_cell(value: Any) -> str:
    return f"{value:,}" if type(value) is int else clean(value, 80)


# -- data --------------------------------------------------------------------------------------------------------------


def render_datasets(run: Run) -> str:
    """Render the datasets with their sizes, and the evaluation sets."""
    datasets, counts = run.settings["datasets"], run.settings.get("samples")
    counts = counts if isinstance(counts, dict) else {}
    keys = ["samples", "usable", "tokens", "loss_tokens"] if counts else []
    rows = []
    for name, entry in datasets.items():
        own, entry = (value if isinstance(value, dict) else {} for value in (counts.get(name), entry))
        annotation = clean(entry.get("annotation", ""), 200)
        rows.append([clean(name, 80), annotation, *(format_cell(own.get(key, "")) for key in keys)])
    tables = []
    if rows:
        titles = ["dataset", "annotation", *(key.replace("_", " ") for key in keys)]
        tables.append(render_table(titles, rows, num_texts=2))
    if run.sets:
        keys = ("metric", "samples", "answered", "loss_tokens")
        rows = [[clean(name, 80), *(format_cell(s.get(key) or "-") for key in keys)] for name, s in run.sets.items()]
        tables.append(render_table(["evaluation set", *(key.replace("_", " ") for key in keys)], rows, num_texts=2))
    return "<h2>Data</h2>" + "".join(tables) if tables else ""


# -- flags -------------------------------------------------------------------------------------------------------------


def get_default_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of the program that a run's flags are of, as JSON values."""
    defaults = {}
    for arguments in PREFERENCE_ARGUMENTS if "beta" in flags else FINETUNE_ARGUMENTS:
        for flag in fields(arguments):
            defaults[flag.name] = flag.default if flag.default_factory is MISSING else flag.default_factory()
    return json.loads(json.dumps(defaults, default=str))


def find_set_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Find the flags that differ from their defaults."""
    defaults = get_default_flags(flags)
    found = {}
    for name, value in flags.items():
        default = defaults.get(name)
        is_default = value == default or (is_not_set(value) and is_not_set(default))
        if not is_default and name not in HIDDEN_FLAGS:
            found[name] = value
    return found


def is_not_set(value: Any) -> bool:
    """Check whether a flag is not set; 0 is a value."""
    return value is False or (type(value) not in (int, float) and value in NOT_SET)


def format_flag(name: str, value: Any) -> str:
    """Format the value of a flag; a DeepSpeed configuration as its ZeRO stage."""
    if name == "deepspeed" and isinstance(value, dict) and isinstance(value.get("zero_optimization"), dict):
        return f"ZeRO-{clean(get_zero_stage(value), 20)}"
    return clean(value, 300)


def render_flags(flags: Mapping[str, Any]) -> str:
    rows = "".join(f"<dt>{clean(name, 80)}</dt><dd>{format_flag(name, value)}</dd>" for name, value in flags.items())
    return f'<dl class="flags">{rows}</dl>'


def render_changes(run: Run) -> str:
    """Render what changed when the run resumed; empty if nothing did."""
    items = ""
    for change in run.settings["changes"]:
        if not isinstance(change, dict):
            continue
        texts = []
        for group, template in (("flags", "--{}"), ("datasets", "dataset {}")):
            values = change.get(group)
            for name, pair in values.items() if isinstance(values, dict) else ():
                before, now = pair if isinstance(pair, list) and len(pair) == 2 else ("?", pair)
                label = clean(template.format(name), 120)
                texts.append(f"<code>{label}</code> {format_flag(name, before)} → {format_flag(name, now)}")
        items += f"<li>{clean(change.get('from', ''), 80)}: {'; '.join(texts)}</li>"
    return f"<h3>Changed when resuming</h3><ul>{items}</ul>" if items else ""


def render_settings(run: Run) -> str:
    """Render trainable parameters, data, flags and versions."""
    flags, versions = run.settings["flags"], run.settings["versions"]
    html = render_trainable(run) + render_datasets(run)
    if flags:
        html += f"<h2>Settings</h2><h3>Flags that differ from their defaults</h3>{render_flags(find_set_flags(flags))}"
        html += render_changes(run)
        html += f"<details><summary>All {len(flags)} flags</summary>{render_flags(flags)}</details>"
    if versions:
        ranks = run.settings.get("world_size")
        texts = [f"{clean(name, 40)} {clean(version, 40)}" for name, version in versions.items()]
        texts += [f"{ranks} ranks" if ranks != 1 else "1 rank"] if type(ranks) is int else []
        html += f'<p class="soft">{", ".join(texts)}</p>'
    return html
