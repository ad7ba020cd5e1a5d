"""Contenders of tools/benchmark_step.py: the same samples, the same initial model."""

import json
from pathlib import Path

import pytest
import torch
from helpers.paths import TESTS_DIR
from tools.benchmark.contender_run import ContenderRun, measure_contender
from tools.benchmark.contenders import CONTENDERS
from tools.benchmark.samples import (
    build_batches,
    count_loss_tokens,
    draw_sample_lengths,
    make_random_samples,
    plan_rows,
)
from tools.benchmark.sizes import MODEL_SIZES, build_config, get_max_row_tokens
from tools.benchmark_step import main
from transformers import InternVLForConditionalGeneration

from internvl.model.hf.config import convert_config_to_hf
from internvl.model.hf.weights import convert_weights_to_hf
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel

SIZE = MODEL_SIZES["test"]
# Size -> configuration in tests/real_configs, number of parameters.
PUBLISHED_MODELS = {"1b": ("internvl3_1b.json", 0.94e9), "2b": (None, 2.2e9), "8b": ("internvl2_8b.json", 8.1e9)}
OURS, TRANSFORMERS = "ours, padded by length", "transformers + peft, by length"


def build_steps(name: str, num_samples: int = 24):
    config, contender = build_config(SIZE), CONTENDERS[name]
    lengths = draw_sample_lengths(config, num_samples)
    plan = plan_rows(config, lengths, contender.packed, contender.group_by_length)
    return lengths, build_batches(plan, make_random_samples(config, lengths, SIZE.dtype))


def sort_documents(steps) -> list[tuple]:
    """Split all batches into documents: sorted pairs of token ids and labels."""
    documents = []
    for batch in (batch for step in steps for batch in step):
        for ids, labels, mask, positions in zip(
            *(batch[key] for key in ("input_ids", "labels", "attention_mask", "position_ids")), strict=True
        ):
            bounds = [*(positions[mask] == 0).nonzero().flatten().tolist(), int(mask.sum())]
            for start, end in zip(bounds[:-1], bounds[1:], strict=True):
                documents.append((tuple(ids[start:end].tolist()), tuple(labels[start:end].tolist())))
    return sorted(documents)


def test_all_contenders_get_the_same_samples():
    steps_by_name = {name: build_steps(name) for name in CONTENDERS}
    lengths, packed_steps = steps_by_name["ours, packed"]
    documents = sort_documents(packed_steps)
    assert len(documents) == 24 and sum(len(ids) for ids, _ in documents) == lengths["tokens"].sum()
    for name, (_, steps) in steps_by_name.items():
        assert sort_documents(steps) == documents, name
        batches = [batch for step in steps for batch in step]
        assert sum(len(batch["pixel_values"]) for batch in batches) == lengths["tiles"].sum() > 0
        assert sum(map(count_loss_tokens, batches)) == lengths["loss_tokens"].sum() > 0


@pytest.mark.parametrize("checkpointing", [True, False])
def test_all_contenders_have_the_same_loss(checkpointing):
    results = [measure_contender(name, "test", 24, checkpointing, measure_initial_loss=True) for name in CONTENDERS]
    initial_loss = results[0]["initial_loss"]
    expected = [initial_loss] * len(results)
    assert [result["initial_loss"] for result in results] == pytest.approx(expected, abs=1e-5)
    assert [result["loss"] for result in results] == pytest.approx(expected, abs=1e-3)
    assert {(result["tokens"], result["loss_tokens"], result["tiles"]) for result in results} == {(388, 116, 38)}


def test_our_first_step_equals_transformers():
    """Compare the losses after a step.

    LoRA B starts at zero, so in the first step an adapter of a fused matrix equals those of its parts.
    """
    losses = {}
    for name in (OURS, TRANSFORMERS):
        _, steps = build_steps(name)
        model = CONTENDERS[name].build_fn(SIZE, True, 0.0)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        run = ContenderRun(CONTENDERS[name], model, torch.optim.SGD(trainable, 50.0), SIZE.dtype)
        black = [[batch | {"pixel_values": 0 * batch["pixel_values"]} for batch in step] for step in steps]
        losses[name] = [run.evaluate(steps), run.evaluate(black), run.train(steps[:1]), run.evaluate(steps)]
    assert losses[OURS] == pytest.approx(losses[TRANSFORMERS], abs=1e-5)
    before, black, _, after = losses[OURS]
    assert abs(before - after) > 1e-3 and abs(before - black) > 1e-4, "the step and the images must change the loss"


@pytest.mark.parametrize("name", PUBLISHED_MODELS)
def test_sizes_equal_published_models(name):
    size, (published, num_parameters) = MODEL_SIZES[name], PUBLISHED_MODELS[name]
    config = build_config(size)
    assert get_max_row_tokens(config) == 8192
    with torch.device("meta"):
        ours = InternVLChatModel(config).state_dict()
        theirs = InternVLForConditionalGeneration(convert_config_to_hf(config, 1, is_tied=False)).state_dict()
        with_lora = CONTENDERS["ours, packed"].build_fn(size, True, 0.0)
    shapes = {key: tensor.shape for key, tensor in convert_weights_to_hf(ours, config.llm_config)}
    assert shapes == {key: tensor.shape for key, tensor in theirs.items()}
    assert sum(tensor.numel() for tensor in ours.values()) == pytest.approx(num_parameters, rel=0.02)
    num_trainable = sum(parameter.numel() for parameter in with_lora.parameters() if parameter.requires_grad)
    assert 0.002 < num_trainable / sum(map(torch.numel, with_lora.parameters())) < 0.02
    if published:
        real = InternVLChatConfig.from_pretrained(TESTS_DIR / "real_configs" / published)
        for key, value in size.vision.items():
            assert getattr(real.vision_config, key) == value, key
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            assert getattr(real.llm_config, key) == size.llm[key], key


@pytest.mark.multiprocess
def test_command_line_prints_a_table_and_writes_json_and_chart(tmp_path, capsys):
    stem = str(tmp_path / "results")
    main([*"--size test --repeats 1 --checkpointing off --contenders".split(), OURS, TRANSFORMERS, "--output", stem])
    results = json.loads(Path(f"{stem}.json").read_text())["results"]
    assert [result["contender"] for result in results] == [OURS, TRANSFORMERS]
    assert results[1]["speed"] == results[1]["memory"] == 1
    assert all(result["seconds"] > 0 and result["peak_bytes"] > 1e6 for result in results)
    assert Path(f"{stem}.png").stat().st_size > 10_000
    assert OURS in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--contenders", "nobody"])


@pytest.mark.multiprocess
def test_zero_communicates_the_expected_bytes(tmp_path, capsys):
    stem = str(tmp_path / "scaling")
    main([*"--scaling --size test --samples 48 --output".split(), stem])
    results = json.loads(Path(f"{stem}.json").read_text())["results"]
    assert [result["stage"] for result in results] == [1, 1, 2, 2, 3, 3]
    for result in results:
        tolerance = 0.25 if result["stage"] == 3 else 0.01
        logged = result["logged_bytes"]
        for collective, size in result["expected_bytes"].items():
            assert logged[collective] == pytest.approx(size, rel=tolerance), (
                result["stage"],
                collective,
            )
        assert 0 < result["collective_seconds"] < result["seconds"]
    assert "in collectives" in capsys.readouterr().out
