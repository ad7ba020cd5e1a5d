"""Data schedule: the epoch plans of a run, and resuming from one.

The position in the data is (data, epoch, layout, step). A run that resumes in the same layout continues the same plan
at that step. In another layout (ranks, batch size, gradient accumulation, packing) the old plan determines which
samples have been seen, and the rest of the epoch is planned again. If the data has changed, samples that have been seen
are recognized by a digest of their content. This module reads no files, does not communicate and does not import torch.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from internvl.planning.epoch_plan import EpochPlan, PlanLayout, SampleCost, plan_epoch


@dataclass(frozen=True)
class PlanSegment:
    """Consecutive steps of an epoch, planned in one layout."""

    layout: PlanLayout
    num_steps: int


class PartialEpoch(NamedTuple):
    """An epoch that earlier runs have trained in part.

    Attributes:
        segments: the steps trained on the current data.
        state_before_change: the last `state_dict` before the data changed in this epoch; None if it did not change.
        seen_before_change: (N,) how often each current sample was seen before the change; None without a change.
        steps_before_change: number of steps before the change.
    """

    epoch: int = 0
    segments: tuple[PlanSegment, ...] = ()
    state_before_change: dict | None = None
    seen_before_change: np.ndarray | None = None
    steps_before_change: int = 0

    @property
    def num_steps(self) -> int:
        """Steps of the epoch that are done."""
        return self.steps_before_change + sum(segment.num_steps for segment in self.segments)


class DataSchedule:
    """The epoch plans of a run on some samples in some layout.

    Args:
        lengths: (N,) of SAMPLE_LENGTHS.
        digests: (N,) one integer per sample that changes with its content.
        weights: (N,) or None, as for `plan_epoch`.
    """

    def __init__(self, lengths: np.ndarray, digests: np.ndarray, layout: PlanLayout, weights: np.ndarray | None = None):
        self.lengths, self.digests, self.layout, self.weights = lengths, digests, layout, weights
        self.partial_epoch = PartialEpoch()  # the position that the run started from
        self.plan = lru_cache(maxsize=2)(self._plan)
        self._num_steps: dict[int | None, int] = {}

    def _plan(self, epoch: int) -> EpochPlan:
        """Plan an epoch for this run; steps of earlier runs are empty."""
        seen, num_done = None, 0
        if epoch == self.partial_epoch.epoch:
            seen, num_done = self.count_seen(self.partial_epoch), self.partial_epoch.num_steps
        plan = plan_epoch(self.lengths, self._get_epoch_layout(epoch), epoch, weights=self.weights, seen=seen)
        done = np.full((num_done, *plan.steps.shape[1:]), -1)
        return replace(plan, steps=np.concatenate([done, plan.steps]))

    def _get_epoch_layout(self, epoch: int) -> PlanLayout:
        """Return this run's layout, with the seed of the epoch's first step.

        That seed has determined which samples are drawn in the epoch.
        """
        segments = self.partial_epoch.segments if epoch == self.partial_epoch.epoch else ()
        return replace(self.layout, seed=segments[0].layout.seed) if segments else self.layout

    def count_seen(self, partial_epoch: PartialEpoch) -> np.ndarray | None:
        """Count how often each sample was seen in a partial epoch.

        Returns:
            (N,), or None if no step of the epoch is done.
        """
        seen = partial_epoch.seen_before_change
        for segment in partial_epoch.segments:
            # Each segment was planned for the samples that the earlier ones had left.
            plan = plan_epoch(self.lengths, segment.layout, partial_epoch.epoch, weights=self.weights, seen=seen)
            if segment.num_steps > len(plan):
                raise ValueError(f"{segment.num_steps} steps of epoch {partial_epoch.epoch}, which has {len(plan)}.")
            seen_in_segment = plan.count_seen(segment.num_steps, len(self.digests))
            seen = seen_in_segment if seen is None else seen + seen_in_segment
        return seen

    def count_epoch_steps(self, epoch: int) -> int:
        """Return the number of steps of an epoch, earlier runs included."""
        # Without packing, all complete epochs have the same number of steps.
        key = epoch if self.layout.packed or epoch == self.partial_epoch.epoch else None
        if key not in self._num_steps:
            self._num_steps[key] = len(self.plan(epoch))
        return self._num_steps[key]

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    @cached_property
    def data_id(self) -> str:
        """Hash of the samples in their order, with their lengths and weights."""
        content = hashlib.sha256()
        for array in (self.lengths, self.digests, *([] if self.weights is None else [self.weights])):
            content.update(np.ascontiguousarray(array).view(np.uint8).data)
        return content.hexdigest()[:24]

    def state_dict(self, epoch: int, step: int) -> dict:
        """Return the position after `step` steps of an epoch, JSON-serializable."""
        partial = self.partial_epoch if epoch == self.partial_epoch.epoch else PartialEpoch(epoch)
        segments = (*partial.segments, PlanSegment(self._get_epoch_layout(epoch), step - partial.num_steps))
        return {
            "data_id": self.data_id,
            "epoch": epoch,
            "segments": [asdict(segment) for segment in segments],
            "state_before_change": partial.state_before_change,
        }

    def resume_from(
        self, state: dict, load_schedule_fn: Callable[[str], "DataSchedule"] | None = None
    ) -> tuple[int, int]:
        """Start the run at the position of a checkpoint.

        Args:
            state: what `state_dict` returned.
            load_schedule_fn: data_id -> schedule of that data, in any layout. Called if the data has changed.

        Returns:
            The epoch, and the number of its steps that are done.
        """
        has_changed = state["data_id"] != self.data_id
        partial = PartialEpoch(state["epoch"], () if has_changed else _read_segments(state))
        if state_before := state if has_changed else state["state_before_change"]:
            partial = self._resume_from_other_data(partial, state_before, load_schedule_fn)
        self._set_partial_epoch(partial)

        # If the last segment has this run's layout, the run continues its plan. Drop the segment: its steps are the
        # first ones of this run's own plan.
        if partial.segments and partial.segments[-1].layout == self._get_epoch_layout(partial.epoch):
            self._set_partial_epoch(partial._replace(segments=partial.segments[:-1]))
            # If it was the only segment, it also held the epoch's seed. Keep it if this run has another seed.
            if self._get_epoch_layout(partial.epoch) != partial.segments[-1].layout:
                self._set_partial_epoch(partial)

        num_steps = self.count_epoch_steps(partial.epoch)
        if partial.num_steps > num_steps:
            raise ValueError(f"{partial.num_steps} steps of epoch {partial.epoch}, which has {num_steps}.")
        if partial.num_steps == num_steps:
            self._set_partial_epoch(PartialEpoch(partial.epoch + 1))
            return partial.epoch + 1, 0
        return partial.epoch, partial.num_steps

    def _resume_from_other_data(
        self, partial: PartialEpoch, state_before: dict, load_schedule_fn: Callable[[str], "DataSchedule"] | None
    ) -> PartialEpoch:
        """Add what was seen before the data changed to a partial epoch."""
        assert load_schedule_fn is not None, "data has changed"
        schedule_before = load_schedule_fn(state_before["data_id"])
        _, num_steps = schedule_before.resume_from(state_before, load_schedule_fn)
        partial_before = schedule_before.partial_epoch
        if partial_before.epoch > partial.epoch:  # the data changed after the last step of the epoch
            return PartialEpoch(partial_before.epoch, partial.segments)
        seen = schedule_before.count_seen(partial_before._replace(segments=_read_segments(state_before)))
        assert seen is not None  # `state_before` has at least one segment
        return partial._replace(
            state_before_change=state_before,
            seen_before_change=self.match_seen(schedule_before.digests, seen),
            steps_before_change=num_steps,
        )

    def _set_partial_epoch(self, partial_epoch: PartialEpoch) -> None:
        self.partial_epoch = partial_epoch
        self._num_steps.clear()
        self.plan.cache_clear()

    def match_seen(self, digests: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Count how often equal samples were seen in other data.

        Args:
            digests, seen: (M,) of the samples of the other data.

        Returns:
            (N,) for the samples of this schedule; samples of equal content share the count.
        """
        seen_digests, times = np.unique(np.repeat(digests, seen), return_counts=True)
        order = np.argsort(self.digests, kind="stable")
        # Groups of samples of equal content: digest, first position in `order`, number of samples.
        group_digests, group_starts, group_sizes = np.unique(self.digests[order], return_index=True, return_counts=True)
        group_seen = np.zeros(len(group_digests), np.int64)
        if len(seen_digests):
            places = np.minimum(np.searchsorted(seen_digests, group_digests), len(seen_digests) - 1)
            group_seen = np.where(seen_digests[places] == group_digests, times[places], 0)
        # Spread the count of a group evenly over its samples; the first ones take the remainder.
        quotients, remainders = np.divmod(group_seen, group_sizes)
        place_in_group = np.arange(len(order)) - np.repeat(group_starts, group_sizes)
        matched = np.empty(len(order), np.int64)
        matched[order] = np.repeat(quotients, group_sizes) + (place_in_group < np.repeat(remainders, group_sizes))
        return matched

    def describe_changes(self, previous: "DataSchedule") -> str:
        """Describe how the data differs from that of a previous run."""
        content, index = np.unique(np.concatenate([self.digests, previous.digests]), return_inverse=True)
        ours, theirs = (np.bincount(part, minlength=len(content)) for part in np.split(index, [len(self.digests)]))
        num_new, num_removed = int(np.maximum(ours - theirs, 0).sum()), int(np.maximum(theirs - ours, 0).sum())
        if not num_new and not num_removed:
            return "same samples in another order, of other lengths (flags, tokenizer) or other weights"
        return (
            f"{num_new} of {len(self.digests)} samples are new, "
            f"{num_removed} of the previous {len(previous.digests)} are removed"
        )


def _read_segments(state: dict) -> tuple[PlanSegment, ...]:
    """Read the segments of a `state_dict` that went through JSON."""
    segments = []
    for segment in state["segments"]:
        # JSON turns the named tuple into a list.
        layout = PlanLayout(**segment["layout"] | {"sample_cost": SampleCost(*segment["layout"]["sample_cost"])})
        segments.append(PlanSegment(layout, segment["num_steps"]))
    return tuple(segments)
