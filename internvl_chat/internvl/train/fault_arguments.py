"""Flags on what a run does when something goes wrong around it; a base of `TrainingArguments`."""

from dataclasses import dataclass, field


def option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class FaultArguments:
    """How a run meets signals and steps that went wrong."""

    save_on_signal_seconds: float = option(
        0, "seconds from SIGUSR1, SIGTERM or Ctrl-C to the end of the run, saving included; 0: as long as it takes"
    )
    max_skipped_steps: int = option(
        20, "steps in a row whose loss or gradient may be unusable, and which are skipped, before the run ends"
    )
    skip_above_grad_norm: float | None = option(
        None, "skip a step whose gradient's norm, before --max_grad_norm clips it, is above this; default: none"
    )

    def check_faults(self) -> None:
        """Raises a ValueError for a value that cannot be used."""
        if not 0 <= self.save_on_signal_seconds < float("inf"):
            raise ValueError(f"--save_on_signal_seconds {self.save_on_signal_seconds} must be 0 or more seconds.")
        if self.max_skipped_steps < 0:
            raise ValueError(f"--max_skipped_steps {self.max_skipped_steps} must be 0 or more.")
        if self.skip_above_grad_norm is not None and not self.skip_above_grad_norm > 0:
            raise ValueError(f"--skip_above_grad_norm {self.skip_above_grad_norm} must be positive.")
