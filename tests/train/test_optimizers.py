"""Every optimizer trains and resumes bit for bit, without DeepSpeed and under each ZeRO stage."""

import functools
import json
import shutil

import pytest
import torch
from helpers.paths import TESTS_DIR
from helpers.training_runs import TRAIN_ADAPTERS, ZERO_FLAGS, load_weights, read_losses, run_training

from internvl.arguments.optimizers import ADAMW, SUPPORTED_OPTIMIZERS, UNSUPPORTED_WITH_DEEPSPEED

# The parameters are large enough for states in 8 bits (at least 4096 elements).
LARGE_PARAMETERS = "--freeze_backbone True --max_steps 2 --save_steps 1 --no_smoke_save".split()
WAYS = {**ZERO_FLAGS, "offload": ["--deepspeed", "zero_stage3_config_100b_1e7_offload.json"]}
# On a CPU bitsandbytes treats paged optimizers like the others, and these names stand for the same class.
SAME_CLASS = (
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
    "rmsprop_bnb",
    "paged_ademamix_8bit",
)
UNDER_DEEPSPEED = [
    name for name in SUPPORTED_OPTIMIZERS if name not in (*UNSUPPORTED_WITH_DEEPSPEED, *SAME_CLASS, *ADAMW)
]
CASES = [("none", name) for name in SUPPORTED_OPTIMIZERS]
CASES += [(way, name) for way in WAYS if way != "none" for name in UNDER_DEEPSPEED]
# Their states are saved and loaded by the same code as those of ZeRO-1 (2) and ZeRO-3 (offload).
RESUMED_WITH_ONE_OPTIMIZER = ("zero2", "offload")


@pytest.fixture(scope="module")
def train(tiny_inputs, tmp_path_factory):
    """Return a function that trains a run once and returns its output."""

    @functools.cache
    def train(*flags: str):
        output = tmp_path_factory.mktemp("optimizer") / "out"
        run_training(tiny_inputs, output, *flags)
        return output

    return train


@pytest.mark.multiprocess
@pytest.mark.parametrize(("way", "name"), CASES)
def test_optimizer_trains_and_resumes(train, tiny_inputs, tmp_path, way, name):
    flags = [*LARGE_PARAMETERS, "--optim", name]
    output = train(*flags, *WAYS[way])
    assert read_losses(output) == pytest.approx(read_losses(train(*flags)), rel=1e-4), "DeepSpeed changes the steps"
    if way in RESUMED_WITH_ONE_OPTIMIZER and name != UNDER_DEEPSPEED[0]:
        return
    shutil.copytree(output / "checkpoint-1", tmp_path / "out/checkpoint-1")
    run_training(tiny_inputs, tmp_path / "out", *flags, *WAYS[way])
    assert read_losses(tmp_path / "out") == read_losses(output)
    resumed, unbroken = load_weights(tmp_path / "out"), load_weights(output)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())


@pytest.mark.multiprocess
@pytest.mark.parametrize("way", WAYS)
def test_the_default_is_torchs_fused_adamw(tiny_inputs, tmp_path, way):
    """DeepSpeed's own FusedAdam would have to be compiled first. States in host memory need DeepSpeed's CPU Adam."""
    flags = [*TRAIN_ADAPTERS, *"--max_steps 1 --save_strategy no --no_smoke_save".split(), *WAYS[way]]
    run_training(tiny_inputs, tmp_path / "out", *flags, entry=TESTS_DIR / "programs/optimizer_kernels.py")
    found = json.loads((tmp_path / "out/optimizer.json").read_text())
    assert found == (["DeepSpeedCPUAdam", None] if way == "offload" else ["AdamW", True])


@pytest.mark.multiprocess
def test_optimizers_differ(train):
    losses = {
        name: read_losses(train(*LARGE_PARAMETERS, "--optim", name))[1] for name in ("adamw_torch", "sgd", "rmsprop")
    }
    assert len(set(losses.values())) == len(losses)
    for name in ("adamw_bnb_8bit", "paged_adamw_32bit"):
        loss = read_losses(train(*LARGE_PARAMETERS, "--optim", name))[1]
        assert loss == pytest.approx(losses["adamw_torch"], rel=1e-5)


@pytest.mark.multiprocess
@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_adapters_resume_with_two_ranks(tiny_inputs, tmp_path, zero):
    """States of other optimizers than AdamW are saved by rank."""
    flags = [*TRAIN_ADAPTERS, *"--optim lion_8bit --max_steps 2 --save_steps 1".split(), *ZERO_FLAGS[zero]]
    run_training(tiny_inputs, tmp_path / "out", *flags, ranks=2)
    for run in ("same", "fewer"):
        shutil.copytree(tmp_path / "out/checkpoint-1", tmp_path / run / "checkpoint-1")
    run_training(tiny_inputs, tmp_path / "same", *flags, ranks=2)
    resumed, unbroken = load_weights(tmp_path / "same"), load_weights(tmp_path / "out")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())
    refused = run_training(tiny_inputs, tmp_path / "fewer", *flags, status=1).stderr
    assert "was written with another number of ranks, ZeRO stage or rates per part. Only the states of AdamW" in refused


@pytest.mark.multiprocess
@pytest.mark.parametrize("trained", [TRAIN_ADAPTERS, ["--freeze_backbone", "True"]], ids=["adapters", "full"])
def test_offloaded_adamw_resumes(tiny_inputs, tmp_path, trained):
    """DeepSpeed's CPU Adam keeps the powers of the betas in C++."""
    flags = [*trained, *WAYS["offload"], *"--max_steps 5 --save_steps 3".split()]
    run_training(tiny_inputs, tmp_path / "out", *flags)
    shutil.copytree(tmp_path / "out/checkpoint-3", tmp_path / "resumed/checkpoint-3")
    run_training(tiny_inputs, tmp_path / "resumed", *flags)
    resumed, unbroken = load_weights(tmp_path / "resumed"), load_weights(tmp_path / "out")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())
