"""Resume with another number of ranks and another ZeRO stage."""

import pytest
import torch
from helpers.agreement import assert_runs_agree, assert_trained, relative_distance
from helpers.training_runs import (
    TRAIN_ADAPTERS,
    TRAIN_LLM_AND_PROJECTOR,
    build_run_flags,
    prepare_trainer,
    read_losses,
    run_training,
    train_in_process,
)
from safetensors.torch import load_file

pytestmark = pytest.mark.multiprocess

# Each step sees all 13 samples with equal weights, so its loss does not depend on how they are split over ranks.
FULL_BATCH = "--loss_reduction_all_gather True --save_steps 2 --no_smoke_save".split()
RUN_FLAGS = {
    "adapters": [*TRAIN_ADAPTERS, *"--backbone_lora_dropout 0 --llm_lora_dropout 0".split(), *FULL_BATCH],
    "full model": [*TRAIN_LLM_AND_PROJECTOR, *FULL_BATCH],
}
# ranks, ZeRO stage, gradient accumulation
FOUR_RANKS, TWO_RANKS, ONE_RANK = (4, 2, 4), (2, 3, 7), (1, 2, 13)
RANKS_OF_ATTEMPTS = {"4-2-4": [FOUR_RANKS, TWO_RANKS, FOUR_RANKS], "2-1-2": [TWO_RANKS, ONE_RANK, TWO_RANKS]}


@pytest.fixture(scope="module", params=RUN_FLAGS)
def unbroken(tiny_inputs, tmp_path_factory, request):
    """Train in one process without DeepSpeed; return flags and output folder."""
    flags, output = RUN_FLAGS[request.param], tmp_path_factory.mktemp("unbroken") / request.param.replace(" ", "_")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
        train_in_process(tiny_inputs, output, *flags, "--gradient_accumulation_steps", "13")
    assert_trained(output, tiny_inputs / "model")
    return flags, output


@pytest.mark.parametrize("ranks_of_attempts", RANKS_OF_ATTEMPTS.values(), ids=RANKS_OF_ATTEMPTS)
def test_resume_with_other_ranks_and_zero_stage_equals_unbroken_run(tiny_inputs, unbroken, tmp_path, ranks_of_attempts):
    (flags, expected), resumed = unbroken, tmp_path / "resumed"
    for attempt, (num_ranks, stage, accumulation) in enumerate(ranks_of_attempts, start=1):
        attempt_flags = ["--gradient_accumulation_steps", str(accumulation), "--max_steps", str(2 * attempt)]
        attempt_flags += ["--deepspeed", f"zero_stage{stage}_config.json"]
        printed = run_training(tiny_inputs, resumed, *flags, *attempt_flags, ranks=num_ranks).stdout
        is_converted = expected.name == "full_model" and attempt > 1  # states of adapters do not depend on the stage
        assert ("Converting optimizer states" in printed) == is_converted
    assert_runs_agree(resumed, expected)
    assert read_losses(resumed)[0] > 1.01 * read_losses(resumed)[-1]
    if expected.name == "adapters":
        trainer = prepare_trainer([*build_run_flags(tiny_inputs, tmp_path / "other"), *flags])
        assert_moments_close(trainer, resumed, expected)


def assert_moments_close(trainer, resumed, expected) -> None:
    """Assert that two runs end with the same moments of AdamW.

    The run under DeepSpeed stores them by parameter name, torch's optimizer by the number of the parameter.
    """
    trainable = trainer.get_trainable_parameters().items()
    groups = trainer.create_optimizer().param_groups
    names = [next(n for n, p in trainable if p is parameter) for group in groups for parameter in group["params"]]
    states = load_file(resumed / "checkpoint-6/optimizer.safetensors")
    expected_states = torch.load(expected / "checkpoint-6/optimizer.pt", weights_only=True)["state"]
    assert len(expected_states) == len(names) and len(states) == 3 * len(names)  # with the master weights
    for number, name in enumerate(names):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert relative_distance(states[f"{name}.{moment}"], expected_states[number][moment]) < 1e-4, (name, moment)


@pytest.mark.parametrize("unbroken", ["adapters"], indirect=True)
def test_switching_deepspeed_on_or_off_is_an_error(tiny_inputs, unbroken, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    flags, output_without = unbroken
    flags = [*flags, "--max_steps", "8", "--gradient_accumulation_steps", "13"]
    zero = ["--deepspeed", "zero_stage2_config.json"]
    run_training(tiny_inputs, tmp_path / "zero", *flags, *zero, "--max_steps", "2")
    trainer = prepare_trainer([*build_run_flags(tiny_inputs, tmp_path / "zero"), *flags])
    with pytest.raises(ValueError, match="was written under DeepSpeed: resume with --deepspeed"):
        trainer.train(str(tmp_path / "zero/checkpoint-2"))
    failed = run_training(tiny_inputs, output_without, *flags, *zero, status=1)
    assert "checkpoint-6 was written without DeepSpeed: resume without --deepspeed" in failed.stderr
