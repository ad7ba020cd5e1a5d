"""Check that distribution does not change a training run.

Every case is a real run without dropout: some ranks, gradient accumulation, ZeRO stage, layout of rows and trainable
parameters. It is compared with the same global batch in one process without DeepSpeed. A step's loss is weighted by
loss tokens over all ranks, so micro-batches may have any size. Losses agree to 1e-6, adapters and weights to 1e-5 of
their norm; training has moved each by at least a hundred times as much.
"""

import functools
import re
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from helpers.agreement import assert_runs_agree, assert_trained
from helpers.training_runs import (
    FREEZE_ALL,
    build_run_flags,
    prepare_batch,
    prepare_trainer,
    read_step_logs,
    run_training,
    train_in_process,
)

from internvl.planning.epoch_plan import plan_epoch

VISION_LORA = "--use_backbone_lora 4 --backbone_lora_dropout 0".split()
LLM_LORA = "--use_llm_lora 4 --llm_lora_dropout 0".split()
TRAINABLE = {
    "vision adapters": [*FREEZE_ALL, *VISION_LORA],
    "LLM adapters": [*FREEZE_ALL, *LLM_LORA],
    "both adapters": [*FREEZE_ALL, *VISION_LORA, *LLM_LORA],
    "projector": [*FREEZE_ALL, "--freeze_mlp", "False"],
    "last vision layers": [*FREEZE_ALL, "--unfreeze_vit_layers", "-1"],
    "adapters and full parts": [*VISION_LORA, "--freeze_backbone", "True"],
    "everything": [],
}
LAYOUTS = {
    "padded": [],
    "packed": "--use_packed_ds True --max_packed_tokens 400 --num_images_expected 16 --strict_mode False".split(),
}
DEEPSPEED_CONFIGS = {
    "none": None,
    "1": "zero_stage1_config.json",
    "2": "zero_stage2_config.json",
    "3": "zero_stage3_config.json",
    "offload": "zero_stage3_config_100b_1e7_offload.json",
    "34b": "zero_stage3_config_34b.json",
    "70b": "zero_stage3_config_70b.json",
    "100b": "zero_stage3_config_100b.json",
    "100b_1e8": "zero_stage3_config_100b_1e8.json",
}
LOSS_OVER_ALL_RANKS = "--loss_reduction_all_gather True --loss_reduction square".split()
THREE_STEPS = "--max_steps 3 --save_strategy no --no_smoke_save".split()


class Case(NamedTuple):
    """One way to distribute a run (a line of the tables)."""

    zero: str
    trainable: str
    ranks: int
    accumulation: int
    layout: str

    @property
    def num_rows(self) -> int:
        """Return the rows of a step.

        Padded: 8 of the 13 samples. Packed: enough for all of them, because then every step packs the same rows.
        """
        return 16 if self.layout == "packed" else max(8, self.ranks * self.accumulation)

    def flags(self) -> list[str]:
        """Return the training flags of this case."""
        micro_batch = self.num_rows // (self.ranks * self.accumulation)
        zero = ["--deepspeed", DEEPSPEED_CONFIGS[self.zero]] if DEEPSPEED_CONFIGS[self.zero] else []
        return [*batch_flags(micro_batch, self.accumulation), *TRAINABLE[self.trainable], *LAYOUTS[self.layout], *zero]


def batch_flags(micro_batch: int, accumulation: int) -> list[str]:
    return f"--per_device_train_batch_size {micro_batch} --gradient_accumulation_steps {accumulation}".split()


# ZeRO, trainable parameters, ranks, accumulation, layout. The first table has every DeepSpeed configuration; both
# together have every pair of settings.
MAIN_TABLE = """
none      both adapters             2   4   padded
1         last vision layers        4   1   packed
2         vision adapters           4   1   padded
2         everything                2   4   packed
3         both adapters             2   1   padded
3         everything                4   4   padded
offload   adapters and full parts   2   1   padded
1         projector                 1   1   padded
34b       both adapters             2   1   padded
70b       last vision layers        2   1   packed
100b      everything                2   1   padded
100b_1e8  adapters and full parts   2   1   packed
"""
PAIRS_TABLE = """
none      vision adapters           2   1   packed
none      LLM adapters              4   1   packed
none      projector                 2   1   padded
none      last vision layers        2   4   padded
none      adapters and full parts   2   1   packed
none      everything                2   1   packed
1         vision adapters           2   4   packed
1         LLM adapters              2   1   padded
1         both adapters             4   1   packed
1         projector                 2   1   padded
1         adapters and full parts   4   4   padded
1         everything                2   1   packed
2         LLM adapters              2   1   packed
2         both adapters             2   1   padded
2         projector                 2   1   packed
2         last vision layers        2   1   packed
2         adapters and full parts   2   1   packed
3         vision adapters           2   1   padded
3         LLM adapters              2   1   padded
3         projector                 2   1   packed
3         last vision layers        2   1   packed
3         adapters and full parts   2   1   padded
offload   vision adapters           2   1   packed
offload   LLM adapters              2   4   padded
offload   both adapters             2   1   padded
offload   projector                 4   4   packed
offload   last vision layers        2   1   padded
offload   everything                2   1   packed
2         both adapters             1   1   padded
3         everything                1   4   packed
offload   vision adapters           1   1   padded
"""


def read_cases(table: str) -> list[Case]:
    lines = [re.split(r"\s{2,}", line) for line in table.splitlines() if line]
    return [Case(zero, trainable, int(ranks), int(steps), layout) for zero, trainable, ranks, steps, layout in lines]


