"""Fixtures of the data and training tests.

They import torch and the package only when a test asks for them: pytest loads this module before it collects tests.
"""

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def make_dataset(tmp_path, goldens):
    """Return a function that builds a data set of the given records.

    Beside the annotation file lie a.png (60 x 40), b.jpg (28 x 90), half of each file as half_a.png and half_b.jpg,
    text.png (not an image) and `frames`, a folder of 20 frames.
    """
    from helpers.samples import load_cached_tokenizer
    from PIL import Image

    from internvl.arguments.data import DataTrainingArguments
    from internvl.data.supervised_dataset import LazySupervisedDataset

    noise = Image.effect_noise((60, 40), 80).convert("RGB")
    noise.save(tmp_path / "a.png")
    noise.resize((28, 90)).save(tmp_path / "b.jpg")
    (tmp_path / "text.png").write_text("not an image")
    for name in ("a.png", "b.jpg"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"half_{name}").write_bytes(content[: len(content) // 2])
    (tmp_path / "frames").mkdir()
    for index in range(20):
        noise.save(tmp_path / "frames" / f"frame_{index}.png")

    def make_dataset(*records, max_length=400, meta=None, seed=0, kind=LazySupervisedDataset, **data_args):
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (tmp_path / "data.jsonl").write_text("\n".join(lines))
        flags = {"conv_style": "internvl2_5", "force_image_size": 28, "dynamic_image_size": True, "use_thumbnail": True}
        entry = {"root": str(tmp_path), "annotation": str(tmp_path / "data.jsonl")} | (meta or {})
        tokenizer = load_cached_tokenizer(goldens / "tokenizer", max_length)
        num_image_token = 4  # per tile; no model is run, so it need not fit the tile size
        return kind("mine", entry, tokenizer, num_image_token, DataTrainingArguments(**flags | data_args), seed)

    return make_dataset


@pytest.fixture(scope="session")
def tiny_inputs(goldens, tmp_path_factory) -> Path:
    """Write the inputs of a tiny training run.

    These are `model` (with its tokenizer), `train.jsonl` and `meta.json`. The images and conversations are those
    of the goldens' main data set, without the sample that has no answer.
    """
    from helpers.training_runs import copy_tiny_model, write_meta_file

    folder = tmp_path_factory.mktemp("tiny")
    copy_tiny_model(goldens, folder)
    records = [json.loads(line) for line in (goldens / "dataset/ds_main.jsonl").read_text().splitlines()]
    answered = [record for record in records if record["conversations"][-1]["value"]]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, answered)))
    write_meta_file(folder, goldens / "dataset/images")
    return folder


@pytest.fixture(scope="session")
def model_parts(tiny_inputs, tmp_path_factory) -> Path:
    """Split the tiny checkpoint into parts as they are published.

    These are `vit`, `llm` and `mlp_projector.pth`. The LLM's head is tied to its embedding, and its tokenizer has
    no image tokens.
    """
    import torch
    from helpers.training_runs import remove_image_tokens

    from internvl.model.internvl_chat import InternVLChatModel

    folder = tmp_path_factory.mktemp("parts")
    model = InternVLChatModel.from_pretrained(tiny_inputs / "model")
    model.vision_model.save_pretrained(folder / "vit")
    torch.save(model.mlp1.state_dict(), folder / "mlp_projector.pth")
    llm = model.language_model
    llm.config.tie_word_embeddings = True
    llm.tie_weights()
    llm.save_pretrained(folder / "llm")
    for file in (tiny_inputs / "model").glob("*token*"):
        shutil.copy(file, folder / "llm")
    remove_image_tokens(folder / "llm")
    return folder


@pytest.fixture
def parse_flags(tiny_inputs, tmp_path, monkeypatch):
    """Return a function that parses flags into the argument objects.

    The flags are added to those of the tiny run.
    """
    from helpers.training_runs import build_run_flags

    from internvl.arguments.training import parse_args

    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))

    def parse_flags(*flags: str):
        return parse_args([*build_run_flags(tiny_inputs, tmp_path / "out"), *flags])

    return parse_flags


@pytest.fixture
def build_from_flags(parse_flags):
    """Return a function that builds the model for a run's flags."""
    from internvl.arguments.validate import validate_arguments
    from internvl.train.build_model import build_model, build_tokenizer

    def build_from_flags(*flags: str):
        model_args, data_args, training_args = parse_flags(*flags)
        validate_arguments(model_args, data_args, training_args)
        return build_model(model_args, data_args, training_args, build_tokenizer(model_args, data_args))

    return build_from_flags


@pytest.fixture
def measure_memory_peak():
    """Return a function that measures the peak growth of memory.

    It returns by how many bytes resident memory grew at most since its previous call. Linux keeps the peak of
    resident memory (VmHWM); writing 5 to `clear_refs` resets it to the present value (VmRSS).
    """

    def read_status(field: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

    def reset_peak() -> int:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return read_status("VmRSS")

    baseline = reset_peak()

    def measure() -> int:
        nonlocal baseline
        growth = read_status("VmHWM") - baseline
        baseline = reset_peak()
        return growth

    return measure
