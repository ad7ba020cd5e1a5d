"""internvl/evaluation/evaluator.py: metrics and files of an evaluation; what it leaves as it was."""

import json
import math
import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from helpers.evaluation_cases import (
    build_noisy_model,
    compute_losses_by_transformers,
    make_settings,
    open_evaluation_sets,
    write_evaluation_sets,
)

from internvl.data.images import normalize_tiles
from internvl.evaluation.evaluator import evaluate
from internvl.evaluation.results import read_metrics, read_predictions
from internvl.evaluation.scores import measure, score
from internvl.evaluation.statistics import compute_interval

METRIC_OF_SET = {"one_tile": "anls", "tiles": "cer", "texts": "exact_match", "base": None}


@pytest.fixture
def data(tmp_path, goldens):
    write_evaluation_sets(tmp_path)
    data = open_evaluation_sets(tmp_path, goldens / "tokenizer")
    return data._replace(sets=[entry._replace(metric=METRIC_OF_SET[entry.name]) for entry in data.sets])


@pytest.fixture
def tokenizer(data):
    return data.dataset.datasets[0].tokenizer


@pytest.fixture
def model(tokenizer):
    return build_noisy_model(tokenizer)


def test_metrics_are_those_of_files_and_of_single_samples(model, tokenizer, data, tmp_path):
    expected_losses = compute_losses_by_transformers(model, data)
    metrics = evaluate(model, tokenizer, data, make_settings(), tmp_path / "out", step=50, model_name="tiny")

    content, predictions = read_metrics(tmp_path / "out"), read_predictions(tmp_path / "out")
    assert content["metrics"] == {f"eval/{name}": value for name, value in metrics.items()}
    assert (content["step"], content["model"], content["skipped"]) == (50, "tiny", [])
    assert content["settings"] == {"max_new_tokens": 8, "num_samples": None}
    assert content["seconds"].keys() == {"loss", "answers"}
    assert content["sets"]["tiles"] == {
        "samples": 2,
        "answered": 2,
        "loss_tokens": sum(tokens for _, tokens, _ in expected_losses[1:3]),
        "metric": "cer",
        "scorer": None,
        "greater_is_better": False,
        "split": "eval",
    }
    order = [(entry.name, line) for entry, n in zip(data.sets, (1, 2, 5, 2), strict=True) for line in range(1, n + 1)]
    assert [(line["set"], line["line"]) for line in predictions] == order

    # Losses: of each sample, of the sets, of all, and on the base model's answers.
    for line, (loss_sum, tokens, correct) in zip(predictions, expected_losses, strict=True):
        assert (line["tokens"], line["correct"]) == (tokens, correct)
        assert line["loss"] == pytest.approx(loss_sum / tokens, abs=1e-5)
    loss_sum, tokens, correct = np.sum(expected_losses[:8], axis=0)
    expected = {"loss": loss_sum / tokens, "token_accuracy": correct / tokens}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    loss_sum, tokens, _ = np.sum(expected_losses[8:], axis=0)
    assert metrics["forgetting"] == metrics["base/loss"] == pytest.approx(loss_sum / tokens, abs=1e-5)

    # Answers and scores: as one sample at a time.
    model.eval()
    settings = make_settings()
    for sample, line in enumerate(predictions):
        if line["set"] == "base":
            assert line["prediction"] is None and line["score"] is None and line["metric"] is None
            continue
        dataset, index = data.dataset.locate(sample)
        images = [torch.as_tensor(tiles) for tiles in dataset.load_image_tiles(index)]
        tiles = normalize_tiles(torch.cat(images), settings.image_mean, settings.image_std) if images else None
        answer = model.chat(
            *(tokenizer, tiles, line["question"], {"max_new_tokens": 8, "do_sample": False}),
            num_patches_list=[len(tiles) for tiles in images],
            history=[tuple(pair) for pair in line["history"]],
        )
        assert line["prediction"] == answer and line["score"] == score(METRIC_OF_SET[line["set"]], line)
        assert line["images"] == dataset.list_media_paths(index)
    texts = [line for line in predictions if line["set"] == "texts"]
    assert metrics["texts/exact_match"] == np.mean([line["score"] for line in texts])
    assert metrics["texts/exact_match_low"] <= metrics["texts/exact_match"] <= metrics["texts/exact_match_high"]


def test_nothing_of_the_training_changes(model, tokenizer, data, tmp_path):
    model(input_ids=torch.arange(5, 13)[None], labels=torch.arange(5, 13)[None]).loss.backward()
    model.vision_model.eval()  # a mixed mode
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    modes = [module.training for module in model.modules()]
    config = deepcopy(model.config.to_dict())
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1)

    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    evaluate(model, tokenizer, data, make_settings(), tmp_path / "out")
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert [module.training for module in model.modules()] == modes and model.config.to_dict() == config
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in model.named_parameters())
    assert gradients and gradients.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    assert all(torch.equal(model.get_parameter(name).grad, gradient) for name, gradient in gradients.items())


def test_two_evaluations_write_the_same_files_except_seconds(model, tokenizer, data, tmp_path):
    for name in "ab":
        evaluate(model, tokenizer, data, make_settings(num_samples=3), tmp_path / name)
    files = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in "ab"]
    contents = [json.loads((tmp_path / name / "metrics.json").read_text()) | {"seconds": None} for name in "ab"]
    assert files[0] == files[1] and contents[0] == contents[1]
    texts = [line for line in read_predictions(tmp_path / "a") if line["set"] == "texts"]
    assert [line["prediction"] is None for line in texts].count(True) == 2
    assert all((line["score"] is None) == (line["prediction"] is None) and line["loss"] for line in texts)
    assert contents[0]["sets"]["texts"]["answered"] == 3 and contents[0]["sets"]["texts"]["samples"] == 5


def test_intervals_are_those_of_the_scores(model, tokenizer, data, tmp_path):
    metrics = evaluate(model, tokenizer, data, make_settings(), tmp_path)
    lines = [line for line in read_predictions(tmp_path) if line["set"] == "tiles"]
    assert (metrics["tiles/cer_low"], metrics["tiles/cer_high"]) == compute_interval("cer", measure("cer", lines))
