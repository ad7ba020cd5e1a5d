"""Reports of a run: metrics of all ranks, unusable samples, `metrics.jsonl`."""

import shutil
from pathlib import Path

from transformers import TrainerState

from internvl.arguments.evaluation_strategy import LOG_PREFIX
from internvl.data.skipped_samples import SkippedSampleReport
from internvl.dist_utils import gather_objects
from internvl.evaluation.results import EVALUATION_DIR, METRIC_PREFIX
from internvl.metrics.step_metrics import (
    METRICS_FILE,
    StepMetrics,
    append_metrics,
    combine_rank_reports,
    drop_metrics_after,
)
from internvl.train.step_guard import NonFiniteStepGuard

EVALUATION_SECONDS = f"{LOG_PREFIX}seconds"


class RunReports:
    """Reports of this run. Methods are collectives unless noted.

    Args:
        metrics: of this rank.
        guard: which counts skipped steps.
        skipped_samples: report of the samples that are unusable.
        output_dir: of the run.
        is_writer: whether this rank writes `metrics.jsonl`.
    """

    def __init__(
        self,
        metrics: StepMetrics,
        guard: NonFiniteStepGuard,
        skipped_samples: SkippedSampleReport,
        output_dir: Path,
        is_writer: bool,
    ):
        self.metrics, self.guard, self.skipped_samples = metrics, guard, skipped_samples
        self.output_dir, self.is_writer = output_dir, is_writer
        self.new_unusable_samples: list[str] = []  # on this rank since the last report

    def begin(self, step: int) -> None:
        """Drop the results of steps after the one that the run resumes from. No collective."""
        if self.is_writer:
            drop_metrics_after(self.output_dir / METRICS_FILE, step)
            drop_evaluations_after(self.output_dir / EVALUATION_DIR, step)

    def add_step_metrics(self, logs: dict) -> None:
        """Add the metrics of all ranks since the last report to the log of a training step."""
        reports = gather_objects({"nonfinite_loss": self.guard.take_nonfinite_loss(), **self.metrics.take_report()})
        logs["loss"] += sum(report["nonfinite_loss"] for report in reports)
        logs.update(combine_rank_reports(reports))
        if self.guard.num_skipped:
            logs["skipped_steps"] = self.guard.num_skipped

    def report_unusable_samples(self) -> None:
        """Report the unusable samples of all ranks since the last report."""
        own, self.new_unusable_samples = self.new_unusable_samples, []
        self.skipped_samples.add(sentence for sentences in gather_objects(own) for sentence in sentences)

    def append(self, step: int, logs: dict) -> None:
        """Append the log of a training step or an evaluation to `metrics.jsonl`. No collective."""
        if self.is_writer and ("loss" in logs or EVALUATION_SECONDS in logs):
            append_metrics(self.output_dir / METRICS_FILE, {"step": step, **rename_evaluation_metrics(logs)})


def drop_evaluations_after(folder: Path, step: int) -> None:
    """Remove the results of steps after `step`; those of step N are in `step-N`."""
    for path in folder.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            shutil.rmtree(path)


def rename_evaluation_metrics(logs: dict) -> dict:
    """Rename `eval_docvqa/anls` to `eval/docvqa/anls`, and so on."""
    return {
        METRIC_PREFIX + name.removeprefix(LOG_PREFIX) if is_evaluation_metric(name) else name: value
        for name, value in logs.items()
    }


def is_evaluation_metric(name: str) -> bool:
    return name.startswith(LOG_PREFIX) and name != EVALUATION_SECONDS


def find_evaluation(state: TrainerState, step: int) -> dict | None:
    """Return the log entry of the evaluation at a step."""
    entries = (entry for entry in state.log_history if entry["step"] == step and EVALUATION_SECONDS in entry)
    return next(entries, None)
