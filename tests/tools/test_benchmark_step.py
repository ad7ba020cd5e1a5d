"""Contenders of tools/benchmark_step.py: the same samples in every turn, the same initial model, comparisons."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.paths import PACKAGE_DIR, TESTS_DIR
from transformers import InternVLForConditionalGeneration

from internvl.model.hf.config import convert_config_to_hf
from internvl.model.hf.weights import convert_weights_to_hf
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.tools.benchmark.contender_run import ContenderRun, build_turns, count_work, start_contender
from internvl.tools.benchmark.contenders import CONTENDERS
from internvl.tools.benchmark.reports import compare
from internvl.tools.benchmark.samples import MIXTURES, count_loss_tokens, draw_sample_lengths, split_into_turns
from internvl.tools.benchmark.sizes import MODEL_SIZES, build_config, get_max_row_tokens
from internvl.tools.benchmark.turns import Measurement
from internvl.tools.benchmark_step import main

SIZE = MODEL_SIZES["test"]
# Size -> configuration in tests/real_configs, number of parameters.
PUBLISHED_MODELS = {"1b": ("internvl3_1b.json", 0.94e9), "2b": (None, 2.2e9), "8b": ("internvl2_8b.json", 8.1e9)}
OURS, TRANSFORMERS = "ours, padded by length", "transformers + peft, by length"


CPU_CONTENDERS = [name for name in CONTENDERS if "Liger" not in name and "compiled" not in name]
NUM_TURNS, NUM_SAMPLES = 2, 12


def sort_documents(batches) -> list[tuple]:
    """Split all batches into documents: sorted pairs of token ids and labels."""
    documents = []
    for batch in batches:
        for ids, labels, mask, positions in zip(
            *(batch[key] for key in ("input_ids", "labels", "attention_mask", "position_ids")), strict=True
        ):
            bounds = [*(positions[mask] == 0).nonzero().flatten().tolist(), int(mask.sum())]
            for start, end in zip(bounds[:-1], bounds[1:], strict=True):
                documents.append((tuple(ids[start:end].tolist()), tuple(labels[start:end].tolist())))
    return sorted(documents)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_all_contenders_get_the_same_samples_in_each_turn(mixture):
    lengths = draw_sample_lengths(build_config(SIZE), NUM_TURNS * NUM_SAMPLES, mixture)
    assert (lengths["tiles"] == 0).sum() == (NUM_TURNS * NUM_SAMPLES / 2 if MIXTURES[mixture] else 0)
    turns_by_name = {
        name: build_turns(contender, SIZE, mixture, NUM_TURNS, NUM_SAMPLES) for name, contender in CONTENDERS.items()
    }
    all_ids = split_into_turns(lengths, NUM_TURNS)
    assert sorted(all_ids.ravel()) == list(range(NUM_TURNS * NUM_SAMPLES))
    for turn, ids in enumerate(all_ids):
        documents = sort_documents(turns_by_name["ours, packed"][turn])
        assert (
            len(documents) == NUM_SAMPLES
            and sum(len(tokens) for tokens, _ in documents) == lengths["tokens"][ids].sum()
        )
        for name, turns in turns_by_name.items():
            assert sort_documents(turns[turn]) == documents, name
            assert sum(len(batch["pixel_values"]) for batch in turns[turn]) == lengths["tiles"][ids].sum() > 0
            assert sum(map(count_loss_tokens, turns[turn])) == lengths["loss_tokens"][ids].sum() > 0


def test_padded_batches_of_a_turn_have_similar_lengths():
    """They are chosen among all samples, so a turn of a single batch has little padding, too."""
    contender, padding = CONTENDERS[TRANSFORMERS], []
    for num_turns, num_samples in ((24, 4), (8, 12)):
        turns = build_turns(contender, SIZE, "with text", num_turns, num_samples)
        masks = [batch["attention_mask"] for turn in turns for batch in turn]
        padding.append(1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks))
    lengths = draw_sample_lengths(build_config(SIZE), 96)["tokens"].reshape(-1, 4)
    shuffled = 1 - lengths.sum() / (4 * lengths.max(axis=1).sum())
    assert max(padding) < 0.2 < 0.3 < shuffled


@pytest.mark.parametrize("lora", ["vision+llm", "llm"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_all_contenders_have_the_same_loss(checkpointing, lora):
    losses, trainable = [], set()
    for name in CPU_CONTENDERS:
        facts, take_turn = start_contender(name, "test", ["with text"], NUM_TURNS, NUM_SAMPLES, checkpointing, lora)
        facts = facts["with text"]
        assert sum(facts["tokens"]) == 388 and facts["peak_bytes"] >= 0 and 0 <= facts["padding"] < 0.6
        losses += [take_turn("with text", number)["loss"] for number in range(NUM_TURNS)]
        trainable.add(facts["trainable_parameters"])
    assert losses == pytest.approx(losses[:NUM_TURNS] * len(CPU_CONTENDERS), abs=1e-5)
    # Our vision encoder has an adapter for its fused QKV, transformers' one for each of the three.
    assert len(trainable) == (2 if lora == "vision+llm" else 1)


def test_flops_of_a_frozen_vision_encoder():
    """Frozen, it has no backward pass: half the FLOPs of tiles, all of tokens."""
    both, llm = (count_work(SIZE, "images", NUM_TURNS, NUM_SAMPLES, lora) for lora in ("vision+llm", "llm"))
    assert both["tokens"] == llm["tokens"] and all(
        0.5 < b / a < 1 for a, b in zip(both["flops"], llm["flops"], strict=True)
    )


def test_comparison_with_the_reference():
    facts = {"tokens": [100, 400], "flops": [1e12, 4e12], "peak_flops": 1e13, "peak_bytes": 30}
    turns = [{"mixture": "images", "seconds": s, "cpu_seconds": s, "loss": 1.0} for s in (1.0, 2.0)]
    slower = [turn | {"seconds": 2 * turn["seconds"] + turn["seconds"] ** 2} for turn in turns]
    measured, reference = (
        Measurement({"images": facts | {"peak_bytes": n}}, t) for n, t in ((30, turns), (60, slower))
    )
    result = compare(measured, reference, "images")
    assert result["tokens_per_second"] == (150, 100, 200)
    assert result["mfu"] == pytest.approx(0.15) and result["memory"] == 0.5
    assert result["speed"] == (3.5, 3, 4)  # of the same turn: 3 / 1 and 8 / 2
    assert "speed" not in compare(measured, None, "images")
    out_of_memory = Measurement({"error": "out of memory"}, [])
    assert compare(out_of_memory, reference, "images") == {"error": "out of memory"}
    assert "speed" not in compare(measured, out_of_memory, "images")


def test_our_first_step_equals_transformers():
    """Compare the losses after a step.

    LoRA B starts at zero, so in the first step an adapter of a fused matrix equals those of its parts.
    """
    losses = {}
    for name in (OURS, TRANSFORMERS):
        turns = build_turns(CONTENDERS[name], SIZE, "with text", NUM_TURNS, NUM_SAMPLES)
        run = ContenderRun(CONTENDERS[name], CONTENDERS[name].build_fn(SIZE, True, 0.0, "vision+llm"), SIZE.dtype)
        steps = [run.prepare([batch for turn in turns for batch in turn]), run.prepare(turns[0])]
        black = [batch | {"pixel_values": 0 * batch["pixel_values"]} for batch in steps[0][0]]
        losses[name] = [run.train(*steps[0]), run.train(black, steps[0][1])]  # the learning rate is zero
        optimizer, run.optimizer = run.optimizer, torch.optim.SGD(run.trainable, 50.0)
        losses[name].append(run.train(*steps[1]))
        run.optimizer = optimizer
        losses[name].append(run.train(*steps[0]))
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
        with_lora = CONTENDERS["ours, packed"].build_fn(size, True, 0.0, "vision+llm")
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
@pytest.mark.parametrize("together", ["--together", "--no-together"])
def test_command_line_prints_a_table_and_writes_json_and_chart(tmp_path, capfd, together):
    stem = str(tmp_path / "results")
    options = "--size test --turns 2 --checkpointing off --mixtures images --contenders".split()
    main([*options, OURS, TRANSFORMERS, together, "--output", stem])
    measured = json.loads(Path(f"{stem}.json").read_text())
    results = measured["results"]
    assert measured["device"] and measured["versions"]["torch"] == torch.__version__
    assert [result["contender"] for result in results] == [OURS, TRANSFORMERS]
    assert results[1]["speed"] == [1, 1, 1] and results[1]["memory"] == 1
    assert results[0]["losses"] == pytest.approx(results[1]["losses"], abs=1e-5)
    for result in results:
        median, low, high = result["tokens_per_second"]
        assert 0 < low < median < high and result["peak_bytes"] > 1e6 and len(result["seconds"]) == 2
    assert Path(f"{stem}.png").stat().st_size > 10_000
    printed = capfd.readouterr().out
    assert OURS in printed and "losses of the same turn differ by at most" in printed


@pytest.mark.multiprocess
def test_against_another_checkout(tmp_path, capfd):
    """The other checkout's `internvl` runs in the contender that has its name."""
    folder = tmp_path / "older/internvl_chat"
    shutil.copytree(PACKAGE_DIR / "internvl", folder / "internvl", ignore=shutil.ignore_patterns("__pycache__"))
    loss = folder / "internvl/model/token_loss.py"
    loss.write_text(loss.read_text() + "\nprint('the older loss')\n")
    stem = str(tmp_path / "results")
    options = "--size test --turns 1 --mixtures images --checkpointing on --against".split()
    main([*options, str(folder.parent), "--output", stem])
    newer, older = json.loads(Path(f"{stem}.json").read_text())["results"]
    assert (newer["contender"], older["contender"]) == ("ours, packed", "ours, packed, older")
    assert newer["losses"] == older["losses"] and older["speed"] == [1, 1, 1] != newer["speed"]
    assert capfd.readouterr().err.count("the older loss") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--against nowhere", "--against nowhere: expected a checkout with internvl_chat/internvl in it"),
        ("--samples 6", "--turns 9 --samples 6 is invalid: expected at least 1 turn and a multiple of 4 samples"),
        ("--turns 0", "--turns 0 --samples 8 is invalid"),
        ("--contenders nobody", "invalid choice: 'nobody'"),
    ],
)
def test_invalid_options(options, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(options.split())
    assert message in f"{error.value} {capsys.readouterr().err}"


@pytest.mark.multiprocess
def test_zero_communicates_the_expected_bytes(tmp_path, capsys):
    stem = str(tmp_path / "scaling")
    main([*"--scaling --size test --turns 4 --output".split(), stem])
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
        assert len(result["seconds"]) == len(result["seconds_without_deepspeed"]) == result["steps"]
        assert 0 < result["collective_seconds"] * result["steps"] < sum(result["seconds"])
    assert "in collectives" in capsys.readouterr().out
