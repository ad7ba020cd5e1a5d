"""Tables and pictures of what `tools/benchmark_step.py` finds."""

from .contenders import BASELINE

COLUMNS = {  # heading -> width, what stands there
    "checkpointing": (14, lambda r: "on" if r["checkpointing"] else "off"),
    "contender": (32, lambda r: r["contender"]),
    "seconds": (9, lambda r: f"{r['seconds']:.2f}"),
    "spread": (8, lambda r: f"{r['spread']:.0%}"),
    "tokens/s": (10, lambda r: f"{r['tokens'] / r['seconds']:,.0f}"),
    "MFU": (6, lambda r: f"{r['mfu']:.0%}" if r["mfu"] else ""),  # of devices whose data sheet tells their peak
    "speed": (8, lambda r: f"{r['speed']:.2f}x"),
    "peak MB": (9, lambda r: f"{r['peak_bytes'] / 1e6:,.0f}"),
    "memory": (8, lambda r: f"{r['memory']:.2f}x"),
    "padding": (9, lambda r: f"{r['padding']:.0%}"),
    "loss before": (13, lambda r: f"{r['first_loss']:.5f}"),
    "loss": (9, lambda r: f"{r['loss']:.4f}"),
}
SCALING = {
    "ZeRO": (5, lambda r: r["stage"]),
    "s/step": (9, lambda r: f"{r['seconds']:.2f}"),
    "without it": (12, lambda r: f"{r['alone']:.2f}"),
    "in collectives": (16, lambda r: f"{r['collectives'] / r['seconds']:.0%}"),
    "MB logged": (11, lambda r: f"{sum(r['logged'].values()) / 1e6:.2f}"),
    "MB counted": (12, lambda r: f"{sum(r['counted'].values()) / 1e6:.2f}"),
    "of which": (10, lambda r: "  " + ", ".join(f"{name} {n / 1e6:.2f}" for name, n in r["logged"].items())),
}


def show(results: list[dict], columns: dict = COLUMNS) -> None:
    print("".join(f"{heading:>{width}}" for heading, (width, _) in columns.items()))
    for result in results:
        print("".join(f"{text(result):>{width}}" for width, text in columns.values()), flush=True)


def draw(results: list[dict], path: str) -> None:
    """Bars of speed and memory, above for checkpointing on, below for off."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    modes = list(dict.fromkeys(result["checkpointing"] for result in results))
    panels = {
        "tokens a second": lambda r: r["tokens"] / r["seconds"],
        "peak memory beyond the weights (MB)": lambda r: r["peak_bytes"] / 1e6,
    }
    figure, axes = pyplot.subplots(len(modes), 2, figsize=(12, 2.2 * len(modes)), layout="constrained", squeeze=False)
    for row, mode in zip(axes, modes, strict=True):
        mine = [result for result in results if result["checkpointing"] == mode]
        names = [result["contender"] for result in mine]
        for axis, (title, value) in zip(row, panels.items(), strict=True):
            bars = axis.barh(names, [value(r) for r in mine], color=["C1" if "ours" in n else "C0" for n in names])
            axis.bar_label(bars, fmt="{:,.0f}", padding=3)
            axis.set_title(f"{title}, checkpointing {'on' if mode else 'off'}", fontsize=10)
            axis.margins(x=0.15)
            axis.invert_yaxis()
        row[1].set_yticklabels([])
    figure.savefig(path, dpi=120)


def beside_the_baseline(results: list[dict]) -> None:
    """Adds `speed` and `memory`, times the baseline's with as much recomputed, or the first one's if that is absent."""
    for result in results:
        alike = [other for other in results if other["checkpointing"] == result["checkpointing"]]
        base = next((other for other in alike if other["contender"] == BASELINE), alike[0])
        result["speed"] = base["seconds"] / result["seconds"]
        result["memory"] = result["peak_bytes"] / max(1, base["peak_bytes"])
