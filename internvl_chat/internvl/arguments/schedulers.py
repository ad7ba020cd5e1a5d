"""Learning rate schedulers: which of transformers' are supported, with which arguments."""

import inspect
import math

import torch
import transformers
from transformers import get_scheduler, optimization
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

# Schedulers that change the rate after evaluations, by the metric of the best model. Their classes have the arguments.
NEED_METRIC: dict[SchedulerType, type] = {
    SchedulerType.REDUCE_ON_PLATEAU: torch.optim.lr_scheduler.ReduceLROnPlateau,
    SchedulerType.GREEDY: optimization.GreedyLR,
}
# transformers drops the arguments of these
TAKE_NO_ARGUMENTS = [SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP]
# All others compute the rate from the number of the step.
STEP_SCHEDULERS = tuple(name.value for name in SchedulerType if name not in NEED_METRIC)
SET_BY_TRAINER = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
STEPS_OF_TRIAL = 1000  # if the number of steps is not known yet


def validate_scheduler(args: transformers.TrainingArguments) -> None:
    """Raise a ValueError if an argument of the scheduler is not supported.

    The scheduler is tried on an optimizer with one parameter.
    """
    name, kwargs = SchedulerType(args.lr_scheduler_type), args.lr_scheduler_kwargs or {}
    assert isinstance(kwargs, dict)  # parsed
    for key, value in kwargs.items():
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise ValueError(f"--lr_scheduler_kwargs {key!r:.80} {value} is invalid: expected a number >= 0.")
    known = list_scheduler_arguments(name)
    if unknown := [key for key in kwargs if key not in known]:
        expected = f"expected arguments among {', '.join(known)}" if known else "it takes no arguments"
        raise ValueError(
            f"--lr_scheduler_kwargs {unknown[0]!r:.80} is not supported with --lr_scheduler_type {name.value}: "
            f"{expected}."
        )
    required = [key for key, parameter in known.items() if parameter.default is parameter.empty]
    if missing := [key for key in required if key not in kwargs]:
        raise ValueError(
            f"--lr_scheduler_type {name.value} requires --lr_scheduler_kwargs with {' and '.join(missing)}, such as "
            f"'{{\"{missing[0]}\": 100}}'."
        )
    given = f"--lr_scheduler_type {name.value} with --lr_scheduler_kwargs {kwargs!s:.200} is invalid"
    try:
        if name in NEED_METRIC:
            get_scheduler(name, make_optimizer(args), scheduler_specific_kwargs=kwargs)
            return
        factors = compute_lr_factors(args, name, kwargs)
        invalid = [factor for factor in factors if not 0 <= factor <= 1 + 1e-9]  # nan is, too
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{given}: {error}.") from error
    if invalid:
        raise ValueError(f"{given}: a learning rate would be {invalid[0]:g} * --learning_rate.")


def list_scheduler_arguments(name: SchedulerType) -> dict[str, inspect.Parameter]:
    """List what a scheduler takes in --lr_scheduler_kwargs."""
    if name in TAKE_NO_ARGUMENTS:
        return {}
    parameters = inspect.signature(NEED_METRIC.get(name, TYPE_TO_SCHEDULER_FUNCTION[name])).parameters
    return {key: parameter for key, parameter in parameters.items() if key not in SET_BY_TRAINER}


def make_optimizer(args: transformers.TrainingArguments) -> torch.optim.Optimizer:
    """Make an optimizer with one parameter."""
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)


def compute_lr_factors(args: transformers.TrainingArguments, name: SchedulerType, kwargs: dict) -> list[float]:
    """Compute the rate relative to --learning_rate, at about 100 steps of a run."""
    num_steps = args.max_steps if args.max_steps > 0 else STEPS_OF_TRIAL
    scheduler = get_scheduler(name, make_optimizer(args), args.get_warmup_steps(num_steps), num_steps, kwargs)
    (compute_factor,) = scheduler.lr_lambdas
    return [compute_factor(step) for step in (*range(0, num_steps, -(-num_steps // 100)), num_steps)]
