"""Reference cases of the model package, and comparisons of their numbers."""

import json
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from internvl.model.internvl_chat import InternVLChatModel

torch.set_num_threads(1)  # more threads slow down models this small


class ModelCase:
    """A folder of goldens/models: a checkpoint, its inputs and upstream's results."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text())
        self.base = folder.parent / self.meta.get("base", folder.name)

    def read(self, name: str):
        path = self.folder / name
        return json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)

    @cached_property
    def inputs(self) -> dict:
        return load_file(self.base / "inputs.safetensors")

    @cached_property
    def batch(self) -> dict:
        """The padded batch of the goldens: with a mask, without positions."""
        return {k: self.inputs[k] for k in ("pixel_values", "input_ids", "attention_mask", "labels", "image_flags")}

    @cached_property
    def expected(self) -> dict:
        return self.read("expected.safetensors")

    def model(self, subfolder: str = "", **kwargs) -> InternVLChatModel:
        model = InternVLChatModel.from_pretrained(self.folder / subfolder, **kwargs)
        model.img_context_token_id = self.meta["img_context_token_id"]
        return model

    @property
    def packed_batch(self) -> dict:
        """The same samples in one packed row, without a mask."""
        row = self.read("packed_inputs.safetensors")
        row = {k: row[k] for k in ("input_ids", "labels", "position_ids")}
        return {**row, "pixel_values": self.inputs["pixel_values"], "image_flags": self.inputs["image_flags"]}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 5e-5, rtol: float = 1e-4):
    """Compare tensors with the tolerances that the goldens were recorded for."""
    torch.testing.assert_close(actual.float(), expected.float(), atol=atol, rtol=rtol)


def get_gradient_norms(model) -> dict[str, float | None]:
    return {n: None if p.grad is None else p.grad.norm().item() for n, p in model.named_parameters()}


def assert_norms_close(actual: dict, expected: dict, rtol: float = 1e-4, atol: float = 1e-7):
    assert actual.keys() == expected.keys()
    assert {n for n, v in actual.items() if v is None} == {n for n, v in expected.items() if v is None}
    for name, norm in expected.items():
        assert norm is None or actual[name] == pytest.approx(norm, rel=rtol, abs=atol), name
