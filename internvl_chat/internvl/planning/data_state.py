"""Save and restore the position in the data; detect changed data.

`data_state.json` in a checkpoint has the epoch, the step and the layouts that the epoch was read in. `data-ID.npz` in
the output folder has lengths, digest and weight of every sample. Changed data is detected by comparison with it. Both
are untrusted: their values are checked before anything is planned with them.
"""

import json
import logging
import math
import os
import re
import zipfile
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from internvl.planning.data_schedule import DataSchedule
from internvl.planning.epoch_plan import SAMPLE_LENGTHS, PlanLayout, SampleCost
from internvl.regular_files import open_regular_file, read_json_object

logger = logging.getLogger(__name__)
DATA_STATE_FILE = "data_state.json"
DATA_ID_PATTERN = re.compile("[0-9a-f]{24}")
# Types of fields of PlanLayout, in words.
EXPECTED_VALUES: dict[Any, str] = {
    int: "an integer from 0",
    bool: "true or false",
    SampleCost: "a list of numbers from 0",
}
MAX_DATA_CHANGES = 100  # within one epoch
MAX_BATCH_ROWS = 2**24  # of a step: the plan of an epoch has at least one step, so these take memory
MAX_SAMPLES_BYTES = 2**32  # of `data-ID.npz` in memory: 170 million samples


def save_data_state(schedule: DataSchedule, epoch: int, step: int, checkpoint: Path, output_dir: Path) -> None:
    """Write the position to the checkpoint, the samples to the output folder."""
    (checkpoint / DATA_STATE_FILE).write_text(json.dumps(schedule.state_dict(epoch, step), indent=2))
    _save_samples(schedule, output_dir)


def resume_data(
    schedule: DataSchedule, checkpoint: Path, accept_changed_data: bool, global_step: int
) -> tuple[int, int]:
    """Set the schedule to the position of a checkpoint.

    Args:
        global_step: of the checkpoint.

    Returns:
        The epoch, and the number of its steps that are done.

    Raises:
        ValueError: the checkpoint holds no position or an invalid one, or was trained on other data.
    """
    file, state = checkpoint / DATA_STATE_FILE, read_data_state(checkpoint)
    if state["data_id"] != schedule.data_id:
        _check_changes(schedule, _load_schedule(schedule, checkpoint, state["data_id"]), accept_changed_data)
    try:
        epoch, step = schedule.resume_from(state, lambda data_id: _load_schedule(schedule, checkpoint, data_id))
    except (ValueError, AssertionError) as error:  # the plan asserts that its samples fit its rows
        raise ValueError(f"{file} is invalid: {error}") from error
    # Every epoch has at least one step, and epoch 0 has no steps before it.
    steps_before = global_step - step
    if steps_before < epoch or (epoch == 0 and steps_before):
        raise ValueError(f"{file} is invalid: epoch {epoch}, step {step} cannot follow after {global_step} steps.")
    return epoch, step


def read_world_size(checkpoint: Path) -> int:
    """Return the number of ranks that wrote a checkpoint."""
    return read_data_state(checkpoint)["segments"][-1]["layout"]["world_size"]


def read_data_state(checkpoint: Path) -> dict:
    """Read and check `data_state.json`.

    Raises:
        ValueError: it is missing or damaged.
    """
    file = checkpoint / DATA_STATE_FILE
    if not file.exists():
        raise ValueError(f"{checkpoint} has no {DATA_STATE_FILE}: it is unknown which samples it was trained on.")
    state = read_json_object(file)
    if error := find_data_state_error(state):
        raise ValueError(f"{file} is invalid: {error}.")
    return state


