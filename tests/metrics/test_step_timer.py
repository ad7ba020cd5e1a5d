"""Phases of a step timer."""

import numpy as np
import pytest
import torch

from internvl.metrics.step_timer import NOT_OF_STEP, StepTimer


def test_phases_add_up_to_the_elapsed_time():
    timer = StepTimer(torch.device("cpu"))
    assert timer.take() == {}
    timer.mark("data")
    start = timer.marks[0][1]
    for phase in ("forward", "backward", "forward", "backward"):
        timer.mark(phase)
        np.linalg.inv(np.eye(200) + 1)
    seconds = timer.take()
    assert seconds.keys() == {"data", "forward", "backward"} and min(seconds.values()) > 0
    assert sum(seconds.values()) == pytest.approx(timer.marks[0][1] - start)
    assert timer.take().keys() == {"backward"}, "the phase continues"


def test_evaluation_counts_neither_as_step_nor_as_wait():
    timer = StepTimer(torch.device("cpu"))
    timer.mark("data")
    timer.mark(NOT_OF_STEP)
    start = timer.marks[0][1]
    np.linalg.inv(np.eye(200) + 1)
    timer.mark("other")
    end = timer.marks[0][1]
    seconds = timer.take()
    assert seconds.keys() == {"data", "other"} and sum(seconds.values()) < (end - start) / 2
