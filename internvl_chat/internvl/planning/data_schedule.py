"""The steps of a whole run, wherever it begins: plans epoch after epoch, and what a checkpoint keeps of them.

The state of the data is (which data, epoch, layout, step). Going on in the same layout reads the same plan from that
step on. In another layout (other ranks, batch size, accumulation, packing) the old plan tells what has been seen, and
what has not is planned anew. Pure: nothing here knows of files, ranks or torch.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from internvl.planning.epoch_plan import EpochPlan, PlanLayout, SampleCost, SampleLengths, plan_epoch


@dataclass(frozen=True)
class PlanSegment:
    """Steps of an epoch that were read in one layout."""

    layout: PlanLayout
    steps: int


class PartialEpoch(NamedTuple):
    """An epoch of which something was read already: in other layouts, or before the data changed."""

    epoch: int = 0
    stretches: tuple[PlanSegment, ...] = ()
    earlier: dict | None = None  # the state at which the data was exchanged
    seen: np.ndarray | None = None  # (N,) how often each sample had been seen by then,
    steps: int = 0  # in how many steps


class DataSchedule:
    """Plans by epoch.

    Args:
        digests: (N,) one integer a sample that changes with its content.
        weights: as of `plan_epoch`.
    """

    def __init__(
        self, lengths: SampleLengths, digests: np.ndarray, layout: PlanLayout, weights: np.ndarray | None = None
    ):
        self.lengths, self.digests, self.layout, self.weights = lengths, digests, layout, weights
        self.begun = PartialEpoch()
        self.plan = lru_cache(maxsize=2)(self._plan)
        self._steps: dict[int | None, int] = {}

    def _plan(self, epoch: int) -> EpochPlan:
        """The epoch as this run reads it; steps that were read before it stand in it as empty ones."""
        seen, before = self._seen(self.begun) if epoch == self.begun.epoch else (None, 0)
        plan = plan_epoch(self.lengths, self._layout_of(epoch), epoch, weights=self.weights, seen=seen)
        read = np.full((before, *plan.steps.shape[1:]), -1)
        return EpochPlan(plan.samples, plan.starts, np.concatenate([read, plan.steps]))

    def _layout_of(self, epoch: int) -> PlanLayout:
        """This run's layout, with the seed that the epoch began with: it decided which samples are drawn."""
        began = self.begun.stretches if epoch == self.begun.epoch else ()
        return replace(self.layout, seed=began[0].layout.seed) if began else self.layout

    def _seen(self, begun: PartialEpoch) -> tuple[np.ndarray | None, int]:
        """(N,) how often each sample was seen in an epoch, None for never, and in how many steps."""
        seen, steps = begun.seen, begun.steps
        for stretch in begun.stretches:
            plan = plan_epoch(self.lengths, stretch.layout, begun.epoch, weights=self.weights, seen=seen)
            now = plan.seen(stretch.steps, len(self.digests))
            seen, steps = now if seen is None else seen + now, steps + stretch.steps
        return seen, steps

    def steps(self, epoch: int) -> int:
        """Number of steps of an epoch, those already read included."""
        # Without packing, whole epochs are equally long.
        name = epoch if self.layout.packed or epoch == self.begun.epoch else None
        if name not in self._steps:
            self._steps[name] = len(self.plan(epoch))
        return self._steps[name]

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """Name of the data: its samples in their order, with their sizes and weights."""
        content = hashlib.sha256()
        for array in (*self.lengths, self.digests, *([] if self.weights is None else [self.weights])):
            content.update(np.ascontiguousarray(array))
        return content.hexdigest()[:24]

    def state(self, epoch: int, step: int) -> dict:
        """What a checkpoint after so many steps of an epoch keeps, for `json`."""
        begun = self.begun if epoch == self.begun.epoch else PartialEpoch(epoch)
        read = step - begun.steps - sum(stretch.steps for stretch in begun.stretches)
        stretches = [asdict(stretch) for stretch in (*begun.stretches, PlanSegment(self._layout_of(epoch), read))]
        return {"data": self.fingerprint, "epoch": epoch, "stretches": stretches, "earlier": begun.earlier}

    def go_on(self, state: dict, data_of: Callable[[str], "DataSchedule"] | None = None) -> tuple[int, int]:
        """Let the run begin where a checkpoint was made.

        Args:
            data_of: the schedule, in any layout, of the data of a fingerprint; asked where data was exchanged.

        Returns:
            The epoch, and how many of its steps are behind.
        """
        exchanged = state["data"] != self.fingerprint
        begun = PartialEpoch(state["epoch"], () if exchanged else tuple(map(_stretch, state["stretches"])))
        if earlier := state if exchanged else state["earlier"]:
            before = data_of(earlier["data"])
            _, steps = before.go_on(earlier, data_of)
            if before.begun.epoch > begun.epoch:  # its last step was the epoch's last
                begun = PartialEpoch(before.begun.epoch, begun.stretches)
            else:
                began = before.begun._replace(stretches=tuple(map(_stretch, earlier["stretches"])))
                seen = self._recognised(before.digests, before._seen(began)[0])
                begun = begun._replace(earlier=earlier, seen=seen, steps=steps)
        steps = begun.steps + sum(stretch.steps for stretch in begun.stretches)
        self._begin(begun)
        if begun.stretches and begun.stretches[-1].layout == self._layout_of(begun.epoch):
            self._begin(begun._replace(stretches=begun.stretches[:-1]))
            if self._layout_of(begun.epoch) != begun.stretches[-1].layout:  # the seed is told by this stretch alone
                self._begin(begun)
        if steps >= self.steps(begun.epoch):
            self._begin(PartialEpoch(begun.epoch + 1))
            steps = 0
        return self.begun.epoch, steps

    def _begin(self, begun: PartialEpoch) -> None:
        self.begun = begun
        self._steps.clear()
        self.plan.cache_clear()

    def _recognised(self, digests: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """(N,) how often each of these samples was seen as one of the same content of other data."""
        content, times = np.unique(np.repeat(digests, seen), return_counts=True)
        order = np.argsort(self.digests, kind="stable")
        ours, first, ours_times = np.unique(self.digests[order], return_index=True, return_counts=True)
        place = np.minimum(np.searchsorted(content, ours), max(0, len(content) - 1))
        known = np.where(content[place] == ours, times[place], 0) if len(content) else np.zeros(len(ours), np.int64)
        each, more = np.divmod(known, ours_times)  # equal samples share what their content was seen
        rank = np.arange(len(order)) - np.repeat(first, ours_times)
        recognised = np.empty(len(order), np.int64)
        recognised[order] = np.repeat(each, ours_times) + (rank < np.repeat(more, ours_times))
        return recognised

    def differences(self, other: "DataSchedule") -> str:
        """What is new and what is gone, compared with other data, for a sentence."""
        content, index = np.unique(np.concatenate([self.digests, other.digests]), return_inverse=True)
        ours, theirs = (np.bincount(part, minlength=len(content)) for part in np.split(index, [len(self.digests)]))
        new, gone = int(np.maximum(ours - theirs, 0).sum()), int(np.maximum(theirs - ours, 0).sum())
        if not new and not gone:
            return "its samples are the same in another order, size (flags, tokenizer) or weight"
        return f"{new} of its {len(self.digests)} samples are new, {gone} of the {len(other.digests)} before are gone"


def _stretch(state: dict) -> PlanSegment:
    return PlanSegment(PlanLayout(**{**state["layout"], "cost": SampleCost(*state["layout"]["cost"])}), state["steps"])
