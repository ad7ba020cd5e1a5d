"""Claim of a run on its output folder, before anything is written to it."""

import uuid
from pathlib import Path

from internvl.arguments.data import DataTrainingArguments
from internvl.arguments.model import ModelArguments
from internvl.arguments.training import TrainingArguments
from internvl.command_line import list_run_inputs, refuse_inputs_in_output_dir
from internvl.dist_utils import gather_objects, run_on_rank_0
from internvl.runtime.output_lock import hold_output_lock
from internvl.runtime.rank_monitor_server import write_stderr
from internvl.runtime.signals import exit_process


def claim_output_dir(model_args: ModelArguments, data_args: DataTrainingArguments, args: TrainingArguments) -> None:
    """Lock the output folder against other runs until the exit. A collective.

    Raises:
        ValueError: on every rank; an input is in the folder, another run holds the lock, or it is not writable.
    """

    def start_run() -> str:
        refuse_inputs_in_output_dir(str(args.output_dir), list_run_inputs(vars(model_args) | vars(data_args)))
        return uuid.uuid4().hex

    run, error = run_on_rank_0(start_run), ""
    if args.should_save and args.do_train:
        try:
            hold_output_lock(Path(str(args.output_dir)), run, _stop_run)
        except OSError as failure:
            error = f"--output_dir {args.output_dir} is not writable: {failure.strerror or failure}."
        except ValueError as failure:
            error = str(failure)
    if errors := [error for error in gather_objects(error) if error]:
        raise ValueError(errors[0])


def _stop_run(message: str) -> None:
    write_stderr(f"error: {message}")
    exit_process(1)