def find_data_state_error(state: Any) -> str | None:
    """Describe the first wrong value of a `DataSchedule.state_dict`, None if there is none."""
    for _ in range(MAX_DATA_CHANGES):
        if not isinstance(state, dict) or not DATA_ID_PATTERN.fullmatch(str(state.get("data_id"))):
            return f"expected an object with data_id, 24 hexadecimal digits, got {state!r:.80}"
        if not _is_count(state.get("epoch"), 2**31):
            return f"epoch is {state.get('epoch')!r:.80}, expected an integer from 0"
        segments = state.get("segments")
        if not isinstance(segments, list) or not segments:
            return f"segments is {segments!r:.80}, expected a list of objects"
        for index, segment in enumerate(segments):
            if error := _find_segment_error(segment):
                return f"segments[{index}]: {error}"
        if "state_before_change" not in state:
            return "state_before_change is missing"
        state = state["state_before_change"]
        if state is None:
            return None
    return f"state_before_change is nested more than {MAX_DATA_CHANGES} times"


def _find_segment_error(segment: Any) -> str | None:
    layout = segment.get("layout") if isinstance(segment, dict) else None
    if not isinstance(layout, dict) or not _is_count(segment.get("num_steps"), 2**63):
        return f"expected an object with layout, an object, and num_steps, an integer from 0, got {segment!r:.80}"
    expected = {field.name: field.type for field in fields(PlanLayout)}
    if differing := sorted(layout.keys() ^ expected):
        return f"layout has missing or unknown fields, such as {differing[0]!r:.80}"
    for name, kind in expected.items():
        value = layout[name]
        is_valid = type(value) is kind
        if kind is int:
            is_valid = _is_count(value, 2**63)
        if kind is SampleCost:
            is_valid = _is_list_of_costs(value)
        if not is_valid:
            return f"layout.{name} is {value!r:.80}, expected {EXPECTED_VALUES[kind]}"
    sizes = [layout[name] for name in ("world_size", "micro_batch_size", "gradient_accumulation")]
    if not 1 <= math.prod(sizes) <= MAX_BATCH_ROWS:
        return f"layout has steps of {' x '.join(map(str, sizes))} rows, expected 1 to {MAX_BATCH_ROWS:,}"
    return None


def _is_count(value: Any, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit


def _is_list_of_costs(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) == len(SampleCost._fields)
    return is_list and all(type(cost) in (int, float) and 0 <= cost < 1e300 for cost in value)


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
    samples = _read_samples(file)
    lengths, digests, weights = (samples.get(name) for name in ("lengths", "digests", "weights"))
    if lengths is None or digests is None or not _are_valid_samples(lengths, digests, weights):
        raise ValueError(f"{file} is damaged: expected the lengths, digests and weights of samples.")
    previous = DataSchedule(lengths, digests, schedule.layout, weights)
    if previous.data_id != data_id:
        raise ValueError(f"{file} is damaged: it holds other samples than its name says.")
    return previous


def _are_valid_samples(lengths: np.ndarray, digests: np.ndarray, weights: np.ndarray | None) -> bool:
    """Check arrays of unknown origin; all have one entry per sample."""
    if lengths.dtype != SAMPLE_LENGTHS or digests.dtype.kind != "i":
        return False
    if lengths.ndim != 1 or lengths.shape != digests.shape or not len(lengths):
        return False
    if min(lengths[name].min() for name in SAMPLE_LENGTHS.names or ()) < 0:
        return False
    if weights is None:
        return True
    is_valid = weights.dtype == np.float64 and weights.shape == lengths.shape and np.isfinite(weights).all()
    return bool(is_valid and (weights >= 0).all() and weights.any())


def _read_samples(file: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a npz file.

    Raises:
        ValueError: it is damaged, or would need more than `MAX_SAMPLES_BYTES`.
    """
    try:
        with open_regular_file(file) as opened:
            num_bytes = sum(info.file_size for info in zipfile.ZipFile(opened).infolist())
            if num_bytes > MAX_SAMPLES_BYTES:
                raise ValueError(f"{num_bytes:,} bytes, more than {MAX_SAMPLES_BYTES:,}")
            opened.seek(0)
            return dict(np.load(opened))
    except (ValueError, KeyError, EOFError, MemoryError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
