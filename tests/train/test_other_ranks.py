"""A checkpoint of some ranks at one ZeRO stage goes on with others at another: same states, same losses."""

import pytest
from runs import FULL, LORA, flags_of, losses, prepare, run, run_here

# Every step sees all 13 samples, weighed alike, so that its loss does not depend on how they are cut.
ALL = "--loss_reduction_all_gather True --save_steps 2 --backbone_lora_dropout 0 --llm_lora_dropout 0".split()
STRETCHES = [(4, 2, 4), (2, 3, 7), (4, 2, 4)]  # ranks, ZeRO stage, accumulation


@pytest.fixture(autouse=True)
def cache(tiny, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapters", "whole"])
def test_goes_on_with_other_ranks_at_another_stage(tiny, tmp_path, kind):
    flags = [*LORA, *ALL] if kind == "adapters" else [*FULL, *ALL[:4]]
    run_here(tiny, tmp_path / "unbroken", *flags, "--gradient_accumulation_steps", "13")
    for number, (ranks, stage, accumulation) in enumerate(STRETCHES, start=1):
        more = ["--gradient_accumulation_steps", str(accumulation), "--max_steps", str(2 * number)]
        more += ["--deepspeed", f"zero_stage{stage}_config.json"]
        printed = run(tiny, tmp_path / "moved", *flags, *more, ranks=ranks).stdout
        assert ("its states are converted" in printed) == (kind == "whole" and number > 1)
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "unbroken"), rel=1e-5)
    assert losses(tmp_path / "moved")[0] > 1.01 * losses(tmp_path / "moved")[-1]
    if kind == "adapters":  # and without DeepSpeed, which does not go on from there, nor the other way round
        trainer = prepare([*flags_of(tiny, tmp_path / "moved"), *flags, "--max_steps", "8"])
        with pytest.raises(ValueError, match="was written under DeepSpeed: go on with --deepspeed"):
            trainer.train(str(tmp_path / "moved/checkpoint-6"))
        more = ["--gradient_accumulation_steps", "13", "--deepspeed", "zero_stage2_config.json", "--max_steps", "8"]
        printed = run(tiny, tmp_path / "unbroken", *flags, *more, status=1)
        assert "checkpoint-6 was not written under DeepSpeed: go on without --deepspeed" in printed.stderr
