"""Save and restore the position in the data; detect changed data.

`data_state.json` in a checkpoint has the epoch, the step and the layouts that the epoch was read in. `data-ID.npz` in
the output folder has lengths, digest and weight of every sample. Changed data is detected by comparison with it.
"""

import json
import logging
import os
from pathlib import Path

import numpy as np

from internvl.planning.data_schedule import DataSchedule

logger = logging.getLogger(__name__)
DATA_STATE_FILE = "data_state.json"


def save_data_state(schedule: DataSchedule, epoch: int, step: int, checkpoint: Path, output_dir: Path) -> None:
    """Write the position to the checkpoint, the samples to the output folder."""
    (checkpoint / DATA_STATE_FILE).write_text(json.dumps(schedule.state_dict(epoch, step), indent=2))
    _save_samples(schedule, output_dir)


def resume_data(schedule: DataSchedule, checkpoint: Path, accept_changed_data: bool) -> tuple[int, int]:
    """Set the schedule to the position of a checkpoint.

    Returns:
        The epoch, and the number of its steps that are done.

    Raises:
        ValueError: the checkpoint holds no position, or was trained on other data.
    """
    file = checkpoint / DATA_STATE_FILE
    if not file.is_file():
        raise ValueError(f"{checkpoint} has no {DATA_STATE_FILE}: it is unknown which samples it was trained on.")
    state = json.loads(file.read_text())
    if state["data_id"] != schedule.data_id:
        _check_changes(schedule, _load_schedule(schedule, checkpoint, state["data_id"]), accept_changed_data)
    return schedule.resume_from(state, lambda data_id: _load_schedule(schedule, checkpoint, data_id))


def _check_changes(schedule: DataSchedule, previous: DataSchedule, accept_changed_data: bool) -> None:
    changes = schedule.describe_changes(previous)
    if not accept_changed_data:
        raise ValueError(
            f"The data has changed since the checkpoint was written: {changes}. --accept_changed_data True resumes "
            "with the samples that have not been seen yet; --overwrite_output_dir True starts from the beginning."
        )
    logger.warning("The data has changed since the checkpoint was written: %s", changes)


def _samples_file(output_dir: Path, data_id: str) -> Path:
    return output_dir / f"data-{data_id}.npz"


def _save_samples(schedule: DataSchedule, output_dir: Path) -> None:
    file = _samples_file(output_dir, schedule.data_id)
    if not file.exists():
        arrays = {"lengths": schedule.lengths, "digests": schedule.digests}
        arrays |= {} if schedule.weights is None else {"weights": schedule.weights}
        unfinished = file.with_name(f"unfinished-{file.name}")
        np.savez_compressed(unfinished, **arrays)  # pyrefly: ignore[bad-argument-type]  # no name is `allow_pickle`
        os.replace(unfinished, file)


def _load_schedule(schedule: DataSchedule, checkpoint: Path, data_id: str) -> DataSchedule:
    """Load the schedule of the data that a checkpoint was trained on."""
    file = _samples_file(checkpoint.parent, data_id)
    if not file.is_file():
        raise ValueError(
            f"The data has changed since {checkpoint} was written, and {file}, which lists its samples, is missing."
        )
    samples = np.load(file)
    return DataSchedule(samples["lengths"], samples["digests"], schedule.layout, samples.get("weights"))
