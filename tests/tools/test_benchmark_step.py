"""tools/benchmark_step.py: contenders get the same samples and start as the same model, and its arithmetic holds."""

import json
from pathlib import Path

import pytest
import torch
from tools.benchmark.contenders import CONTENDERS
from tools.benchmark.measure import Run, measure
from tools.benchmark.predict import bytes_of_weights, predict
from tools.benchmark.samples import batches_of, make_samples, plan_of, sizes_of_samples, trained_tokens
from tools.benchmark.sizes import SIZES, config_of, row_tokens
from tools.benchmark.traffic import Network, counted, seconds
from tools.benchmark_step import main
from transformers import InternVLForConditionalGeneration

from internvl.model.hf.config import to_hf_config
from internvl.model.hf.weights import to_hf
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel

SIZE = SIZES["test"]
REAL = {"1b": ("internvl3_1b.json", 0.94e9), "2b": (None, 2.2e9), "8b": ("internvl2_8b.json", 8.1e9)}
OURS, NATIVE = "ours, padded by length", "transformers + peft, by length"


def steps_of(name: str, samples: int = 24):
    config, contender = config_of(SIZE), CONTENDERS[name]
    lengths = sizes_of_samples(config, samples)
    plan = plan_of(config, lengths, contender.packed, contender.by_length)
    return lengths, batches_of(plan, make_samples(config, lengths, SIZE.dtype))


def documents(steps) -> list[tuple]:
    """Tokens, labels and the places of documents, of all samples of all batches, in an order of their own."""
    found = []
    for batch in (batch for step in steps for batch in step):
        for ids, labels, mask, positions in zip(
            *(batch[key] for key in ("input_ids", "labels", "attention_mask", "position_ids")), strict=True
        ):
            ends = [*(positions[mask] == 0).nonzero().flatten().tolist(), int(mask.sum())]
            for start, end in zip(ends[:-1], ends[1:], strict=True):
                found.append((tuple(ids[start:end].tolist()), tuple(labels[start:end].tolist())))
    return sorted(found)


def test_all_contenders_get_the_same_samples():
    found = {name: steps_of(name) for name in CONTENDERS}
    lengths, first = found["ours, packed"]
    assert len(documents(first)) == 24 and sum(len(ids) for ids, _ in documents(first)) == lengths.tokens.sum()
    for name, (_, steps) in found.items():
        assert documents(steps) == documents(first), name
        batches = [batch for step in steps for batch in step]
        assert sum(len(batch["pixel_values"]) for batch in batches) == lengths.tiles.sum() > 0
        assert sum(map(trained_tokens, batches)) == lengths.trained.sum() > 0


@pytest.mark.parametrize("checkpointing", [True, False])
def test_all_contenders_have_the_same_loss(checkpointing):
    found = [measure(name, "test", 24, checkpointing, first_loss=True) for name in CONTENDERS]
    first = found[0]["first_loss"]
    assert [result["first_loss"] for result in found] == pytest.approx([first] * len(found), abs=1e-5)
    assert [result["loss"] for result in found] == pytest.approx([first] * len(found), abs=1e-3)
    assert {(result["tokens"], result["trained_tokens"], result["tiles"]) for result in found} == {(388, 116, 38)}


def test_ours_and_transformers_take_the_same_first_step():
    """B of every adapter starts at zero, so that the first step does not tell one matrix from its parts."""
    losses = {}
    for name in (OURS, NATIVE):
        _, steps = steps_of(name)
        model = CONTENDERS[name].build(SIZE, True, 0.0)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        run = Run(CONTENDERS[name], model, torch.optim.SGD(trained, 50.0), SIZE.dtype)
        blind = [[batch | {"pixel_values": torch.zeros_like(batch["pixel_values"])} for batch in s] for s in steps]
        losses[name] = [run.mean_loss(steps), run.mean_loss(blind), run.train(steps[:1]), run.mean_loss(steps)]
    assert losses[OURS] == pytest.approx(losses[NATIVE], abs=1e-5)
    before, blind, _, after = losses[OURS]
    assert abs(before - after) > 1e-3 and abs(before - blind) > 1e-4, "else the losses would tell nothing"


