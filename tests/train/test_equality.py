"""The same global batch gives the same run however it is cut: ranks, accumulation, ZeRO, rows, whatever trains.

Every case is a real run without dropout, compared with one process without DeepSpeed. A step's loss is the mean over
its tokens, so a step may be cut into micro-batches of any size. Losses agree to 1e-6, adapters and weights to 1e-5 of
their norm, and each has moved by a hundred times as much.
"""

import functools
import re
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from helpers.agreement import check_agreement, check_trained
from helpers.training_runs import flags_of, history, prepare, run, run_here

from internvl.planning.epoch_plan import plan_epoch

FROZEN = "--freeze_backbone True --freeze_llm True --freeze_mlp True".split()
VISION = "--use_backbone_lora 4 --backbone_lora_dropout 0".split()
LLM = "--use_llm_lora 4 --llm_lora_dropout 0".split()
MIXES = {
    "vision adapters": [*FROZEN, *VISION],
    "LLM adapters": [*FROZEN, *LLM],
    "both adapters": [*FROZEN, *VISION, *LLM],
    "projector": [*FROZEN, "--freeze_mlp", "False"],
    "last vision layers": [*FROZEN, "--unfreeze_vit_layers", "-1"],
    "adapters and whole parts": [*VISION, "--freeze_backbone", "True"],
    "everything": [],
}
LAYOUTS = {
    "padded": [],
    "packed": "--use_packed_ds True --max_packed_tokens 400 --num_images_expected 16 --strict_mode False".split(),
}
FILES = {
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
EXACT = "--loss_reduction_all_gather True --loss_reduction square".split()
QUICK = "--max_steps 3 --save_strategy no --no_smoke_save".split()


class Case(NamedTuple):
    zero: str
    trained: str
    ranks: int
    accumulation: int
    layout: str

    @property
    def rows(self) -> int:
        """Of a step: 8 of 13 samples, or all of them, so that the packed rows of a step are the same, too."""
        return 16 if self.layout == "packed" else max(8, self.ranks * self.accumulation)

    def flags(self) -> list[str]:
        micro_batch = self.rows // (self.ranks * self.accumulation)
        zero = ["--deepspeed", FILES[self.zero]] if FILES[self.zero] else []
        return [*batch(micro_batch, self.accumulation), *MIXES[self.trained], *LAYOUTS[self.layout], *zero]


def batch(micro_batch: int, accumulation: int) -> list[str]:
    return f"--per_device_train_batch_size {micro_batch} --gradient_accumulation_steps {accumulation}".split()


# zero, what trains, ranks, accumulation, rows. `test_every_pair...` says what the table covers.
FAST = """
none      both adapters             2   4   padded
1         last vision layers        4   1   packed
2         vision adapters           4   1   padded
2         everything                2   4   packed
3         both adapters             2   1   padded
3         everything                4   4   padded
offload   adapters and whole parts  2   1   padded
1         projector                 1   1   padded
34b       both adapters             2   1   padded
70b       last vision layers        2   1   packed
100b      everything                2   1   padded
100b_1e8  adapters and whole parts  2   1   packed
"""
SLOW = """
none      vision adapters           2   1   packed
none      LLM adapters              4   1   packed
none      projector                 2   1   padded
none      last vision layers        2   4   padded
none      adapters and whole parts  2   1   packed
none      everything                2   1   packed
1         vision adapters           2   4   packed
1         LLM adapters              2   1   padded
1         both adapters             4   1   packed
1         projector                 2   1   padded
1         adapters and whole parts  4   4   padded
1         everything                2   1   packed
2         LLM adapters              2   1   packed
2         both adapters             2   1   padded
2         projector                 2   1   packed
2         last vision layers        2   1   packed
2         adapters and whole parts  2   1   packed
3         vision adapters           2   1   padded
3         LLM adapters              2   1   padded
3         projector                 2   1   packed
3         last vision layers        2   1   packed
3         adapters and whole parts  2   1   padded
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


def cases(table: str) -> list[Case]:
    fields = [re.split(r"\s{2,}", line) for line in table.splitlines() if line]
    return [Case(zero, trained, int(ranks), int(cut), layout) for zero, trained, ranks, cut, layout in fields]


CASES = [*cases(FAST), *(pytest.param(case, marks=pytest.mark.slow) for case in cases(SLOW))]


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """Flags, rows of a step -> output of one process without DeepSpeed that sees a row at a time; each once."""

    @functools.cache
    def output(rows: int, *flags: str) -> Path:
        output = tmp_path_factory.mktemp("alone") / "out"
        run_here(tiny, output, *QUICK, *flags, *batch(1, rows))
        check_trained(output, tiny / "model")
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERNVL_CACHE", str(tiny / "cache"))
        yield output


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)).replace(" ", "_"))
def test_the_same_step_cut_otherwise(tiny, alone, tmp_path, case):
    run(tiny, tmp_path / "out", *QUICK, *EXACT, *case.flags(), ranks=case.ranks)
    check_agreement(tmp_path / "out", alone(case.rows, *EXACT, *MIXES[case.trained], *LAYOUTS[case.layout]))


def test_every_pair_of_settings_is_in_the_table():
    every = [["none", "1", "2", "3", "offload"], list(MIXES), [2, 4], [1, 4], list(LAYOUTS)]
    table = cases(FAST + SLOW)
    for one, other in combinations(range(len(every)), 2):
        assert {(case[one], case[other]) for case in table} >= set(product(every[one], every[other]))
    assert {case.zero for case in table} == FILES.keys()
    assert {case.zero for case in table if case.ranks == 1} >= {"1", "2", "3", "offload"}


def test_ranks_without_pictures_stand_beside_ranks_with_some(tiny, alone, tmp_path):
    """In the cases of each ZeRO stage, in steps that are run."""
    uneven = set()
    for layout in LAYOUTS:
        schedule = prepare([*flags_of(tiny, tmp_path), *MIXES["both adapters"], *LAYOUTS[layout]]).schedule
        for case in cases(FAST + SLOW):
            cut = {"world_size": case.ranks, "accumulation": case.accumulation}
            cut["micro_batch"] = case.rows // case.ranks // case.accumulation
            plan = plan_epoch(schedule.lengths, replace(schedule.layout, **cut), 0)
            tiles = np.append(plan.totals(schedule.lengths.tiles), 0)[plan.steps[:3]].sum(-1)
            if case.layout == layout and ((tiles == 0).any(-1) & tiles.any(-1)).any():
                uneven.add(case.zero)
    assert uneven >= {"none", "1", "2", "3", "offload"}


def test_a_steps_loss_is_the_mean_over_its_tokens(tiny, alone, tmp_path):
    flags = [*EXACT, *MIXES["everything"]]
    trainer = prepare([*flags_of(tiny, tmp_path), *flags, *batch(1, 8)])
    total = weight = 0.0
    for sample in trainer.schedule.plan(0).samples[trainer.schedule.plan(0).steps[0].flatten()].tolist():
        found = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[(0, sample)]]))
        share = (found["labels"] != -100).sum().item() ** 0.5
        total, weight = total + share * trainer.model(**found).loss.item(), weight + share
    assert history(alone(8, *flags))[0]["loss"] == pytest.approx(total / weight, rel=1e-5)


def test_the_mean_of_means_of_rows_does_not_mind_either(tiny, alone, tmp_path):
    """Upstream's loss where --loss_reduction_all_gather is not set; an epoch's last step holds one row of four."""
    flags, zero = [*MIXES["both adapters"], "--max_steps", "5"], ["--deepspeed", FILES["2"]]
    run(tiny, tmp_path / "out", *QUICK, *flags, *batch(1, 1), *zero, ranks=4)
    check_agreement(tmp_path / "out", alone(4, *flags))


@pytest.mark.parametrize("zero", [FILES["none"], FILES["2"], FILES["3"], FILES["offload"]])
def test_bf16(tiny, alone, tmp_path, zero):
    """Each way rounds elsewhere, and Adam takes a rounded small gradient for as much as a large one: measured, losses
    differ by 3e-4, gradient norms by 5e-3, adapters, which begin at zero, by 0.16 of their norm; from those of a run in
    fp32 as far."""
    flags = [*EXACT, *MIXES["both adapters"], "--bf16", "True"]
    run(tiny, tmp_path / "out", *QUICK, *flags, *batch(4, 1), *(["--deepspeed", zero] if zero else []), ranks=2)
    check_agreement(tmp_path / "out", alone(8, *flags), tensors=0.1, loss=5e-4, norm=1e-2)
