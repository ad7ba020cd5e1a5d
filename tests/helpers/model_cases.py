"""A reference case of the model package, and how its numbers are compared."""

import json
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from internvl.model.internvl_chat import InternVLChatModel

ARCHIVE = Path(__file__).parents[1] / "goldens.tar.xz"
torch.set_num_threads(1)  # models this small only lose by more

REAL_CONFIGS = sorted((ARCHIVE.parent / "real_configs").glob("internvl*.json"))


class Case:
    """One folder of goldens/models: a checkpoint, its inputs and the numbers upstream computed with it."""

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
        """The padded batch, as the goldens were computed: with a mask, without positions."""
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
        """The samples end to end in one row: positions restart, there is no mask."""
        row = self.read("packed_inputs.safetensors")
        row = {k: row[k] for k in ("input_ids", "labels", "position_ids")}
        return {**row, "pixel_values": self.inputs["pixel_values"], "image_flags": self.inputs["image_flags"]}


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 5e-5, rtol: float = 1e-4):
    """At the tolerances of the goldens' description."""
    torch.testing.assert_close(found.float(), expected.float(), atol=atol, rtol=rtol)


def gradient_norms(model) -> dict[str, float | None]:
    return {n: None if p.grad is None else p.grad.norm().item() for n, p in model.named_parameters()}


def check_norms(found: dict, expected: dict, rtol: float = 1e-4, atol: float = 1e-7):
    assert found.keys() == expected.keys()
    assert {n for n, v in found.items() if v is None} == {n for n, v in expected.items() if v is None}
    for name, norm in expected.items():
        assert norm is None or found[name] == pytest.approx(norm, rel=rtol, abs=atol), name
