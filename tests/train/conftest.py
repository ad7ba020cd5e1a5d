"""A maker of small data sets with real files."""

import json

import pytest
from PIL import Image
from samples import tokenizer_of

from internvl.train.arguments import DataTrainingArguments
from internvl.train.dataset import LazySupervisedDataset


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

    def make(*records, max_length=400, meta=None, seed=0, **data_args) -> LazySupervisedDataset:
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (tmp_path / "data.jsonl").write_text("\n".join(lines))
        flags = {"conv_style": "internvl2_5", "force_image_size": 28, "dynamic_image_size": True, "use_thumbnail": True}
        entry = {"root": str(tmp_path), "annotation": str(tmp_path / "data.jsonl")} | (meta or {})
        tokenizer = tokenizer_of(goldens / "tokenizer", max_length)
        return LazySupervisedDataset("mine", entry, tokenizer, 4, DataTrainingArguments(**flags | data_args), seed)

    return make
