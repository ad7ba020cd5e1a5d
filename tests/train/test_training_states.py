"""States are loaded by parameter; hyperparameters and rates are those of the run that loads them."""

import pytest
import torch
from transformers import get_scheduler

from internvl.train.training_states import assign_states, keep_hyperparameters, set_scheduler_step


def build_parameters() -> list[torch.nn.Parameter]:
    """Build parameters that differ in shape."""
    return [torch.nn.Parameter(torch.full((size,), 1.0)) for size in (1, 2, 3)]


def build_groups(parameters, *places: list[int], **settings) -> list[dict]:
    return [{"params": [parameters[index] for index in group], **settings} for group in places]


def take_step(optimizer: torch.optim.Optimizer, parameters) -> None:
    for scale, parameter in enumerate(parameters, 1):
        parameter.grad = torch.full_like(parameter, scale)
    optimizer.step()


def test_states_follow_their_parameters_into_other_groups():
    parameters = build_parameters()
    before = torch.optim.AdamW(build_groups(parameters, [0, 2], [1], lr=1e-3, weight_decay=0.1))
    take_step(before, parameters)
    saved = before.state_dict()
    after = torch.optim.AdamW(build_groups(parameters, [1], [2], [0], lr=1e-4, weight_decay=0.2, betas=(0.5, 0.6)))
    after.load_state_dict(assign_states(saved, before.param_groups, after))
    for parameter in parameters:
        assert torch.equal(after.state[parameter]["exp_avg"], before.state[parameter]["exp_avg"])
    assert {(g["lr"], g["weight_decay"], g["betas"]) for g in after.param_groups} == {(1e-4, 0.2, (0.5, 0.6))}


def test_states_of_other_groups_are_refused():
    parameters = build_parameters()
    optimizer = torch.optim.AdamW(build_groups(parameters, [0, 1, 2]))
    with pytest.raises(ValueError, match=r"groups of \[3\] parameters, but its flags give \[1, 2\]"):
        assign_states(optimizer.state_dict(), build_groups(parameters, [0], [1, 2]), optimizer)


def test_hyperparameters_outlast_a_block_that_loads_others():
    parameters = build_parameters()
    optimizer = torch.optim.SGD(build_groups(parameters, [0], [1, 2], lr=0.5, momentum=0.9))
    other = torch.optim.SGD(build_groups(build_parameters(), [0], [1, 2], lr=3, momentum=0.1))
    with keep_hyperparameters(optimizer):
        optimizer.load_state_dict(other.state_dict())
    assert {(group["lr"], group["momentum"]) for group in optimizer.param_groups} == {(0.5, 0.9)}


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine", "polynomial", "inverse_sqrt"])
def test_rates_are_bit_equal_to_those_of_an_unbroken_schedule(name):
    def build():
        parameters = build_parameters()
        optimizer = torch.optim.AdamW(
            [*build_groups(parameters, [0], lr=3e-4), *build_groups(parameters, [1], lr=7e-5)]
        )
        return parameters, optimizer, get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=9)

    parameters, optimizer, scheduler = build()
    rates = []
    for _ in range(9):
        rates.append([group["lr"] for group in optimizer.param_groups])
        take_step(optimizer, parameters)
        scheduler.step()
    for step in range(9):
        parameters, optimizer, scheduler = build()
        set_scheduler_step(scheduler, step)
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups] == rates[step]
