"""Evaluation sets: where they come from, their samples, unusable ones, records that are also trained."""

import json
import logging
import shutil
from itertools import chain

import numpy as np
import pytest
import torch
from helpers.samples import make_turns
from PIL import Image

from internvl.data.preference_dataset import PreferenceDataset
from internvl.data.schema import METRIC_NAMES, SCORERS, load_meta
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.evaluation import scores
from internvl.evaluation.evaluation_data import EvaluationSet, build_evaluation_data, open_evaluation_data
from internvl.train.build_data import build_data, build_evaluation
from internvl.train.build_model import build_tokenizer

TEXTS = [{"conversations": make_turns(f"What is {n}?", f"It is {n}.")} for n in range(40)]


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a meta file, and returns its path.

    Its arguments: the name of the file, and name of a dataset -> (records, further meta keys).
    """
    noise = Image.effect_noise((60, 40), 80).convert("RGB")
    noise.save(tmp_path / "a.png")
    (tmp_path / "frames").mkdir()
    for index in range(20):
        Image.new("RGB", (56, 56), (index * 10, 0, 0)).save(tmp_path / "frames" / f"frame_{index}.png")

    def write(file: str, **datasets) -> str:
        meta = {}
        for name, (records, entry) in datasets.items():
            path = tmp_path / f"{file}-{name}.jsonl"
            path.write_text("\n".join(json.dumps(record) for record in records))
            meta[name] = {"root": str(tmp_path), "annotation": str(path), **entry}
        (tmp_path / f"{file}.json").write_text(json.dumps(meta))
        return str(tmp_path / f"{file}.json")

    return write


@pytest.fixture
def build(parse_flags):
    """Return a function that builds training and evaluation data from flags."""

    def build(*flags: str, kind=LazySupervisedDataset):
        model_args, data_args, training_args = parse_flags(*flags)
        parts = data_args, training_args, build_tokenizer(model_args, data_args), 4
        data = build_data(*parts, kind)
        return data, build_evaluation(data, *parts, kind)

    return build


def test_metrics_of_the_schema_are_those_that_are_computed():
    assert set(METRIC_NAMES) == scores.METRICS.keys()
    assert SCORERS == (scores.INTERNVL_SCORER,)


def test_sets_come_from_three_sources(build, write):
    train = write("train", a=(TEXTS, {"metric": "anls", "repeat_time": 2}), b=(TEXTS[:5], {"split": "eval"}))
    evaluated = write("eval", c=(TEXTS[5:8], {"metric": "relaxed_accuracy", "scorer": "internvl"}), d=(TEXTS[:2], {}))
    data, evaluation = build("--meta_path", train, "--eval_meta_path", evaluated, "--eval_share", "0.3")
    held_out = len(data.held_out[0].dataset)
    assert evaluation.sets == [
        EvaluationSet("c", "relaxed_accuracy", "internvl"),
        EvaluationSet("d"),
        EvaluationSet("b"),
        EvaluationSet("a", "anls"),
    ]
    assert [len(evaluation.list_samples(n)) for n in range(4)] == [3, 2, 5, held_out] and held_out > 0
    assert [dataset.ds_name for dataset in data.dataset.datasets] == ["a"]
    assert len(data.lengths) == 2 * (40 - held_out)
    assert len(evaluation.lengths) == len(evaluation.content_hashes) == len(evaluation.dataset) == 10 + held_out


def test_no_source_is_no_evaluation(build, write):
    assert build("--meta_path", write("train", a=(TEXTS, {"metric": "anls"})))[1] is None


def test_training_without_a_trained_dataset_is_refused(build, write):
    with pytest.raises(ValueError, match="has no dataset to train: each has a split for evaluation"):
        build("--meta_path", write("train", a=(TEXTS, {"split": "eval"})))


@pytest.mark.parametrize("other", ["eval", "base_answers", "train"])
def test_all_datasets_of_a_meta_file_are_opened_whatever_their_split(parse_flags, write, other):
    meta = load_meta(write("eval", a=(TEXTS, {}), b=(TEXTS, {"split": other, "repeat_time": 0.1, "metric": "anls"})))
    model_args, data_args, _ = parse_flags()
    data = open_evaluation_data(meta, data_args, build_tokenizer(model_args, data_args), 4)
    expected = EvaluationSet("b", split="base_answers") if other == "base_answers" else EvaluationSet("b", "anls")
    assert data.sets == [EvaluationSet("a"), expected]
    assert [len(data.list_samples(n)) for n in range(2)] == [40, 40]


@pytest.mark.parametrize(
    ("split", "flag", "message"),
    [
        ("eval", "--eval_meta_path", "evaluation set a is in --meta_path and in --eval_meta_path: rename or remove"),
        ("eval", "--eval_base_answers", "evaluation set a is in --meta_path and in --eval_base_answers: rename or"),
        ("train", "--eval_meta_path", "evaluation set a is in --eval_meta_path and in --eval_share: rename or remove"),
    ],
)
def test_two_sets_of_one_name_are_refused(build, write, split, flag, message):
    train, other = write("train", a=(TEXTS, {"split": split}), b=(TEXTS, {})), write("eval", a=(TEXTS, {}))
    with pytest.raises(ValueError, match=message):
        build("--meta_path", train, flag, other, "--eval_share", "0.3")


@pytest.mark.parametrize("source", ["file", "share"])
def test_samples_are_the_same_in_every_epoch(build, write, source):
    """No augmentation, middle frames of videos, each record once; lengths as measured."""
    records = [{"image": "a.png", "conversations": make_turns(f"<image>\nQ{n}", "A.")} for n in range(20)]
    records += [{"video": "frames", "conversations": make_turns(f"<video>\nQ{n}", "A.")} for n in range(20)]
    entry = {"data_augment": True, "repeat_time": 2.5}
    flags = "--min_num_frame", "4", "--max_num_frame", "4"
    if source == "file":
        flags += "--meta_path", write("train", t=(TEXTS, {})), "--eval_meta_path", write("eval", a=(records, entry))
    else:
        flags += "--meta_path", write("train", a=(records, entry)), "--eval_share", "0.5"
    data, evaluation = build(*flags)
    num_samples = len(evaluation.lengths)
    assert num_samples == 40 if source == "file" else 5 < num_samples < 35
    for sample in range(num_samples):
        rows = [evaluation.dataset[epoch, sample] for epoch in (0, 1, 2)]
        assert all(torch.equal(row["pixel_values"], rows[0]["pixel_values"]) for row in rows)
        sizes = len(rows[0]["input_ids"]), (rows[0]["labels"] != -100).sum(), len(rows[0]["pixel_values"])
        assert sizes == evaluation.lengths[sample].item()
        if "video" in evaluation.dataset.datasets[0].read_record(sample):
            assert rows[0]["pixel_values"][:, 0, 0, 0].tolist() == [20, 70, 120, 170]  # of 5 frames each, the third
    trained = data.dataset.datasets[0]
    assert (trained.data_augment, trained.frame_sampling) == (source == "share", "rand"), "training is as before"


def test_truncated_samples_are_counted(build, write):
    long = {"conversations": make_turns("What?", "word " * 900)}
    flags = "--meta_path", write("train", t=(TEXTS, {})), "--eval_meta_path", write("eval", a=([*TEXTS, long], {}))
    _, evaluation = build(*flags)
    assert np.count_nonzero(evaluation.lost_loss_tokens) == 1 and evaluation.lengths["tokens"].max() == 512


# -- unusable samples --------------------------------------------------------------------------------------------------

CHOICES = {"A": "red", "B": "blue"}
ASKED = make_turns("What?", "A")
# metric -> record that it can score, changes after which it cannot, reason
UNSCORABLE = {
    "anls": ({}, {"answers": []}, "expected a list of at least one reference"),
    "cer": ({"answers": ["a", "b"]}, {"answers": ["a", 3]}, "reference 3 is not a text"),
    "multiple_choice": ({"choices": CHOICES}, {"choices": None}, "lacks 'choices'"),
    "box_iou": (
        {"answers": [[0, 0, 5, 5]], "width": 10, "height": 10},
        {"width": None},
        "lacks 'width'",
    ),
    "number": ({"answers": ["3"], "answer_type": "integer"}, {"answer_type": None}, "lacks 'answer_type'"),
}


@pytest.mark.parametrize("metric", UNSCORABLE)
def test_records_that_their_metric_cannot_score_are_skipped(build, write, metric, caplog):
    caplog.set_level(logging.WARNING)
    good, change, reason = UNSCORABLE[metric]
    records = [{"conversations": ASKED, **good}] * 3 + [{"conversations": ASKED, **good, **change}]
    flags = "--meta_path", write("train", t=(TEXTS, {})), "--eval_meta_path"
    _, evaluation = build(*flags, write("eval", a=(records, {"metric": metric})), "--max_bad_samples", "1")
    assert evaluation.list_samples(0) == [0, 1, 2] and [skipped.line for skipped in evaluation.skipped_samples] == [4]
    (message,) = [message for message in caplog.messages if message.startswith("Skipped sample: a line 4 (")]
    assert f"metric {metric} cannot score it: {reason}" in message
    with pytest.raises(ValueError, match="1 evaluation samples are unusable, --max_bad_samples allows 0; fix or"):
        build(*flags, write("eval", a=(records, {"metric": metric})))
    _, evaluation = build(*flags, write("eval", a=(records, {})))
    assert len(evaluation.list_samples(0)) == 4, "without a metric these keys have no effect"


def test_questions_that_cannot_be_asked_are_skipped(build, write):
    two_gpt_turns = [*ASKED, ASKED[1], ASKED[0], ASKED[1]]
    records = [{"conversations": ASKED}, {"conversations": two_gpt_turns}]
    flags = "--meta_path", write("train", t=(TEXTS, {})), "--eval_meta_path"
    _, evaluation = build(*flags, write("eval", a=(records, {"metric": "anls"})), "--max_bad_samples", "1")
    assert evaluation.list_samples(0) == [0] and "alternate" in evaluation.skipped_samples[0].reason


def test_missing_images_are_unusable_as_in_training(build, write):
    records = [*TEXTS, {"image": "absent.png", "conversations": make_turns("What?", "A.")}]
    flags = "--meta_path", write("train", t=(TEXTS, {})), "--eval_meta_path", write("eval", a=(records, {}))
    with pytest.raises(ValueError, match=r"1 evaluation samples are unusable(.|\n)*line 41 .*absent.png does not"):
        build(*flags)
    _, evaluation = build(*flags, "--max_bad_samples", "0.1")
    assert len(evaluation.list_samples(0)) == 40


def test_set_without_a_usable_sample_is_refused(build, write):
    bad = [{"image": "absent.png", "conversations": make_turns("What?", "A.")}]
    evaluated = write("eval", a=(TEXTS, {}), b=(bad, {}))
    with pytest.raises(ValueError, match="evaluation set b has no usable sample"):
        build("--meta_path", write("train", t=(TEXTS, {})), "--eval_meta_path", evaluated, "--max_bad_samples", "5")


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"split": "test"}, "split must be one of train, eval, base_answers, got 'test'"),
        ({"split": ["eval"]}, r"split must be one of train, eval, base_answers, got \['eval'\]"),
        ({"metric": "accuracy"}, "metric must be one of exact_match, vqa_accuracy, anls, .*, cer, wer, got 'accuracy'"),
        ({"metric": ["anls"]}, "metric must be one of"),
        ({"scorer": "vlmevalkit"}, "scorer must be internvl, got 'vlmevalkit'"),
    ],
)
@pytest.mark.parametrize("flag", ["--meta_path", "--eval_meta_path", "--eval_base_answers"])
def test_invalid_meta_keys(build, write, entry, expected, flag):
    files = {"--meta_path": write("train", a=(TEXTS, {})), flag: write("eval", b=(TEXTS, entry))}
    with pytest.raises(ValueError, match=f"dataset b: {expected}"):
        build(*chain(*files.items()))


@pytest.mark.parametrize("metric", ["anls", "cider", "cer"])
def test_scorer_of_a_metric_with_one_reading_is_refused(build, write, metric):
    evaluated = write("eval", b=(TEXTS, {"metric": metric, "scorer": "internvl"}))
    message = f"dataset b: scorer internvl is not supported with metric {metric}, whose only reading is .*: remove it."
    with pytest.raises(ValueError, match=message):
        build("--meta_path", write("train", a=(TEXTS, {})), "--eval_meta_path", evaluated)


def test_preference_pairs_have_no_metric(build, write):
    pairs = [{"question": f"What is {n}?", "chosen": "Good.", "rejected": "Bad."} for n in range(8)]
    train = write("train", a=(pairs, {}))
    _, evaluation = build("--meta_path", train, "--eval_share", "0.3", kind=PreferenceDataset)
    assert evaluation.list_samples(0) and isinstance(evaluation.dataset.datasets[0], PreferenceDataset)
    with pytest.raises(ValueError, match="dataset b: metric anls is not supported for preference pairs"):
        evaluated = write("eval", b=(pairs, {"metric": "anls"}))
        build("--meta_path", train, "--eval_meta_path", evaluated, kind=PreferenceDataset)


def test_metric_without_its_library_is_refused_before_anything_is_measured(parse_flags, write, monkeypatch):
    model_args, data_args, args = parse_flags("--eval_meta_path", write("eval", a=(TEXTS, {"metric": "bleu"})))
    monkeypatch.setitem(scores.METRICS, "bleu", scores.METRICS["bleu"]._replace(library="no-such-package"))
    with pytest.raises(ValueError, match="dataset a: metric bleu requires the package no-such-package: python3 -m pip"):
        build_evaluation_data(data_args, args, build_tokenizer(model_args, data_args), 4)


# -- records that are also trained -------------------------------------------------------------------------------------


def find_warnings(caplog) -> list[str]:
    return [message for message in caplog.messages if message.startswith("Evaluation data in the training data")]


def test_identical_records_are_counted(build, write, caplog):
    caplog.set_level(logging.WARNING)
    copies = [{"id": n, "source": "x", **record} for n, record in enumerate(TEXTS[:7])]
    other = [{"conversations": make_turns(f"What is {n}?", "No.")} for n in range(5)]
    train = write("train", a=(TEXTS, {"repeat_time": 3}), b=(TEXTS[5:10], {}), c=(other, {}))
    evaluated = write("eval", e=(copies + other[:1], {}), f=(TEXTS[:1] * 3, {}), g=([{"conversations": ASKED}], {}))
    build("--meta_path", train, "--eval_meta_path", evaluated)
    counts = [message.split(": ")[1].split(",")[0] for message in find_warnings(caplog)]
    assert counts == [
        "7 of 8 records of evaluation set e are also in training dataset a",
        "2 of 8 records of evaluation set e are also in training dataset b",
        "1 of 8 records of evaluation set e are also in training dataset c",
        "3 of 3 records of evaluation set f are also in training dataset a",
    ]
    assert "eval-e.jsonl) = a line 1 (" in find_warnings(caplog)[0]


def test_held_out_records_are_in_no_training_dataset(build, write, caplog):
    caplog.set_level(logging.WARNING)
    build("--meta_path", write("train", a=(TEXTS, {}), b=(TEXTS, {})), "--eval_share", "0.3")
    assert not find_warnings(caplog)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize(("content", "is_shared"), [("same", True), ("other", False), ("linked", True)])
def test_the_files_of_identical_records_are_compared(build, write, tmp_path, caplog, kind, content, is_shared):
    """The same relative path below two roots is the same image if its bytes are."""
    caplog.set_level(logging.WARNING)
    name = {"image": "a.png", "video": "frames"}[kind]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if content == "linked":
        elsewhere.rmdir()
        elsewhere.symlink_to(tmp_path)
    elif kind == "image":
        shutil.copy(tmp_path / name, elsewhere)
    else:
        shutil.copytree(tmp_path / name, elsewhere / name)
    if content == "other":
        Image.new("RGB", (60, 40)).save(elsewhere / (name if kind == "image" else "frames/frame_3.png"))
    records = [{kind: name, "conversations": make_turns("What?", "A.")}]
    evaluated = write("eval", e=(records, {"root": str(elsewhere)}))
    build("--meta_path", write("train", a=(TEXTS + records, {})), "--eval_meta_path", evaluated)
    assert bool(find_warnings(caplog)) == is_shared


def test_hash_collisions_are_not_counted(build, write, caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("internvl.planning.sample_lengths.hash_record", lambda dataset, index: 7)
    evaluated = write("eval", e=([{"conversations": ASKED}], {}))
    build("--meta_path", write("train", a=(TEXTS, {})), "--eval_meta_path", evaluated)
    assert not find_warnings(caplog)
