"""Token losses of evaluation sets: exact, whatever the rows, and without an effect on the model."""

import json
import math
import random

import numpy as np
import pytest
import torch
from helpers.evaluation_cases import (
    NUM_SAMPLES,
    ROW_SIZES,
    SETS,
    build_noisy_model,
    compute_losses_by_transformers,
    make_settings,
    open_evaluation_sets,
    write_evaluation_sets,
)
from torch.utils._python_dispatch import TorchDispatchMode

from internvl.data.collators import collate_rows
from internvl.data.images import NORMALIZATION_STATS, normalize_tiles
from internvl.data.skipped_samples import SkippedSampleReport
from internvl.evaluation.evaluation_data import EvaluationData
from internvl.evaluation.model_mode import evaluation_mode
from internvl.evaluation.token_losses import TOKEN_LOSSES, measure_token_losses, summarize_token_losses
from internvl.model import token_loss
from internvl.model.internvl_chat import InternVLChatModel


@pytest.fixture
def data(goldens, tmp_path) -> EvaluationData:
    write_evaluation_sets(tmp_path)
    return open_evaluation_sets(tmp_path, goldens / "tokenizer")


@pytest.fixture
def model(data) -> InternVLChatModel:
    return build_noisy_model(data.dataset.datasets[0].tokenizer)


def assert_equal_losses(losses: np.ndarray, expected: list[tuple]) -> None:
    """Compare loss sums to 1e-6 of their size; counts exactly."""
    assert losses.dtype == TOKEN_LOSSES
    sums, tokens, correct = zip(*expected, strict=True)
    np.testing.assert_allclose(losses["loss_sum"], sums, rtol=1e-6)
    assert losses["tokens"].tolist() == list(tokens) and losses["correct"].tolist() == list(correct)


@pytest.mark.parametrize(("max_tokens", "max_tiles"), ROW_SIZES)
def test_losses_equal_those_of_single_samples_by_transformers(data, model, max_tokens, max_tiles, monkeypatch):
    monkeypatch.setattr(token_loss, "CHUNK_BYTES", 5 * 4 * 1009)  # 5 tokens a chunk
    expected = compute_losses_by_transformers(model, data)
    assert len(expected) == NUM_SAMPLES and min(tokens for _, tokens, _ in expected) > 0
    assert_equal_losses(measure_token_losses(model, data, make_settings(max_tokens, max_tiles)), expected)


def test_padded_samples_have_the_same_losses(data, model):
    """A batch of several rows, padded to the longest."""
    rows = [data.dataset[(0, sample)] for sample in range(NUM_SAMPLES)]
    batch = collate_rows(rows)
    del batch["documents"], batch["bad_samples"]
    batch["pixel_values"] = normalize_tiles(batch["pixel_values"], *NORMALIZATION_STATS["imagenet"])
    with evaluation_mode(model):
        losses, is_correct = model(**batch, per_token_loss=True)
    measured = measure_token_losses(model, data, make_settings())
    assert losses.shape == is_correct.shape == (measured["tokens"].sum(),)
    ends = measured["tokens"].cumsum()
    sums = [part.double().sum().item() for part in losses.tensor_split(torch.from_numpy(ends[:-1]))]
    np.testing.assert_allclose(measured["loss_sum"], sums, rtol=1e-6)
    assert is_correct.sum() == measured["correct"].sum()


# LLMs whose rotary embedding changes with the longest document of a row. Samples have 87 to 115 tokens.
GROWING_LLMS = {
    "internlm2_dynamic": {"max_position_embeddings": 100},
    "phi3_su": {"original_max_position_embeddings": 100},
}


@pytest.mark.parametrize("llm", GROWING_LLMS)
def test_a_long_document_does_not_change_the_others_of_its_row(data, llm):
    assert data.lengths["tokens"].min() < 100 < data.lengths["tokens"].max()
    model = build_noisy_model(data.dataset.datasets[0].tokenizer, llm, **GROWING_LLMS[llm])
    expected = compute_losses_by_transformers(model, data)
    assert_equal_losses(measure_token_losses(model, data, make_settings()), expected)


