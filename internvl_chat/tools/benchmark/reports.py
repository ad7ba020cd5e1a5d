"""Results, tables and charts of `tools/benchmark_step.py`."""

import platform
import time
from importlib.metadata import version
from itertools import groupby
from statistics import mean
from typing import Any

import torch

from .turns import Measurement, MedianInterval, compare_turns, compute_median_interval, format_interval


def _format_optional(name: str, form: str, unit: str = ""):
    """Return a formatter of a number that may be missing."""
    return lambda result: "" if result.get(name) is None else f"{result[name]:{form}}{unit}"


def _format_median(name: str, form: str, unit: str = ""):
    """Return a formatter of a median with its interval, which may be missing."""
    return lambda result: format_interval(MedianInterval(*result[name]), form, unit) if result.get(name) else ""


# Heading -> (width, text of a result).
STEP_COLUMNS = {
    "contender": (36, lambda r: r["contender"]),
    "tokens/s": (21, lambda r: r.get("error") or format_interval(MedianInterval(*r["tokens_per_second"]), ",.0f")),
    "MFU": (6, _format_optional("mfu", ".1%")),  # on GPUs with a known peak
    "speed": (19, _format_median("speed", ".2f", "x")),
    "peak GiB": (8, lambda r: f"{r['peak_bytes'] / 2**30:.3f}" if "peak_bytes" in r else ""),
    "memory": (6, _format_optional("memory", ".2f", "x")),
    "padding": (7, _format_optional("padding", ".0%")),
    "loss": (8, lambda r: f"{mean(r['losses']):.5f}" if "losses" in r else ""),
}
SCALING_COLUMNS = {
    "ZeRO": (5, lambda r: r["stage"]),
    "s/step": (20, lambda r: format_interval(compute_median_interval(r["seconds"]))),
    "no DeepSpeed": (20, lambda r: format_interval(compute_median_interval(r["seconds_without_deepspeed"]))),
    "times as long": (20, lambda r: format_interval(compare_turns(r["seconds"], r["seconds_without_deepspeed"]))),
    "in collectives": (16, lambda r: f"{r['collective_seconds'] * r['steps'] / sum(r['seconds']):.0%}"),
    "MB logged": (11, lambda r: f"{sum(r['logged_bytes'].values()) / 1e6:.2f}"),
    "MB expected": (13, lambda r: f"{sum(r['expected_bytes'].values()) / 1e6:.2f}"),
    "MB by collective": (18, lambda r: ", ".join(f"{k} {n / 1e6:.2f}" for k, n in r["logged_bytes"].items())),
}


def compare(measurement: Measurement, reference: Measurement | None, mixture: str) -> dict[str, Any]:
    """Summarize what a contender measured on a mixture.

    Returns:
        The facts and turns, `tokens_per_second` (median, low, high), `mfu`, and relative to the reference on the same
        samples `speed` (median, low, high) and `memory`. Of a contender without turns: `error`.
    """
    if not measurement.turns:
        return measurement.facts
    facts, turns = measurement.facts[mixture], select_turns(measurement, mixture)
    seconds = [turn["seconds"] for turn in turns]
    result = facts | {"seconds": seconds, "cpu_seconds": [turn["cpu_seconds"] for turn in turns]}
    result["tokens_per_second"] = compute_median_interval(
        [n / s for n, s in zip(facts["tokens"], seconds, strict=True)]
    )
    flops = compute_median_interval([n / s for n, s in zip(facts["flops"], seconds, strict=True)])
    result["mfu"] = flops.median / facts["peak_flops"] if facts["peak_flops"] else None
    result["losses"] = [turn["loss"] for turn in turns]
    if reference and reference.turns:
        reference_seconds = [turn["seconds"] for turn in select_turns(reference, mixture)]
        result["speed"] = compare_turns(reference_seconds, seconds)
        result["memory"] = facts["peak_bytes"] / max(1, reference.facts[mixture]["peak_bytes"])
    return result


def select_turns(measurement: Measurement, mixture: str) -> list[dict]:
    """Select the turns of a mixture."""
    return [turn for turn in measurement.turns if turn["mixture"] == mixture]


def describe_machine() -> dict[str, Any]:
    """Describe device, versions and date of a measurement."""
    has_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if has_gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__} | {name: version(name) for name in ("transformers", "peft")},
        "date": time.strftime("%Y-%m-%d"),
    }


def get_setting(result: dict) -> tuple:
    """Return what contenders of one table have in common."""
    return result["mixture"], result["lora"], result["checkpointing"]


def describe_setting(setting: tuple) -> str:
    """Describe a setting in a heading."""
    mixture, lora, checkpointing = setting
    return f"{mixture}, LoRA in {lora}, gradient checkpointing {'on' if checkpointing else 'off'}"


def print_results(results: list[dict]) -> None:
    """Print a table per setting."""
    for setting, rows in groupby(results, get_setting):
        rows = list(rows)
        print(f"\n{describe_setting(setting)}")
        print_table(rows)
        losses_by_turn = list(zip(*(row["losses"] for row in rows if "losses" in row), strict=True))
        if losses_by_turn:
            difference = max(max(losses) - min(losses) for losses in losses_by_turn)
            print(f"losses of the same turn differ by at most {difference:.1e}")
    print(
        "\nspeed, memory: relative to the reference; [low, high]: 95 % interval of the median, below 6 turns the range"
    )


def print_table(results: list[dict], columns: dict = STEP_COLUMNS) -> None:
    """Print a Markdown table with one line per result."""
    widths = [width for width, _ in columns.values()]
    lines = [list(columns), ["-" * width for width in widths]]
    lines += [[str(format_fn(result)) for _, format_fn in columns.values()] for result in results]
    for line in lines:
        print("|", " | ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)), "|", flush=True)


def plot_results(results: list[dict], path: str) -> None:
    """Plot throughput with its interval and peak memory as bars, a row per setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [(s, list(rows)) for s, rows in groupby((r for r in results if "error" not in r), get_setting)]
    figure, axes = pyplot.subplots(
        max(1, len(groups)), 2, figsize=(12, 2.2 * max(1, len(groups))), layout="constrained", squeeze=False
    )
    for (rate_axis, memory_axis), (setting, rows) in zip(axes, groups, strict=False):
        names = [row["contender"] for row in rows]
        colors = ["C1" if "ours" in name else "C0" for name in names]
        medians, lows, highs = zip(*(row["tokens_per_second"] for row in rows), strict=True)
        errors = [
            [median - low for median, low in zip(medians, lows, strict=True)],
            [high - median for median, high in zip(medians, highs, strict=True)],
        ]
        bars = rate_axis.barh(names, medians, xerr=errors, color=colors)
        rate_axis.bar_label(bars, fmt="{:,.0f}", padding=3)
        rate_axis.set_title(f"tokens/s: {describe_setting(setting)}", fontsize=8)
        bars = memory_axis.barh(names, [row["peak_bytes"] / 2**30 for row in rows], color=colors)
        memory_axis.bar_label(bars, fmt="{:,.2f}", padding=3)
        memory_axis.set_title("peak memory beyond the weights (GiB)", fontsize=8)
        memory_axis.set_yticklabels([])
        for axis in (rate_axis, memory_axis):
            axis.margins(x=0.15)
            axis.invert_yaxis()
    figure.savefig(path, dpi=120)
