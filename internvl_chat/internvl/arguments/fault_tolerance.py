"""Flags on what a run does when something goes wrong around it; a base of `TrainingArguments`."""

from dataclasses import dataclass, field


def option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class FaultToleranceArguments:
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
    watchdog_factor: float = option(
        10.0, "every rank prints where it is when a step takes this many times the usual; 0: never"
    )
    watchdog_seconds: float = option(60.0, "and so many seconds at least; the first step, --watchdog_factor times this")

    def validate_fault_tolerance(self) -> None:
        """Raises a ValueError for a value that cannot be used."""
        if not 0 <= self.save_on_signal_seconds < float("inf"):
            raise ValueError(f"--save_on_signal_seconds {self.save_on_signal_seconds} must be 0 or more seconds.")
        if self.max_skipped_steps < 0:
            raise ValueError(f"--max_skipped_steps {self.max_skipped_steps} must be 0 or more.")
        if self.skip_above_grad_norm is not None and not self.skip_above_grad_norm > 0:
            raise ValueError(f"--skip_above_grad_norm {self.skip_above_grad_norm} must be positive.")
        if not (self.watchdog_factor == 0 or 1 < self.watchdog_factor < float("inf")):
            raise ValueError(f"--watchdog_factor {self.watchdog_factor} must be more than 1, or 0 for no watchdog.")
        if not 0 < self.watchdog_seconds < float("inf"):
            raise ValueError(f"--watchdog_seconds {self.watchdog_seconds} must be positive.")