def test_label_weights_do_not_change_evaluation_losses(data, model):
    expected = measure_token_losses(model, data, make_settings())
    model.loss_reduction = "square"
    assert np.array_equal(measure_token_losses(model, data, make_settings()), expected)


def test_the_loss_of_experts_is_left_out(data):
    model = build_noisy_model(data.dataset.datasets[0].tokenizer, "qwen3_moe", output_router_logits=True)
    assert_equal_losses(measure_token_losses(model, data, make_settings()), compute_losses_by_transformers(model, data))


class LargestLogits(TorchDispatchMode):
    """Records the most elements of a tensor whose last dimension is the vocabulary."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size, self.num_elements = vocab_size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == self.vocab_size:
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def test_full_logits_never_exist(data, model, monkeypatch):
    """The largest logits are those of a chunk, which here has 40 tokens."""
    monkeypatch.setattr(token_loss, "CHUNK_BYTES", 40 * 4 * 1009)
    with LargestLogits(1009) as largest:
        losses = measure_token_losses(model, data, make_settings(max_tokens=2000, max_tiles=100))
    assert losses["tokens"].sum() > 100
    assert 0 < largest.num_elements <= 40 * 1009


# -- the model and the run stay as they are ----------------------------------------------------------------------------


def list_random_states() -> list:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_modes_gradients_and_random_states_stay(data, model, num_workers, monkeypatch):
    monkeypatch.setattr("internvl.evaluation.sample_measurement.count_cores_per_rank", lambda: 2)
    model.vision_model.eval()  # a frozen part may be in eval mode during training
    model.language_model.get_output_embeddings().eval()
    model.mlp1.requires_grad_(True)[1].weight.grad = torch.ones_like(model.mlp1[1].weight)
    modes = [module.training for module in model.modules()]
    parameters = [(parameter.clone(), parameter.requires_grad) for parameter in model.parameters()]
    states = list_random_states()
    losses = measure_token_losses(model, data, make_settings(300, 12, num_workers=num_workers))
    assert losses["tokens"].all()
    assert [module.training for module in model.modules()] == modes and {True, False} == set(modes)
    assert list_random_states() == states
    assert (model.mlp1[1].weight.grad == 1).all() and torch.is_grad_enabled()
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 1
    for parameter, (before, requires_grad) in zip(model.parameters(), parameters, strict=True):
        assert torch.equal(parameter, before) and parameter.requires_grad == requires_grad


def test_workers_load_the_same_samples(data, model, monkeypatch):
    monkeypatch.setattr("internvl.evaluation.sample_measurement.count_cores_per_rank", lambda: 2)
    expected = measure_token_losses(model, data, make_settings(300, 12))
    assert np.array_equal(measure_token_losses(model, data, make_settings(300, 12, num_workers=2)), expected)


def test_an_abandoned_evaluation_restores_the_modes(data, model):
    calls = []

    def stop() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        measure_token_losses(model, data, make_settings(150, 12, check_stop_fn=stop))
    assert all(module.training for module in model.modules()) and torch.is_grad_enabled()


def test_the_model_runs_in_the_autocast_context(data, model):
    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    exact = measure_token_losses(model, data, make_settings())
    rounded = measure_token_losses(model, data, make_settings(autocast_fn=autocast))
    assert not np.array_equal(rounded["loss_sum"], exact["loss_sum"])
    np.testing.assert_allclose(rounded["loss_sum"], exact["loss_sum"], rtol=0.05)


def test_models_in_bfloat16_are_measured(data, model):
    exact = measure_token_losses(model, data, make_settings())
    rounded = measure_token_losses(model.to(torch.bfloat16), data, make_settings())
    np.testing.assert_allclose(rounded["loss_sum"], exact["loss_sum"], rtol=0.05)


# -- unusable samples --------------------------------------------------------------------------------------------------


def test_a_sample_that_turns_out_to_be_unusable_is_reported_and_left_out(data, model, tmp_path):
    expected = measure_token_losses(model, data, make_settings())
    (tmp_path / "wide.png").unlink()
    skipped = []
    losses = measure_token_losses(model, data, make_settings(report_skipped_fn=skipped.extend))
    images = [files for files_of_set in SETS.values() for files in files_of_set]
    is_lost = np.array(["wide.png" in (files or []) for files in images])
    assert is_lost.sum() == 2 == len(skipped)
    assert sorted(sentence.split(" (")[0] for sentence in skipped) == ["tiles line 1", "tiles line 2"]
    assert all("wide.png does not exist" in sentence for sentence in skipped)
    assert not losses[is_lost]["tokens"].any() and not losses[is_lost]["loss_sum"].any()
    np.testing.assert_allclose(losses[~is_lost]["loss_sum"], expected[~is_lost]["loss_sum"], rtol=1e-6)
    assert "tiles/loss" not in summarize_token_losses(data, losses)


def test_too_many_unusable_samples_end_the_evaluation(data, model, tmp_path):
    (tmp_path / "wide.png").unlink()
    report = SkippedSampleReport([], max_skipped=1)
    with pytest.raises(ValueError, match="2 samples are unusable, --max_bad_samples allows 1"):
        measure_token_losses(model, data, make_settings(report_skipped_fn=report.add))


def test_skipped_samples_are_logged(data, model, tmp_path, caplog):
    (tmp_path / "wide.png").unlink()
    measure_token_losses(model, data, make_settings())
    assert sum("Skipped sample: tiles line" in message for message in caplog.messages) == 2


# -- metrics -----------------------------------------------------------------------------------------------------------


def make_losses(*entries: tuple) -> np.ndarray:
    return np.array([*entries], TOKEN_LOSSES)


def test_metrics_are_over_all_loss_tokens(data):
    """The sets have 1, 2, 5 and 2 samples; the last one has the base model's answers."""
    losses = make_losses(*[(2.0, 4, 1)], *[(3.0, 2, 2), (1.0, 8, 0)], *[(0.0, 0, 0)] * 5, *[(6.0, 4, 4), (0.0, 4, 0)])
    metrics = summarize_token_losses(data, losses)
    assert metrics == {
        "one_tile/loss": 0.5,
        "one_tile/perplexity": math.exp(0.5),
        "one_tile/token_accuracy": 0.25,
        "tiles/loss": 0.4,
        "tiles/perplexity": math.exp(0.4),
        "tiles/token_accuracy": 0.2,
        "base/loss": 0.75,
        "base/perplexity": math.exp(0.75),
        "base/token_accuracy": 0.5,
        "loss": 6 / 14,
        "perplexity": math.exp(6 / 14),
        "token_accuracy": 3 / 14,
        "forgetting": 0.75,
    }


def test_without_base_answers_there_is_no_forgetting(data):

    losses = make_losses(*[(1.0, 2, 1)] * 8, *[(0.0, 0, 0)] * 2)
    assert "forgetting" not in summarize_token_losses(data, losses)
    only_base = make_losses(*[(0.0, 0, 0)] * 8, *[(1.0, 2, 1)] * 2)
    assert summarize_token_losses(data, only_base).keys() & {"loss", "forgetting"} == {"forgetting"}


def test_a_perplexity_beyond_float64_stays_finite(data):
    losses = make_losses(*[(4000.0, 4, 0)] * NUM_SAMPLES)
    metrics = summarize_token_losses(data, losses)
    assert metrics["loss"] == 1000 and 1e300 < metrics["perplexity"] < math.inf
    json.dumps(metrics, allow_nan=False)


def test_a_non_finite_loss_stays_visible(data):
    losses = make_losses((math.nan, 4, 0), *[(1.0, 4, 0)] * (NUM_SAMPLES - 1))
    metrics = summarize_token_losses(data, losses)
    assert math.isnan(metrics["loss"]) and math.isnan(metrics["perplexity"]) and metrics["texts/loss"] == 0.25
