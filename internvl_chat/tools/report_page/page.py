"""The page of a run: one HTML file without external files and without scripts."""

import math
import time
from pathlib import Path

import numpy as np

from internvl.arguments.evaluation_strategy import LOG_PREFIX, normalize_metric
from internvl.tools.report_page.evaluation_section import ALL_SETS, list_curves, render_evaluations
from internvl.tools.report_page.run_files import Run
from internvl.tools.report_page.samples_section import render_samples
from internvl.tools.report_page.settings_section import count_trainable, render_settings
from internvl.tools.report_page.style import STYLE
from internvl.tools.report_page.text import clean, format_count, format_duration, format_number
from internvl.tools.report_page.training_section import get_curve, render_training, summarize_losses

GENERATOR = '<meta name="generator" content="internvl tools/report.py">'


def render_page(run: Run, base: Path | None = None) -> str:
    """Render the page.

    Args:
        base: folder with the predictions before training; default: those of the first evaluation.
    """
    name = run.folder.resolve().name or str(run.folder)
    sections = [render_evaluations(run), render_training(run), render_samples(run, base), render_settings(run)]
    summary = render_summary(run)
    # The list comes last into being: each section may add to it.
    problems = "".join(f"<li>{clean(problem, 500)}</li>" for problem in run.problems)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
{GENERATOR}<title>{clean(name, 120)}</title><style>{STYLE}</style></head><body>
<header><h1>{clean(name, 120)}</h1>
<p class="state"><span class="{run.state}">{run.state}</span> {describe_progress(run)}
<span class="soft">{clean(str(run.folder.resolve()), 300)}</span></p></header>
{f'<ul class="warn">{problems}</ul>' if problems else ""}
{summary}
{"".join(sections)}
<footer class="soft">Written {time.strftime("%Y-%m-%d %H:%M:%S")} by internvl report.</footer>
</body></html>
"""


def describe_progress(run: Run) -> str:
    """Describe how far the run is, in steps and epochs."""
    if not run.step and not run.max_steps:
        return ""
    text = f"step {run.step:,} of {run.max_steps:,}" if run.max_steps else f"step {run.step:,}"
    if run.state == "finished" and 0 < run.step < run.max_steps:
        text += ", stopped early"
    _, epochs = get_curve(run, "epoch")
    if len(epochs) and math.isfinite(epochs[-1]):
        text += f", epoch {format_number(epochs[-1])}"
    return text


# -- summary -----------------------------------------------------------------------------------------------------------


def render_summary(run: Run) -> str:
    """Render the most important numbers as tiles."""
    tiles = [
        describe_best(run),
        ("Training loss", summarize_losses(run), "smoothed, first → last"),
        describe_time(run),
        describe_median(run, "tokens_per_second", "Throughput", "{} tokens/s", "median, all ranks"),
        describe_median(run, "mfu_percent", "MFU", "{} %", "median"),
        describe_memory(run),
        describe_parameters(run),
        ("Checkpoints", ", ".join(f"{step:,}" for step in run.checkpoints[-4:]), "newest last"),
    ]
    items = "".join(
        f'<div class="tile"><span class="soft">{title}</span><b>{value}</b><span class="soft">{note}</span></div>'
        for title, value, note in tiles
        if value
    )
    return f'<div class="tiles">{items}</div>' if items else ""


def describe_best(run: Run) -> tuple[str, str, str]:
    """Describe the best evaluation: by --metric_for_best_model, else by the loss."""
    wanted = str(run.settings["flags"].get("metric_for_best_model") or "loss")
    wanted = normalize_metric(wanted).removeprefix(LOG_PREFIX)
    # A name without a set is that over all sets; of a single set it is not repeated.
    curves = sorted(list_curves(run), key=lambda curve: curve.set_name != ALL_SETS)
    curve = next((c for c in curves if wanted in (f"{c.set_name}/{c.quantity}", c.quantity)), None)
    curve = curve or next((c for c in curves if c.quantity == "loss"), None)
    if curve is None or curve.best is None:
        return "", "", ""
    step = int(curve.steps[curve.best])
    name = curve.quantity.replace("_", " ") + ("" if curve.set_name == ALL_SETS else f", {curve.set_name}")
    note = f"checkpoint-{step}" if step in run.checkpoints else f"step {step:,}"
    return f"Best {clean(name, 60)}", format_number(curve.values[curve.best]), note


def describe_time(run: Run) -> tuple[str, str, str]:
    """Describe the time of all logged steps, and the time that is left."""
    steps, seconds = get_curve(run, "step_seconds")
    is_known = np.isfinite(seconds)
    total = float((seconds * np.diff(steps, prepend=0))[is_known].sum())
    if not total:
        return "", "", ""
    note = "of all steps"
    if run.state != "finished" and run.max_steps > run.step:
        left = float(np.median(seconds[is_known][-50:])) * (run.max_steps - run.step)
        note += f", {format_duration(left)} left"
    return "Time", format_duration(total), note


def describe_median(run: Run, key: str, title: str, template: str, note: str) -> tuple[str, str, str]:
    _, values = get_curve(run, key)
    values = values[np.isfinite(values)]
    return title, template.format(format_number(float(np.median(values)))) if len(values) else "", note


def describe_memory(run: Run) -> tuple[str, str, str]:
    _, values = get_curve(run, "peak_memory_gib")
    values = values[np.isfinite(values)]
    return "Peak memory", f"{format_number(float(values.max()))} GiB" if len(values) else "", "largest of all ranks"


def describe_parameters(run: Run) -> tuple[str, str, str]:
    trainable, total = count_trainable(run)
    share = f"{trainable / total:.2%} of {format_count(total)}" if total else "parameters"
    return "Trainable", format_count(trainable) if trainable else "", share
