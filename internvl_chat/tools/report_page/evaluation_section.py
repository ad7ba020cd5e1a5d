"""Charts and table of the evaluations."""

from typing import NamedTuple

import numpy as np

from internvl.arguments.evaluation_strategy import is_greater_better
from internvl.data.schema import BASE_ANSWERS_SPLIT
from internvl.tools.report_page.charts import Chart, Line
from internvl.tools.report_page.run_files import Run
from internvl.tools.report_page.text import clean, format_number, render_table

ALL_SETS = "all sets"
# Titles of quantities; a metric has its own name.
TITLES = {
    "loss": ("Evaluation loss", "per loss token"),
    "token_accuracy": ("Token accuracy", "share of loss tokens"),
    "forgetting": ("Forgetting", "loss on the base model's answers"),
}
WITHOUT_CHART = {"perplexity"}  # the exponential of the loss
PREFERENCE_GROUPS = ("rewards", "logps")  # of quantities such as `rewards/accuracies`
BOUNDS = ("_low", "_high")


class Curve(NamedTuple):
    """A quantity of an evaluation set by step; `low` and `high` are its 95 % interval, NaN where it has none."""

    set_name: str
    quantity: str
    steps: np.ndarray
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    greater_is_better: bool

    @property
    def best(self) -> int | None:
        """Index of the best value; None if no value is finite."""
        values = self.values if self.greater_is_better else -self.values
        return int(np.nanargmax(np.where(np.isfinite(values), values, np.nan))) if np.isfinite(values).any() else None


def split_key(key: str, sets: dict[str, dict]) -> tuple[str, str]:
    """Split `docvqa/anls` into set and quantity; keys without a set are of all sets."""
    known = max((name for name in sets if key.startswith(f"{name}/")), key=len, default=None)
    if known is not None:
        return known, key[len(known) + 1 :]
    *names, quantity = key.split("/")
    if names and names[-1] in PREFERENCE_GROUPS:
        quantity = f"{names.pop()}/{quantity}"
    return "/".join(names) or ALL_SETS, quantity


def is_greater_better_in_set(run: Run, set_name: str, quantity: str) -> bool:
    """Check whether a greater value is better; `metrics.json` knows it of its set's metric and further numbers."""
    entry = run.sets.get(set_name, {})
    metric, is_greater = entry.get("metric"), entry.get("greater_is_better")
    if metric and isinstance(is_greater, bool) and (quantity == metric or quantity.startswith(f"{metric}_")):
        return is_greater
    return is_greater_better(quantity)


def list_curves(run: Run) -> list[Curve]:
    """List the quantities of the evaluations, by set."""
    keys = list(dict.fromkeys(key for entry in run.evaluations.values() for key in entry))
    bounds = {f"{key}{bound}" for key in keys for bound in BOUNDS}
    curves = []
    for key in keys:
        if key in bounds or key == "epoch" or key.endswith("seconds"):
            continue
        points = [(step, entry) for step, entry in run.evaluations.items() if key in entry]
        values, low, high = (
            np.array([entry.get(f"{key}{end}", np.nan) for _, entry in points], np.float64) for end in ("", *BOUNDS)
        )
        set_name, quantity = split_key(key, run.sets)
        steps = np.array([step for step, _ in points], np.int64)
        is_greater = is_greater_better_in_set(run, set_name, quantity)
        curves.append(Curve(set_name, quantity, steps, values, low, high, is_greater))
    names = list(dict.fromkeys(curve.set_name for curve in curves))
    curves.sort(key=lambda curve: (curve.set_name == ALL_SETS, names.index(curve.set_name)))
    return drop_repeated_curves(run, curves)


def drop_repeated_curves(run: Run, curves: list[Curve]) -> list[Curve]:
    """Leave out the mean of a single set, and the loss of a single set of base answers: it is `forgetting`."""
    losses = {curve.set_name for curve in curves if curve.quantity == "loss"} - {ALL_SETS}
    base_sets = {name for name in losses if run.sets.get(name, {}).get("split") == BASE_ANSWERS_SPLIT}
    single = {names.pop() for names in (losses - base_sets, set(base_sets)) if len(names) == 1}
    of_single = {curve.quantity for curve in curves if curve.set_name in single - base_sets}
    return [
        curve
        for curve in curves
        if curve.set_name not in single & base_sets and not (curve.set_name == ALL_SETS and curve.quantity in of_single)
    ]


def draw_charts(run: Run, curves: list[Curve]) -> str:
    """Draw a chart per quantity, with a line per evaluation set."""
    names = list(dict.fromkeys(curve.set_name for curve in curves))
    charts = []
    for quantity in dict.fromkeys(curve.quantity for curve in curves if curve.quantity not in WITHOUT_CHART):
        own = [curve for curve in curves if curve.quantity == quantity]
        lines = []
        for curve in own:
            has_band = np.isfinite(curve.low).any()
            lines.append(
                Line(
                    quantity if quantity == "forgetting" else curve.set_name,
                    curve.steps,
                    curve.values,
                    names.index(curve.set_name),
                    low=curve.low if has_band else None,
                    high=curve.high if has_band else None,
                    best=curve.best if len(curve.steps) > 1 else None,
                )
            )
        title, unit = TITLES.get(quantity, (quantity.replace("_", " "), ""))
        if any(line.low is not None for line in lines):
            unit = "with 95 % intervals"
        charts.append(Chart(title, unit, lines, run.step).render())
    return "".join(charts)


def render_value_table(curves: list[Curve]) -> str:
    """Render first, best and last value of each quantity."""
    rows = []
    for curve in curves:
        if curve.best is None:
            continue
        interval = ""
        if np.isfinite(curve.low[-1]):
            interval = f"{format_number(curve.low[-1])} – {format_number(curve.high[-1])}"
        best = f"{format_number(curve.values[curve.best])} <span class=soft>at {curve.steps[curve.best]:,}</span>"
        quantity = clean(curve.quantity.replace("_", " ")) + (" ↑" if curve.greater_is_better else " ↓")
        values = [format_number(curve.values[0]), best, format_number(curve.values[-1]), interval]
        rows.append([clean(curve.set_name), quantity, *values])
    titles = ["evaluation set", "quantity", "first", "best, at step", "last", "95 % interval"]
    return render_table(titles, rows, num_texts=2)


def render_evaluations(run: Run) -> str:
    """Render the section; empty without evaluations."""
    curves = list_curves(run)
    if not curves:
        return ""
    steps = sorted(run.evaluations)
    listed = (
        f"{len(steps)} evaluations, steps {steps[0]:,} to {steps[-1]:,}" if len(steps) > 1 else f"Step {steps[0]:,}"
    )
    return (
        f'<h2>Evaluation</h2><p class="soft">{listed}. ↑: greater is better. A ring marks the best step.</p>'
        f'<div class="charts">{draw_charts(run, curves)}</div>{render_value_table(curves)}'
    )
