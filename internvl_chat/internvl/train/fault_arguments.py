"""Flags on what a run does when something goes wrong around it; a base of `TrainingArguments`."""

from dataclasses import dataclass, field


def option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class FaultArguments:
    """How a run meets signals and steps that went wrong."""

    watchdog_factor: float = option(
        10.0, "every rank prints where it is when a step takes this many times the usual; 0: never"
    )
    watchdog_seconds: float = option(60.0, "and so many seconds at least; the first step, --watchdog_factor times this")

    def check_faults(self) -> None:
        """Raises a ValueError for a value that cannot be used."""
        if not (self.watchdog_factor == 0 or 1 < self.watchdog_factor < float("inf")):
            raise ValueError(f"--watchdog_factor {self.watchdog_factor} must be more than 1, or 0 for no watchdog.")
        if not 0 < self.watchdog_seconds < float("inf"):
            raise ValueError(f"--watchdog_seconds {self.watchdog_seconds} must be positive.")