@pytest.mark.parametrize("name", REAL)
def test_real_sizes_are_those_of_published_models(name):
    size, (published, parameters) = SIZES[name], REAL[name]
    config = config_of(size)
    assert row_tokens(config) == 8192
    with torch.device("meta"):
        custom = InternVLChatModel(config).state_dict()
        native = InternVLForConditionalGeneration(to_hf_config(config, 1, tied=False)).state_dict()
    shapes = {key: tensor.shape for key, tensor in to_hf(custom, config.llm_config)}
    assert shapes == {key: tensor.shape for key, tensor in native.items()}
    assert sum(tensor.numel() for tensor in custom.values()) == pytest.approx(parameters, rel=0.02)
    weights = bytes_of_weights(size)
    assert 0.002 < weights["trained"] / weights["weights"] < 0.02
    if published:
        real = InternVLChatConfig.from_pretrained(Path(__file__).parents[1] / "real_configs" / published)
        for key, value in size.vision.items():
            assert getattr(real.vision_config, key) == value, key
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            assert getattr(real.llm_config, key) == size.llm[key], key


def test_time_of_communication():
    network = Network(within=450e9, between=50e9)
    assert seconds({"all_gather_into_tensor": 450}, 1, network) == 0
    assert seconds({"all_gather_into_tensor": 450}, 8, network) == pytest.approx(7 / 8 * 1e-9)
    assert seconds({"all_reduce": 450}, 8, network) == pytest.approx(2 * 7 / 8 * 1e-9)
    # 64 GPUs are 8 nodes: 7 of 8 bytes come through the 8 links of a node, which together are slower than NVLink.
    assert seconds({"reduce_scatter_tensor": 400}, 64, network) == pytest.approx(7 / 8 * 1e-9)
    assert sum(counted(2, trained=10, weights=1000).values()) < sum(counted(3, trained=10, weights=1000).values())


def test_predictions():
    slow, fast = (predict(SIZES["8b"], 8, 400e12, Network(within, 50e9)) for within in (45e9, 450e9))
    assert [line.stage for line in slow] == [1, 2, 3]
    for before, after in zip(slow, fast, strict=True):
        assert 0 < after.communication < before.communication and after.step < before.step
        assert after.efficiency == pytest.approx((1 - after.communication) * (1 - after.waiting), rel=1e-6)
    assert fast[0].efficiency > fast[2].efficiency  # gathering all weights to train adapters costs


def test_the_command_line_prints_a_table_and_says_what_is_predicted(tmp_path, capsys):
    stem = str(tmp_path / "found")
    main([*"--size test --repeats 1 --checkpointing off --contenders".split(), OURS, NATIVE, "--output", stem])
    results = json.loads(Path(f"{stem}.json").read_text())["results"]
    assert [result["contender"] for result in results] == [OURS, NATIVE]
    assert results[1]["speed"] == results[1]["memory"] == 1
    assert all(result["seconds"] > 0 and result["peak_bytes"] > 1e6 for result in results)
    assert Path(f"{stem}.png").stat().st_size > 10_000
    main(["--predict", "--size", "test", "--gpus", "8", "--output", stem])
    printed = capsys.readouterr().out
    assert OURS in printed and "PREDICTED, not measured" in printed
    with pytest.raises(SystemExit):
        main(["--contenders", "nobody"])


@pytest.mark.slow
def test_zero_moves_what_is_counted(tmp_path, capsys):
    stem = str(tmp_path / "scaling")
    main([*"--scaling --size test --samples 48 --output".split(), stem])
    results = json.loads(Path(f"{stem}.json").read_text())["results"]
    assert [result["stage"] for result in results] == [1, 1, 2, 2, 3, 3]
    for result in results:
        tolerance = 0.25 if result["stage"] == 3 else 0.01
        for collective, size in result["counted"].items():
            assert result["logged"][collective] == pytest.approx(size, rel=tolerance), (result["stage"], collective)
        assert 0 < result["collectives"] < result["seconds"]
    assert "in collectives" in capsys.readouterr().out
