"""Tables and charts of `tools/benchmark_step.py`."""

from .contenders import BASELINE

# Heading -> (width, text of a result).
STEP_COLUMNS = {
    "checkpointing": (14, lambda r: "on" if r["checkpointing"] else "off"),
    "contender": (32, lambda r: r["contender"]),
    "seconds": (9, lambda r: f"{r['seconds']:.2f}"),
    "spread": (8, lambda r: f"{r['spread']:.0%}"),
    "tokens/s": (10, lambda r: f"{r['tokens'] / r['seconds']:,.0f}"),
    "MFU": (6, lambda r: f"{r['mfu']:.0%}" if r["mfu"] else ""),  # on GPUs with a known peak
    "speed": (8, lambda r: f"{r['speed']:.2f}x"),
    "peak MB": (9, lambda r: f"{r['peak_bytes'] / 1e6:,.0f}"),
    "memory": (8, lambda r: f"{r['memory']:.2f}x"),
    "padding": (9, lambda r: f"{r['padding']:.0%}"),
    "initial loss": (13, lambda r: f"{r['initial_loss']:.5f}"),
    "loss": (9, lambda r: f"{r['loss']:.4f}"),
}
SCALING_COLUMNS = {
    "ZeRO": (5, lambda r: r["stage"]),
    "s/step": (9, lambda r: f"{r['seconds']:.2f}"),
    "no DeepSpeed": (14, lambda r: f"{r['seconds_without_deepspeed']:.2f}"),
    "in collectives": (16, lambda r: f"{r['collective_seconds'] / r['seconds']:.0%}"),
    "MB logged": (11, lambda r: f"{sum(r['logged_bytes'].values()) / 1e6:.2f}"),
    "MB expected": (13, lambda r: f"{sum(r['expected_bytes'].values()) / 1e6:.2f}"),
    "MB by collective": (18, lambda r: "  " + ", ".join(f"{k} {n / 1e6:.2f}" for k, n in r["logged_bytes"].items())),
}


def print_table(results: list[dict], columns: dict = STEP_COLUMNS) -> None:
    """Print one line per result."""
    print("".join(f"{heading:>{width}}" for heading, (width, _) in columns.items()))
    for result in results:
        print("".join(f"{format_fn(result):>{width}}" for width, format_fn in columns.values()), flush=True)


def plot_results(results: list[dict], path: str) -> None:
    """Plot throughput and peak memory as bars, one row per checkpointing mode."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    modes = list(dict.fromkeys(result["checkpointing"] for result in results))
    panels = {
        "tokens/s": lambda r: r["tokens"] / r["seconds"],
        "peak memory beyond the weights (MB)": lambda r: r["peak_bytes"] / 1e6,
    }
    figure, axes = pyplot.subplots(len(modes), 2, figsize=(12, 2.2 * len(modes)), layout="constrained", squeeze=False)
    for row, mode in zip(axes, modes, strict=True):
        shown = [result for result in results if result["checkpointing"] == mode]
        names = [result["contender"] for result in shown]
        for axis, (title, value_fn) in zip(row, panels.items(), strict=True):
            colors = ["C1" if "ours" in name else "C0" for name in names]
            bars = axis.barh(names, [value_fn(result) for result in shown], color=colors)
            axis.bar_label(bars, fmt="{:,.0f}", padding=3)
            axis.set_title(f"{title}, gradient checkpointing {'on' if mode else 'off'}", fontsize=10)
            axis.margins(x=0.15)
            axis.invert_yaxis()
        row[1].set_yticklabels([])
    figure.savefig(path, dpi=120)


def add_baseline_ratios(results: list[dict]) -> None:
    """Add `speed` and `memory` relative to the baseline.

    The baseline is the one with the same checkpointing mode, or that mode's first result where it was not measured.
    """
    for result in results:
        same_mode = [other for other in results if other["checkpointing"] == result["checkpointing"]]
        baseline = next((other for other in same_mode if other["contender"] == BASELINE), same_mode[0])
        result["speed"] = baseline["seconds"] / result["seconds"]
        result["memory"] = result["peak_bytes"] / max(1, baseline["peak_bytes"])
