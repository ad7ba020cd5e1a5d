"""Console output: one line of fixed columns per logging step."""

import logging

from transformers import TrainerCallback

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


class ConsoleCallback(TrainerCallback):
    """Callback that logs one line per logging step.

    It replaces transformers' progress bar and printed dictionaries.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs and "loss" in logs:
            logger.info("%s", format_step(logs, state.global_step, state.max_steps))
