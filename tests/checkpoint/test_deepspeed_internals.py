"""The installed DeepSpeed has the private names that are used."""

import inspect
from importlib import import_module

import pytest

from internvl.checkpoint.deepspeed_internals import PRIVATE_FUNCTIONS, PRIVATE_NAMES


def import_name(path: str):
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in PRIVATE_NAMES.items() for name in names])
def test_private_attribute_exists(path, name):
    cls = import_name(path)
    # Some attributes exist only in instances: look for their assignment in the source of the class and its bases.
    sources = [inspect.getsource(base) for base in cls.__mro__ if base.__module__.startswith("deepspeed")]
    assert hasattr(cls, name) or any(f"self.{name}" in source for source in sources), f"DeepSpeed has moved {name}"


@pytest.mark.parametrize("path", PRIVATE_FUNCTIONS)
def test_private_function_exists(path):
    assert callable(import_name(path)), f"DeepSpeed has moved {path}"
