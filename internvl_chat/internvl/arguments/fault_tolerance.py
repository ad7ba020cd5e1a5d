"""Flags on signals, non-finite steps and steps that hang."""

from dataclasses import dataclass

from internvl.arguments.flags import option, require


@dataclass
class FaultToleranceArguments:
    """Flags on signals, non-finite steps and hangs; a base of `TrainingArguments`."""

    save_on_signal_seconds: float = option(
        0, "seconds from a preemption signal (SIGUSR1, SIGTERM, SIGHUP, Ctrl-C) to the exit of the run; 0: no limit"
    )
    max_skipped_steps: int = option(
        20, "consecutive steps with a non-finite loss or gradient that are skipped before the run fails"
    )
    skip_above_grad_norm: float | None = option(
        None, "skip a step whose gradient norm, before --max_grad_norm clips it, exceeds this; default: no limit"
    )
    watchdog_factor: float = option(
        10.0, "print the stack of every rank when a step takes this many times the usual step time; 0: never"
    )
    watchdog_seconds: float = option(
        60.0,
        "the shortest step time that the watchdog reports; in the first step --watchdog_factor times this. Also the "
        "longest wait for data after a preemption signal",
    )

    def validate_fault_tolerance(self) -> None:
        """Raise a ValueError for an invalid value."""
        factor = self.watchdog_factor
        require(self, "watchdog_factor", factor == 0 or factor > 1, "a number > 1, or 0 for no watchdog")
