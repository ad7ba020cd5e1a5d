"""Answers of the base model: recorded once, by the base model, with its own loss at first."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from helpers.lora_models import add_lora, randomize_adapters
from helpers.samples import make_turns
from helpers.tiny_models import build_tiny_model

from internvl.arguments.data import DataTrainingArguments
from internvl.data.images import NORMALIZATION_STATS
from internvl.data.schema import load_meta
from internvl.evaluation.base_answers import get_base_answers_dir, name_file, prepare_base_answers
from internvl.evaluation.evaluation_data import open_evaluation_data
from internvl.evaluation.settings import EvaluationSettings
from internvl.evaluation.token_losses import measure_token_losses, summarize_token_losses
from internvl.model.lora import is_adapter_parameter

MEAN, STD = NORMALIZATION_STATS["imagenet"]
SETTINGS = EvaluationSettings(512, 16, 2, 5, None, MEAN, STD)
DATA_ARGS = DataTrainingArguments(
    conv_style="internvl2_5", force_image_size=56, dynamic_image_size=True, use_thumbnail=True, max_dynamic_patch=4
)
SYSTEM = {"from": "system", "value": "Be brief."}
RECORDS = [
    {"conversations": make_turns("Who are you?")},
    {"conversations": [SYSTEM, *make_turns("Why?", "So.", "And you?", "This answer is ignored.")]},
    {"id": 7, "image": "a.png", "conversations": make_turns("What is it?", "Ignored.")},
]


@pytest.fixture
def tokenizer(make_dataset):
    return make_dataset(*RECORDS, max_length=512).tokenizer  # also writes data.jsonl and a.png


@pytest.fixture
def meta(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    own = {"conversations": make_turns("Recorded?", "Elsewhere.")}
    (tmp_path / "own.jsonl").write_text(json.dumps(own))
    recorded = {"root": "", "annotation": str(tmp_path / "own.jsonl"), "split": "base_answers"}
    prompts = {"root": str(tmp_path), "annotation": str(tmp_path / "data.jsonl")}
    (tmp_path / "meta.json").write_text(json.dumps({"general": prompts, "recorded": recorded}))
    return tmp_path / "meta.json"


@pytest.fixture
def model():
    """A model with fresh adapters, which have no effect yet."""
    model = build_tiny_model("qwen2")
    add_lora(model, "both", dropout=0.3)
    model.mlp1.requires_grad_(False)
    return model.train()


def prepare(model, tokenizer, meta, has_trained=False, **changes) -> dict:
    output_dir, settings = meta.parent / "out", replace(SETTINGS, **changes)
    return prepare_base_answers(model, tokenizer, str(meta), output_dir, DATA_ARGS, settings, has_trained)


def read_records(entry: dict) -> list[dict]:
    with open(entry["annotation"]) as file:
        return [json.loads(line) for line in file]


def measure_forgetting(model, tokenizer, entries: dict) -> float:
    data = open_evaluation_data(entries, DATA_ARGS, tokenizer, model.num_image_token)
    model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    metrics = summarize_token_losses(data, measure_token_losses(model, data, SETTINGS))
    assert "loss" not in metrics  # the overall loss is without the base model's answers
    return metrics["forgetting"]


def test_answers_are_those_of_the_model_without_adapters(model, tokenizer, meta):
    base = build_tiny_model("qwen2").eval()
    config = {"max_new_tokens": 5, "do_sample": False}
    expected = [base.chat(tokenizer, None, "Who are you?", config)]
    base.system_message = "Be brief."
    expected.append(base.chat(tokenizer, None, "And you?", config, [("Why?", "So.")]))
    randomize_adapters(model, std=0.5)
    entries = prepare(model, tokenizer, meta)
    assert list(entries) == ["recorded", "general"]
    records = read_records(entries["general"])
    assert [record["conversations"][-1] for record in records[:2]] == [
        {"from": "gpt", "value": a.rstrip("\ufffd")} for a in expected
    ]
    assert records[1]["conversations"][:-1] == RECORDS[1]["conversations"][:-1]
    assert records[2]["image"] == "a.png" and len(records[2]["conversations"]) == 2
    assert "Ignored." not in str(records)
    assert all(module.training for module in model.modules())


def test_forgetting_is_the_loss_of_the_base_model_and_training_raises_it(model, tokenizer, meta):
    base = build_tiny_model("qwen2")
    entries = prepare(model, tokenizer, meta)
    at_first = measure_forgetting(model, tokenizer, entries)
    assert at_first == pytest.approx(measure_forgetting(base, tokenizer, entries), abs=1e-6)
    ids = torch.randint(3, 1000, (1, 40), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids, position_ids=torch.arange(40)[None]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert measure_forgetting(model, tokenizer, entries) > at_first + 0.05


def test_a_run_that_resumes_finds_the_answers(model, tokenizer, meta, monkeypatch):
    before = prepare(model, tokenizer, meta)
    folder = get_base_answers_dir(meta.parent / "out")
    assert load_meta(str(folder / "meta.json")) == {"general": before["general"]}
    assert not list(folder.glob("*.unfinished"))
    texts = read_records(before["general"])
    monkeypatch.setattr(model, "generate", None)  # it is not asked again
    assert prepare(model, tokenizer, meta, has_trained=True) == before
    # In a folder that was moved since.
    (meta.parent / "out").rename(meta.parent / "moved")
    meta.parent.joinpath("out").symlink_to("elsewhere")
    moved = prepare_base_answers(model, tokenizer, str(meta), meta.parent / "moved", DATA_ARGS, SETTINGS, True)
    assert read_records(moved["general"]) == texts


def test_recorded_answers_serve_other_runs(model, tokenizer, meta, monkeypatch):
    entries = prepare(model, tokenizer, meta)
    monkeypatch.setattr(model, "generate", None)
    file = get_base_answers_dir(meta.parent / "out") / "meta.json"
    other = prepare_base_answers(model, tokenizer, str(file), meta.parent / "other", DATA_ARGS, SETTINGS, True)
    assert other == {"general": entries["general"]} and not (meta.parent / "other").exists()


def test_a_resumed_run_records_with_its_adapters_disabled(model, tokenizer, meta):
    before = read_records(prepare(model, tokenizer, meta)["general"])
    (get_base_answers_dir(meta.parent / "out") / "meta.json").unlink()  # as if killed before it was written
    randomize_adapters(model, std=0.5)
    assert read_records(prepare(model, tokenizer, meta, has_trained=True)["general"]) == before


def test_answers_of_a_base_model_that_is_gone_are_an_error(model, tokenizer, meta):
    model.mlp1.requires_grad_(True)
    prepare(model, tokenizer, meta)  # before the first step it is as loaded
    (get_base_answers_dir(meta.parent / "out") / "meta.json").unlink()
    with pytest.raises(ValueError, match="its own weights have been trained since: pass in --eval_base_answers"):
        prepare(model, tokenizer, meta, has_trained=True)


def test_new_pissa_adapters_belong_to_the_base_model(tokenizer, meta):
    base = build_tiny_model("qwen2")
    expected = read_records(prepare(base, tokenizer, meta)["general"])
    model = build_tiny_model("qwen2")
    model.wrap_llm_lora(r=4, lora_alpha=8, variant="pissa")
    assert all(is_adapter_parameter(name) for name, p in model.language_model.named_parameters() if p.requires_grad)
    model.vision_model.requires_grad_(False)
    model.mlp1.requires_grad_(False)
    assert read_records(prepare(model, tokenizer, meta)["general"]) == expected
    (get_base_answers_dir(meta.parent / "out") / "meta.json").unlink()
    with pytest.raises(ValueError, match="PiSSA has changed its weights"):
        prepare(model, tokenizer, meta, has_trained=True)


def test_unusable_prompts_and_answers_are_left_out_and_reported(model, tokenizer, meta, tmp_path, caplog, monkeypatch):
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, [*RECORDS, {"conversations": []}])))
    with pytest.raises(ValueError, match="(?s)1 samples are unusable.*line 4.*at least one turn"):
        prepare(model, tokenizer, meta)
    texts = iter(["Fine.", "An <image>.", "Cut \ufffd"])
    monkeypatch.setattr(
        type(model), "batch_chat", lambda self, tokenizer, tiles, questions, *a, **k: [next(texts) for _ in questions]
    )
    monkeypatch.setattr(DATA_ARGS, "max_bad_samples", 1)
    with caplog.at_level(logging.INFO):
        entries = prepare(model, tokenizer, meta)
    assert sorted(record["conversations"][-1]["value"] for record in read_records(entries["general"])) == [
        "Cut ",
        "Fine.",
    ]
    assert "Base answers: 2 of 3 recorded in" in caplog.text
    assert "Skipped sample: general line 4" in caplog.text


def test_num_samples_limits_the_prompts(model, tokenizer, meta):
    assert len(read_records(prepare(model, tokenizer, meta, num_samples=2)["general"])) == 2


def test_file_names_are_those_of_datasets_where_possible():
    assert name_file("llava-150k_v1.5", 3) == "llava-150k_v1.5.jsonl"
    assert [name_file(name, 3) for name in ("a/b", "..", "数据", "x" * 101, "meta.json x")] == ["dataset-3.jsonl"] * 5