CASES = read_cases(MAIN_TABLE + PAIRS_TABLE)


@pytest.fixture(scope="module")
def reference(tiny_inputs, tmp_path_factory):
    """Return a function that trains a reference run.

    One process without DeepSpeed sees one row at a time. The function takes the rows of a step and flags, trains
    each run once and returns its output folder.
    """

    @functools.cache
    def train_reference(num_rows: int, *flags: str) -> Path:
        output = tmp_path_factory.mktemp("reference") / "out"
        train_in_process(tiny_inputs, output, *THREE_STEPS, *flags, *batch_flags(1, num_rows))
        assert_trained(output, tiny_inputs / "model")
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
        yield train_reference


@pytest.mark.multiprocess
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)).replace(" ", "_"))
def test_distribution_does_not_change_training(tiny_inputs, reference, tmp_path, case):
    run_training(tiny_inputs, tmp_path / "out", *THREE_STEPS, *LOSS_OVER_ALL_RANKS, *case.flags(), ranks=case.ranks)
    assert_runs_agree(
        tmp_path / "out",
        reference(case.num_rows, *LOSS_OVER_ALL_RANKS, *TRAINABLE[case.trainable], *LAYOUTS[case.layout]),
    )


def test_tables_have_every_pair_of_settings():
    settings = [["none", "1", "2", "3", "offload"], list(TRAINABLE), [2, 4], [1, 4], list(LAYOUTS)]
    for one, other in combinations(range(len(settings)), 2):
        assert {(case[one], case[other]) for case in CASES} >= set(product(settings[one], settings[other]))
    assert {case.zero for case in CASES} == DEEPSPEED_CONFIGS.keys()
    assert {case.zero for case in CASES if case.ranks == 1} >= {"1", "2", "3", "offload"}


def test_cases_have_steps_where_only_some_ranks_have_images(tiny_inputs, tmp_path):
    """Each ZeRO stage has such a case in its first three steps."""
    uneven = set()
    for layout in LAYOUTS:
        schedule = prepare_trainer(
            [*build_run_flags(tiny_inputs, tmp_path), *TRAINABLE["both adapters"], *LAYOUTS[layout]]
        ).schedule
        for case in CASES:
            cut = {"world_size": case.ranks, "gradient_accumulation": case.accumulation}
            cut["micro_batch_size"] = case.num_rows // case.ranks // case.accumulation
            plan = plan_epoch(schedule.lengths, replace(schedule.layout, **cut), 0)
            tiles = np.append(plan.sum_per_row(schedule.lengths["tiles"]), 0)[plan.steps[:3]].sum(-1)
            if case.layout == layout and ((tiles == 0).any(-1) & tiles.any(-1)).any():
                uneven.add(case.zero)
    assert uneven >= {"none", "1", "2", "3", "offload"}


def test_step_loss_is_the_weighted_mean_over_its_samples(tiny_inputs, reference, tmp_path):
    flags = [*LOSS_OVER_ALL_RANKS, *TRAINABLE["everything"]]
    trainer = prepare_trainer([*build_run_flags(tiny_inputs, tmp_path), *flags, *batch_flags(1, 8)])
    total = total_weight = 0.0
    for sample in trainer.schedule.plan(0).samples[trainer.schedule.plan(0).steps[0].flatten()].tolist():
        inputs = prepare_batch(trainer, trainer.data_collator([trainer.train_dataset[(0, sample)]]))
        weight = (inputs["labels"] != -100).sum().item() ** 0.5  # --loss_reduction square
        total, total_weight = total + weight * trainer.model(**inputs).loss.item(), total_weight + weight
    assert read_step_logs(reference(8, *flags))[0]["loss"] == pytest.approx(total / total_weight, rel=1e-5)


@pytest.mark.multiprocess
def test_distribution_does_not_change_the_mean_over_rows(tiny_inputs, reference, tmp_path):
    """Upstream's loss without --loss_reduction_all_gather.

    The last step of an epoch has one row instead of four.
    """
    flags, zero = [*TRAINABLE["both adapters"], "--max_steps", "5"], ["--deepspeed", DEEPSPEED_CONFIGS["2"]]
    run_training(tiny_inputs, tmp_path / "out", *THREE_STEPS, *flags, *batch_flags(1, 1), *zero, ranks=4)
    assert_runs_agree(tmp_path / "out", reference(4, *flags))


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "zero", [DEEPSPEED_CONFIGS["none"], DEEPSPEED_CONFIGS["2"], DEEPSPEED_CONFIGS["3"], DEEPSPEED_CONFIGS["offload"]]
)
def test_bf16(tiny_inputs, reference, tmp_path, zero):
    """Distribution changes a bf16 run by no more than rounding does.

    Each strategy rounds at other places, and Adam's step for a small rounded gradient is as large as for a large one.
    Measured: losses differ by 3e-4, gradient norms by 5e-3, and adapters, which start at zero, by 0.16 of their norm.
    They differ as much from those of an fp32 run.
    """
    flags = [*LOSS_OVER_ALL_RANKS, *TRAINABLE["both adapters"], "--bf16", "True"]
    run_training(
        tiny_inputs,
        tmp_path / "out",
        *THREE_STEPS,
        *flags,
        *batch_flags(4, 1),
        *(["--deepspeed", zero] if zero else []),
        ranks=2,
    )
    assert_runs_agree(tmp_path / "out", reference(8, *flags), tensors=0.1, loss=5e-4, norm=1e-2)
