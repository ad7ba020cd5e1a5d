"""A checkpoint of some ranks at one ZeRO stage goes on with others at another: same states, same losses."""

import pytest
import torch
from helpers.agreement import check_agreement, check_trained, distance
from helpers.training_runs import FULL, LORA, flags_of, losses, prepare, run, run_here
from safetensors.torch import load_file

# Every step sees all 13 samples, weighed alike, so that its loss does not depend on how they are cut.
ALL = "--loss_reduction_all_gather True --save_steps 2 --no_smoke_save".split()
KINDS = {"adapters": [*LORA, *"--backbone_lora_dropout 0 --llm_lora_dropout 0".split(), *ALL], "whole": [*FULL, *ALL]}
FOUR, TWO, ONE = (4, 2, 4), (2, 3, 7), (1, 2, 13)  # ranks, ZeRO stage, accumulation
LIVES = {"4-2-4": [FOUR, TWO, FOUR], "2-1-2": pytest.param([TWO, ONE, TWO], marks=pytest.mark.slow)}


@pytest.fixture(scope="module", params=KINDS)
def unbroken(tiny, tmp_path_factory, request):
    """Flags and output of a run in one process without DeepSpeed."""
    flags, output = KINDS[request.param], tmp_path_factory.mktemp("unbroken") / request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERNVL_CACHE", str(tiny / "cache"))
        run_here(tiny, output, *flags, "--gradient_accumulation_steps", "13")
    check_trained(output, tiny / "model")
    return flags, output


@pytest.mark.parametrize("life", LIVES.values(), ids=LIVES)
def test_goes_on_with_other_ranks_at_another_stage(tiny, unbroken, tmp_path, life):
    (flags, expected), moved = unbroken, tmp_path / "moved"
    for number, (ranks, stage, accumulation) in enumerate(life, start=1):
        more = ["--gradient_accumulation_steps", str(accumulation), "--max_steps", str(2 * number)]
        more += ["--deepspeed", f"zero_stage{stage}_config.json"]
        printed = run(tiny, moved, *flags, *more, ranks=ranks).stdout
        assert ("its states are converted" in printed) == (expected.name == "whole" and number > 1)
    check_agreement(moved, expected)
    assert losses(moved)[0] > 1.01 * losses(moved)[-1]
    if expected.name == "adapters":
        check_moments(prepare([*flags_of(tiny, tmp_path / "other"), *flags]), moved, expected)


def check_moments(trainer, moved, expected) -> None:
    """Both runs end with the same states of AdamW, by name in one, by number in the other."""
    trained = trainer.trained_parameters().items()
    groups = trainer.create_optimizer().param_groups
    names = [next(n for n, p in trained if p is parameter) for group in groups for parameter in group["params"]]
    ours = load_file(moved / "checkpoint-6/optimizer.safetensors")
    theirs = torch.load(expected / "checkpoint-6/optimizer.pt", weights_only=True)["state"]
    assert len(theirs) == len(names) and len(ours) == 3 * len(names)
    for number, name in enumerate(names):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert distance(ours[f"{name}.{moment}"], theirs[number][moment]) < 1e-4, (name, moment)


@pytest.mark.parametrize("unbroken", ["adapters"], indirect=True)
def test_no_way_out_of_deepspeed_nor_into_it(tiny, unbroken, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny / "cache"))
    flags, without = unbroken
    more = ["--max_steps", "8", "--gradient_accumulation_steps", "13"]
    zero = ["--deepspeed", "zero_stage2_config.json"]
    run(tiny, tmp_path / "zero", *flags, *more, *zero, "--max_steps", "2")
    trainer = prepare([*flags_of(tiny, tmp_path / "zero"), *flags, *more])
    with pytest.raises(ValueError, match="was written under DeepSpeed: go on with --deepspeed"):
        trainer.train(str(tmp_path / "zero/checkpoint-2"))
    printed = run(tiny, without, *flags, *more, *zero, status=1)
    assert "checkpoint-6 was not written under DeepSpeed: go on without --deepspeed" in printed.stderr
