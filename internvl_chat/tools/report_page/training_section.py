"""Charts of the training: loss, learning rate, gradients, speed, memory."""

import math
from typing import NamedTuple

import numpy as np

from internvl.metrics.step_timer import STEP_PHASES
from internvl.tools.report_page.charts import Chart, Line, smooth
from internvl.tools.report_page.run_files import Run
from internvl.tools.report_page.text import clean

NUM_AREA_BINS = 160


class ChartSpec(NamedTuple):
    """A chart of the training log.

    Attributes:
        keys: of the log -> label; keys that no entry has are left out.
        is_smoothed: draw the values faintly behind their moving average.
    """

    title: str
    unit: str
    keys: dict[str, str]
    is_smoothed: bool = False


LOSS_CHART = ChartSpec("Training loss", "per loss token", {"loss": "loss"}, is_smoothed=True)
PREFERENCE_CHARTS = (
    ChartSpec("Reward accuracy", "share of pairs", {"rewards/accuracies": "reward accuracy"}, is_smoothed=True),
    ChartSpec("Reward margin", "", {"rewards/margins": "margin"}, is_smoothed=True),
    ChartSpec("Rewards", "", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    ChartSpec("Log probabilities", "of answers", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
)
STEP_CHARTS = (
    ChartSpec("Learning rate", "", {"learning_rate": "learning rate"}),
    ChartSpec("Gradient norm", "before clipping", {"grad_norm": "gradient norm"}, is_smoothed=True),
    ChartSpec("Throughput", "tokens/s, all ranks", {"tokens_per_second": "tokens/s"}, is_smoothed=True),
    ChartSpec("MFU", "% of the device's peak", {"mfu_percent": "MFU"}, is_smoothed=True),
    ChartSpec("Peak memory", "GiB, largest of all ranks", {"peak_memory_gib": "memory"}),
    ChartSpec("Data wait", "% of the step time", {"data_wait_percent": "data wait"}, is_smoothed=True),
    ChartSpec("Padding", "% of positions", {"padding_percent": "padding"}, is_smoothed=True),
)
# Keys of the log that have a chart of their own, are shown as numbers, or say the same as another one.
KNOWN_KEYS = {key for spec in (LOSS_CHART, *PREFERENCE_CHARTS, *STEP_CHARTS) for key in spec.keys}
KNOWN_KEYS |= {"epoch", "skipped_steps", "step_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds"}
KNOWN_KEYS |= {"loss_tokens_per_second", "tiles_per_second", "tflops", "total_flos", "num_input_tokens_seen"}


def get_curve(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of a key of the log, of the steps that have it."""
    points = [(step, entry[key]) for step, entry in run.training.items() if key in entry]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, np.int64), np.array(values, np.float64)


def list_marks(run: Run) -> dict[int, str]:
    """Return step -> text of the resumes that changed a setting."""
    marks = {}
    for change in run.settings["changes"]:
        name = str(change.get("from", "")) if isinstance(change, dict) else ""
        number = name.removeprefix("checkpoint-")
        if number.isdecimal() and len(number) < 16 and int(number) <= run.step:
            marks[int(number)] = f"resumed from checkpoint-{int(number)} with other settings"
    return marks


def draw_chart(run: Run, spec: ChartSpec, css_class: str = "", note: str = "") -> str:
    """Draw a chart of the training log; empty if no entry has its keys."""
    lines = []
    for number, (key, label) in enumerate(spec.keys.items()):
        x, y = get_curve(run, key)
        if spec.is_smoothed and len(x) > 10:
            lines += [
                Line(label, x, y, number, is_faint=True),
                Line(f"{label}, smoothed" if len(spec.keys) > 1 else "smoothed", x, smooth(y), number),
            ]
        else:
            lines.append(Line(label, x, y, number))
    if not any(len(line.x) for line in lines):
        return ""
    return Chart(spec.title, spec.unit, lines, run.step, list_marks(run)).render(css_class, note)


def draw_phases(run: Run) -> str:
    """Draw the time of a step by phase, as means over bins of steps."""
    keys = ("step_seconds", "data_wait_percent", *(f"{phase}_seconds" for phase in STEP_PHASES))
    entries = {
        step: entry
        for step, entry in run.training.items()
        if all(math.isfinite(entry.get(key, math.nan)) for key in keys)
    }
    if not entries:
        return ""
    total, wait, *measured = np.array([[entry[key] for entry in entries.values()] for key in keys])
    wait = wait / 100 * total
    rows = np.stack([wait, *measured, np.maximum(0, total - wait - sum(measured))])  # (phases, steps)
    steps = np.array([*entries])
    if len(steps) == 1:  # an area needs a width
        steps, rows = np.append(0, steps), np.repeat(rows, 2, axis=1)
    bins = np.array_split(np.arange(len(steps)), min(NUM_AREA_BINS, len(steps)))
    x, rows = steps[[part[-1] for part in bins]], np.stack([rows[:, part].mean(axis=1) for part in bins], axis=1)
    tops = rows.cumsum(axis=0)
    lines = [
        Line(phase, x, tops[number], number, low=tops[number] - rows[number], is_area=True)
        for number, phase in enumerate(("data wait", *STEP_PHASES, "other"))
    ]
    return Chart("Time of a step", "seconds by phase", lines, run.step).render()


def find_skipped_steps(run: Run) -> list[tuple[int, int]]:
    """Return (logging step, number of steps that were skipped since the one before).

    The log counts from the start of a process, so the count begins again where a run resumes.
    """
    skipped, before = [], 0
    for step, entry in run.training.items():
        count = entry.get("skipped_steps", 0)
        count = int(count) if 0 <= count < 2**53 else 0
        if count > before:
            skipped.append((step, count - before))
        elif 0 < count < before:
            skipped.append((step, count))
        before = count
    return skipped


def render_skipped_steps(run: Run) -> str:
    """Render which steps were skipped; empty if none was."""
    skipped = find_skipped_steps(run)
    if not skipped:
        return ""
    listed = ", ".join(f"{step:,}" + (f" ({count} steps)" if count > 1 else "") for step, count in skipped[:20])
    more = f" and {len(skipped) - 20} more" if len(skipped) > 20 else ""
    total = sum(count for _, count in skipped)
    return f'<p class="warn">Skipped steps: <b>{total}</b>, reported at step {listed}{more}.</p>'


def render_skipped_samples(run: Run) -> str:
    """Render the first unusable samples; empty if there are none."""
    if not run.skipped_samples:
        return ""
    items = "".join(f"<li>{clean(sentence, 600)}</li>" for sentence in run.skipped_samples[:20])
    more = f"<li>and {len(run.skipped_samples) - 20:,} more</li>" if len(run.skipped_samples) > 20 else ""
    return (
        f'<details class="warn"><summary>Unusable samples: <b>{len(run.skipped_samples):,}</b></summary>'
        f"<ol>{items}{more}</ol></details>"
    )


def render_training(run: Run) -> str:
    """Render the section; empty if no training step was logged."""
    notes = render_skipped_steps(run) + render_skipped_samples(run)
    if not run.training:
        return f"<h2>Training</h2>{notes}" if notes else ""
    _, losses = get_curve(run, "loss")
    num_gaps = int((~np.isfinite(losses)).sum())
    notes_of_chart = [f"The loss of {num_gaps:,} logging steps is not finite."] if num_gaps else []
    notes_of_chart += [f"Dashed: {text}." for text in list_marks(run).values()]
    note = f'<p class="soft">{" ".join(notes_of_chart)}</p>' if notes_of_chart else ""
    further = sorted({key for entry in run.training.values() for key in entry} - KNOWN_KEYS)
    specs = [*PREFERENCE_CHARTS, *STEP_CHARTS, *(ChartSpec(key, "", {key: key}) for key in further[:20])]
    charts = "".join(draw_chart(run, spec) for spec in specs) + draw_phases(run)
    return f'<h2>Training</h2>{notes}{draw_chart(run, LOSS_CHART, "wide", note)}<div class="charts">{charts}</div>'


def summarize_losses(run: Run) -> str:
    """Summarize the smoothed loss: `2.71 → 0.43`; empty without a finite one."""
    _, losses = get_curve(run, "loss")
    smoothed = smooth(losses)
    finite = smoothed[np.isfinite(smoothed)]
    return f"{finite[0]:.3g} → {finite[-1]:.3g}" if len(finite) else ""
