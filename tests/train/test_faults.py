"""Steps and disks that go wrong: a clear end or a counted skip, and never a checkpoint lost."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from runs import LORA, flags_of, history, prepare, run
from safetensors.torch import load_file, save_file

from internvl.model.tokenizer import load_tokenizer

COSINE = [*LORA, "--lr_scheduler_type", "cosine", "--max_steps", "8"]
COSINE += ["--backbone_lora_dropout", "0", "--llm_lora_dropout", "0"]
STAGES = {"none": [], **{f"zero{n}": ["--deepspeed", f"zero_stage{n}_config.json"] for n in (1, 2, 3)}}
SKIPPED = re.compile(r"step (\d+) is skipped: (.*)")


@pytest.fixture(scope="module")
def poisoned(tiny, tmp_path_factory) -> Path:
    """The tiny checkpoint with NaN in the embedding of a word that only one of 13 samples has."""
    folder = tmp_path_factory.mktemp("poisoned")
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    tokenizer, tensors = load_tokenizer(folder / "model"), load_file(folder / "model/model.safetensors")
    records = map(json.loads, (folder / "train.jsonl").read_text().splitlines())
    ids = [{i for turn in record["conversations"] for i in tokenizer(turn["value"]).input_ids} for record in records]
    word = next(i for i in ids[8] if sum(i in others for others in ids) == 1)
    tensors["language_model.model.embed_tokens.weight"][word] = torch.nan
    save_file(tensors, folder / "model/model.safetensors", metadata={"format": "pt"})
    return folder


def skipped(printed: str) -> dict[int, str]:
    return {int(step): why for step, why in SKIPPED.findall(printed)}


def finite(output: Path) -> bool:
    files = [*output.rglob("*.safetensors")]
    return bool(files) and all(bool(t.isfinite().all()) for file in files for t in load_file(file).values())


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_steps_are_skipped_alike_by_all_ranks_at_every_stage(poisoned, tmp_path):
    """One rank of two has the sample that gives NaN; the largest gradient of all other steps is above the bound. The
    others' losses, norms and learning rates show that nothing else changed."""
    run(poisoned, tmp_path / "all", *COSINE, ranks=2)
    norms = [step["grad_norm"] for step in history(tmp_path / "all")]
    large = next(step for step, norm in enumerate(norms, 1) if norm == max(filter(math.isfinite, norms)))
    for stage, flags in STAGES.items():
        output = tmp_path / stage
        bound = ["--skip_above_grad_norm", str(0.999 * norms[large - 1])]
        found = skipped(run(poisoned, output, *COSINE, *flags, *bound, ranks=2).stdout)
        steps, others = history(output), history(tmp_path / "none")
        assert found[2] == found[6] == "the loss or its gradient is not finite", stage
        assert found[large] == f"the norm of the gradient is {norms[large - 1]:.4g}, above --skip_above_grad_norm"
        assert [math.isnan(step["loss"]) for step in steps] == [step["step"] in (2, 6) for step in steps]
        assert [step.get("skipped_steps", 0) for step in steps] == [
            sum(k <= step["step"] for k in found) for step in steps
        ]
        for number, (step, other) in enumerate(zip(steps, others, strict=True)):
            assert step["learning_rate"] == pytest.approx(0.5e-3 * (1 + math.cos(math.pi * number / len(steps))))
            for name, tolerance in {"loss": 1e-5, "grad_norm": 1e-4}.items():
                if math.isfinite(other[name]):
                    assert step[name] == pytest.approx(other[name], abs=tolerance), (stage, number, name)
        assert finite(output)
        assert math.isfinite(json.loads((output / "train_results.json").read_text())["train_loss"])


@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    """Train in this process on a folder's checkpoint; the trainer."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny / "cache"))

    def here(*flags: str, of: Path = tiny):
        trainer = prepare([*flags_of(of, tmp_path / "out"), *COSINE, *flags])
        here.trainer = trainer
        trainer.train()
        return trainer

    return here


def test_a_skipped_step_changes_no_weight(here, poisoned, tmp_path):
    here("--save_steps", "1", "--max_steps", "2", of=poisoned)
    folders = [tmp_path / f"out/checkpoint-{step}/vision_model" for step in (1, 2)]
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert all(tensor.any() for tensor in before.values()), "the first step was none to skip"
    assert finite(tmp_path / "out")


def test_a_loss_that_is_infinite_though_its_gradient_is_not(here):
    trainer = here("--max_steps", "1")
    loss = torch.tensor(1.0, requires_grad=True)
    for factor, found in ((1.0, 1.0), (math.inf, math.nan)):
        (gradient,) = torch.autograd.grad(trainer.all_or_nothing(loss + factor - factor), loss)
        assert gradient.item() == pytest.approx(found, nan_ok=True)


def test_too_many_in_a_row_end_the_run(here, tmp_path):
    """The first step throws the weights so far off that no other has a finite loss."""
    message = "4 steps in a row were skipped, step 5 because the loss .* is not finite; --max_skipped_steps allows 3. "
    message += "They changed no weight; the same command goes on from checkpoint-1"
    with pytest.raises(ValueError, match=message):
        here("--learning_rate", "1e25", "--max_skipped_steps", "3", "--save_steps", "1", "--save_total_limit", "1")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
    assert finite(tmp_path / "out/checkpoint-1")


def test_weights_that_are_not_finite_are_not_written(here, tmp_path):
    with pytest.raises(ValueError, match="weights are not finite after step 1 .* and [0-9]+ more.: none are written"):
        here("--learning_rate", "1e39", "--save_steps", "1")
    assert not list((tmp_path / "out").glob("checkpoint-*"))
