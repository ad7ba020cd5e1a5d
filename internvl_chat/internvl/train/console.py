"""Console output: one line of fixed columns per logging step."""

import logging
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from internvl.arguments.evaluation_strategy import LOG_PREFIX
from internvl.train.run_reports import EVALUATION_SECONDS, is_evaluation_metric

if TYPE_CHECKING:
    from internvl.train.trainer import InternVLTrainer

logger = logging.getLogger(__name__)
# Key of the log -> label and format of its column. Keys that a step lacks have no column.
COLUMNS = {
    "epoch": ("epoch", "{:.2f}"),
    "loss": ("loss", "{:.4f}"),
    "grad_norm": ("grad norm", "{:.3g}"),
    "learning_rate": ("lr", "{:.2e}"),
    "rewards/accuracies": ("reward accuracy", "{:.2f}"),
    "rewards/margins": ("reward margin", "{:.3g}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "mfu_percent": ("MFU", "{:.1f}%"),
    "step_seconds": ("step", "{:.2f}s"),
    "data_wait_percent": ("data wait", "{:.0f}%"),
    "peak_memory_gib": ("memory", "{:.1f}GiB"),
    "skipped_steps": ("skipped", "{}"),
}
WIDTHS = {  # of the values, to align the columns of successive lines
    "loss": 7,
    "grad_norm": 5,
    "tokens_per_second": 7,
    "mfu_percent": 5,
    "step_seconds": 6,
    "data_wait_percent": 3,
}


def format_duration(seconds: float) -> str:
    """Format seconds as `2:07` (minutes), `1:02:07` (hours) or `3d 04:05`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_step(logs: dict, step: int, max_steps: int) -> str:
    """Format the log of a training step as a line."""
    columns = [f"step {step:>{len(str(max_steps))}}/{max_steps}"]
    for key, (label, template) in COLUMNS.items():
        if key in logs:
            columns.append(f"{label} {template.format(logs[key]):>{WIDTHS.get(key, 0)}}")
    if "step_seconds" in logs:
        columns.append(f"left {format_duration(logs['step_seconds'] * (max_steps - step))}")
    return "  ".join(columns)


def format_evaluation(metrics: dict, set_names: list[str], step: int) -> list[str]:
    """Format the metrics of an evaluation: a line per evaluation set, and one for all.

    A score is followed by its 95 % interval.

    Args:
        metrics: as transformers logs them, `eval_NAME/loss` and so on.
    """
    rest = {key.removeprefix(LOG_PREFIX): value for key, value in metrics.items() if is_evaluation_metric(key)}
    lines = []
    for name in [*sorted(set_names, key=len, reverse=True), ""]:  # a name may begin with another one and a slash
        prefix = f"{name}/" if name else ""
        values = {key.removeprefix(prefix): rest.pop(key) for key in list(rest) if key.startswith(prefix)}
        if values:
            columns = [f"evaluation at step {step}: {name or 'all sets'}"]
            lines.append("  ".join(columns + format_values(values)))
    return [*lines[:-1], f"{lines[-1]}  took {format_duration(metrics[EVALUATION_SECONDS])}"]


def format_values(values: dict[str, float]) -> list[str]:
    """Format metrics, each with its interval if it has one."""
    columns, ends = [], {f"{metric}_{end}" for metric in values for end in ("low", "high")}
    for metric, value in values.items():
        if metric in ends:
            continue
        interval = [f"{values[end]:.4f}" for end in (f"{metric}_low", f"{metric}_high") if end in values]
        columns.append(f"{metric.replace('_', ' ')} {value:.4f}" + (f" [{', '.join(interval)}]" if interval else ""))
    return columns


class ConsoleCallback(TrainerCallback):
    """Callback that logs one line per logging step.

    It replaces transformers' progress bar and printed dictionaries.
    """

    def __init__(self, trainer: "InternVLTrainer"):
        self.trainer = trainer

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        evaluation = self.trainer.evaluation
        if state.is_world_process_zero and metrics and evaluation and evaluation.data:
            names = [evaluation_set.name for evaluation_set in evaluation.data.sets]
            for line in format_evaluation(metrics, names, state.global_step):
                logger.info("%s", line)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs and "loss" in logs:
            logger.info("%s", format_step(logs, state.global_step, state.max_steps))
