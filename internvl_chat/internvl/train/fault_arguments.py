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

    def check_faults(self) -> None:
        """Raises a ValueError for a value that cannot be used."""
        if not 0 <= self.save_on_signal_seconds < float("inf"):
            raise ValueError(f"--save_on_signal_seconds {self.save_on_signal_seconds} must be 0 or more seconds.")
