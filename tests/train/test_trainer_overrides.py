"""Private methods of transformers that the trainer overrides or calls."""

import inspect

import pytest
from transformers import Trainer

from internvl.train.trainer import InternVLTrainer

OVERRIDDEN = {
    "_prepare_inputs": ["self", "inputs"],
    "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_evaluate": ["self", "trial", "ignore_keys_for_eval", "skip_scheduler"],
    "_determine_best_metric": ["self", "metrics", "trial"],
    "_load_best_model": ["self"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_get_output_dir": ["self", "trial"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_rng_state": ["self", "checkpoint"],
}


@pytest.mark.parametrize(("name", "parameters"), OVERRIDDEN.items())
def test_private_method_of_transformers_has_not_moved(name, parameters):
    assert hasattr(Trainer, name), f"transformers has moved Trainer.{name}"
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == parameters, f"Trainer.{name} has changed"


def test_no_other_private_method_is_overridden():
    own = {name for name, value in vars(InternVLTrainer).items() if name.startswith("_") and callable(value)}
    assert {name for name in own if hasattr(Trainer, name) and not name.startswith("__")} == set(OVERRIDDEN)


def test_the_trainer_is_one_level_below_transformers():
    assert InternVLTrainer.__bases__ == (Trainer,)
