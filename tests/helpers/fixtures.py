"""Fixtures of the training tests: small data sets with real files, a tiny checkpoint, its parts, its command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.samples import tokenizer_of
from helpers.training_runs import copy_model, flags_of, without_image_tokens, write_meta
from PIL import Image

from internvl.arguments.training import DataTrainingArguments, parse_args
from internvl.arguments.validate import validate_arguments
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.model.internvl_chat import InternVLChatModel
from internvl.train.build_model import build_model, build_tokenizer


@pytest.fixture
def make(tmp_path, goldens):
    """A data set of the given records; a.png (60 x 40), b.jpg (28 x 90) and a video folder `film` lie beside."""
    noise = Image.effect_noise((60, 40), 80).convert("RGB")
    noise.save(tmp_path / "a.png")
    noise.resize((28, 90)).save(tmp_path / "b.jpg")
    (tmp_path / "text.png").write_text("not a picture")
    for whole in ("a.png", "b.jpg"):
        content = (tmp_path / whole).read_bytes()
        (tmp_path / f"half_{whole}").write_bytes(content[: len(content) // 2])
    (tmp_path / "film").mkdir()
    for k in range(20):
        noise.save(tmp_path / "film" / f"frame_{k}.png")

    def make(*records, max_length=400, meta=None, seed=0, kind=LazySupervisedDataset, **data_args):
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (tmp_path / "data.jsonl").write_text("\n".join(lines))
        flags = {"conv_style": "internvl2_5", "force_image_size": 28, "dynamic_image_size": True, "use_thumbnail": True}
        entry = {"root": str(tmp_path), "annotation": str(tmp_path / "data.jsonl")} | (meta or {})
        tokenizer = tokenizer_of(goldens / "tokenizer", max_length)
        return kind("mine", entry, tokenizer, 4, DataTrainingArguments(**flags | data_args), seed)

    return make


@pytest.fixture(scope="session")
def tiny(goldens, tmp_path_factory) -> Path:
    """A checkpoint folder (model, tokenizer) and a meta file of real images and conversations."""
    folder = tmp_path_factory.mktemp("tiny")
    copy_model(goldens, folder)
    records = [json.loads(line) for line in (goldens / "dataset/ds_main.jsonl").read_text().splitlines()]
    good = [record for record in records if record["conversations"][-1]["value"]]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, good)))
    write_meta(folder, goldens / "dataset/images")
    return folder


@pytest.fixture(scope="session")
def parts(tiny, tmp_path_factory) -> Path:
    """The tiny checkpoint in parts, as they are published: `vit`, `llm` (its head tied to its embedding, its tokenizer
    without image tokens) and `mlp_projector.pth`."""
    folder = tmp_path_factory.mktemp("parts")
    model = InternVLChatModel.from_pretrained(tiny / "model")
    model.vision_model.save_pretrained(folder / "vit")
    torch.save(model.mlp1.state_dict(), folder / "mlp_projector.pth")
    llm = model.language_model
    llm.config.tie_word_embeddings = True
    llm.tie_weights()
    llm.save_pretrained(folder / "llm")
    for file in (tiny / "model").glob("*token*"):
        shutil.copy(file, folder / "llm")
    without_image_tokens(folder / "llm")
    return folder


@pytest.fixture
def parse(tiny, tmp_path, monkeypatch):
    """Flags -> the three argument objects of a run on the tiny checkpoint with these flags."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny / "cache"))

    def parse(*flags: str):
        return parse_args([*flags_of(tiny, tmp_path / "out"), *flags])

    return parse


@pytest.fixture
def build(parse):
    def build(*flags: str) -> InternVLChatModel:
        model_args, data_args, training_args = parse(*flags)
        validate_arguments(model_args, data_args, training_args)
        return build_model(model_args, data_args, training_args, build_tokenizer(model_args, data_args))

    return build


@pytest.fixture
def peak():
    """A function that tells by how many bytes the memory of this process ever grew since the one before."""

    def of(field: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

    def reset() -> int:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return of("VmRSS")

    before = [reset()]

    def grown() -> int:
        most, before[0] = of("VmHWM") - before[0], reset()
        return most

    return grown
