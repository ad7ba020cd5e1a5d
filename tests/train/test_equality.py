"""A step is what its samples say, whoever computes it: ranks, ZeRO stages, micro-batches, rows change no number.

Each run of the table trains the same samples as its reference: one process, no DeepSpeed, micro-batches of one sample.
Losses are means over all trained tokens of a step, and adapters drop nothing: numbers that ranks draw are their own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from runs import ROOT
from safetensors.torch import load_file

from internvl.dist_utils import free_port

FROZEN = "--freeze_backbone True --freeze_llm True --freeze_mlp True".split()
VISION = "--use_backbone_lora 4 --backbone_lora_dropout 0".split()
LLM = "--use_llm_lora 4 --llm_lora_dropout 0".split()
# name -> what trains
MIXES = {
    "vision": [*FROZEN, *VISION],
    "llm": [*FROZEN, *LLM],
    "both": [*FROZEN, *VISION, *LLM],
    "and projector": [*FROZEN, *VISION, *LLM, "--freeze_mlp", "False"],
    "all but vision": ["--freeze_backbone", "True"],
    "last vision layers": [*FROZEN, *LLM, "--unfreeze_vit_layers", "-2"],
    "bf16": [*FROZEN, *VISION, *LLM, "--bf16", "True"],
}
PACKED = "--use_packed_ds True --max_packed_tokens 512 --num_images_expected 6 --strict_mode False".split()


class Layout(NamedTuple):
    """Rows in a step, samples in a micro-batch, flags; all the data in a step where rows differ with the layout."""

    rows: int
    samples: int = 1
    flags: tuple[str, ...] = ()


LAYOUTS = {
    "apart": Layout(4),  # 6 steps of 4 samples
    "in pairs": Layout(4, 2),
    "in fours": Layout(4, 4),
    "all": Layout(16, 1, ("--max_steps", "3")),
    "packed": Layout(12, 1, ("--max_steps", "3", *PACKED)),
}
REFERENCE = {"in pairs": "apart", "in fours": "apart", "packed": "all"}  # layouts of the same samples a step


class Run(NamedTuple):
    ranks: int
    zero: str  # "" for none, or what its file is named behind "zero_stage"
    layout: str
    mix: str


RUNS = [
    Run(1, "", "in fours", "both"),
    Run(1, "2_config", "apart", "last vision layers"),
    Run(1, "3_config", "packed", "and projector"),
    Run(2, "", "apart", "vision"),
    Run(2, "", "packed", "both"),
    Run(2, "1_config", "in pairs", "both"),
    Run(2, "1_config", "apart", "all but vision"),
    Run(2, "2_config", "apart", "and projector"),
    Run(2, "2_config", "packed", "last vision layers"),
    Run(2, "2_config", "apart", "bf16"),
    Run(2, "3_config", "in pairs", "llm"),
    Run(2, "3_config", "packed", "both"),
    Run(2, "3_config", "apart", "bf16"),
    Run(2, "3_config_34b", "apart", "last vision layers"),
    Run(2, "3_config_70b", "apart", "both"),
    Run(2, "3_config_100b", "in pairs", "vision"),
    Run(2, "3_config_100b_1e8", "packed", "llm"),
    Run(2, "3_config_100b_1e7_offload", "apart", "both"),
    Run(4, "", "apart", "and projector"),
    Run(4, "1_config", "packed", "llm"),
    Run(4, "2_config", "apart", "both"),
    Run(4, "3_config", "apart", "last vision layers"),
    Run(4, "3_config_100b_1e7_offload", "packed", "vision"),
]


def reference_of(run: Run) -> Run:
    return Run(1, "", REFERENCE.get(run.layout, run.layout), run.mix)


REFERENCES = list(dict.fromkeys(map(reference_of, RUNS)))
# Of losses, and of how far weights have moved: the largest difference, and the length of all differences beside that of
# the way. What DeepSpeed trains in bf16 it rounds to bf16 in each step, where the reference computes with fp32 weights.
TOLERANCE = 1e-5, 1e-5, 1e-4
TOLERANCES = {"bf16": (2e-2, 1e-2, 0.15)}


def name_of(run: Run) -> str:
    return f"{run.ranks}-{run.zero or 'none'}-{run.layout}-{run.mix}".replace(" ", "_")


def flags_of_run(run: Run) -> list[str]:
    layout = LAYOUTS[run.layout]
    sizes = {"per_device_train_batch_size": layout.samples}
    sizes["gradient_accumulation_steps"] = layout.rows // layout.samples // run.ranks
    flags = [*MIXES[run.mix], *layout.flags, "--loss_reduction_all_gather", "True"]
    flags += [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    return flags + (["--deepspeed", f"zero_stage{run.zero}.json"] if run.zero else [])


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Callable[[Run], tuple[dict, dict]]:
    """A run -> what it told, how far its tensors moved. One start of processes for each number of ranks."""
    folder = tmp_path_factory.mktemp("equality")
    for ranks in (1, 2, 4):
        mine = {name_of(run): flags_of_run(run) for run in [*REFERENCES, *RUNS] if run.ranks == ranks}
        torchrun = [ROOT / "shell/torchrun.py", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
        program = [Path(__file__).with_name("equal_ranks.py"), tiny, folder, json.dumps(mine)]
        env = os.environ | {"PYTHONPATH": str(ROOT / "internvl_chat"), "OMP_NUM_THREADS": "1"}
        env["INTERNVL_CACHE"] = str(tiny / "cache")
        done = subprocess.run(
            [sys.executable, *torchrun, *program], env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    def found(run: Run) -> tuple[dict, dict]:
        told = json.loads((folder / f"{name_of(run)}.json").read_text())
        return told, load_file(folder / f"{name_of(run)}.safetensors")

    return found


def compared(way: dict[str, torch.Tensor]) -> torch.Tensor:
    """All of it but the bias of keys in the vision encoder, which changes no attention: its gradient is rounding, of
    which Adam makes whole steps."""
    ends = [(name, tensor.chunk(3)) for name, tensor in sorted(way.items()) if name.endswith("qkv.bias")]
    kept = way | {name: torch.cat([query, value]) for name, (query, _, value) in ends}
    return torch.cat([kept[name].flatten() for name in sorted(kept)])


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=name_of)
def test_who_computes_a_step_changes_no_number(trained, run):
    (told, way), (expected, reference) = trained(run), trained(reference_of(run))
    of_losses, of_numbers, of_way = TOLERANCES.get(run.mix, TOLERANCE)
    assert told["losses"] == pytest.approx(expected["losses"], abs=of_losses)
    assert told["norms"] == pytest.approx(expected["norms"], rel=1e-4 if run.mix != "bf16" else 0.1)
    assert way.keys() == reference.keys()
    difference = compared(way) - compared(reference)
    assert difference.abs().max() <= of_numbers
    assert difference.norm() <= of_way * compared(reference).norm() > 0


@pytest.mark.slow
def test_the_table_holds_what_it_says(trained):
    """Every file of zero_stage_configs, every mix; and ranks without a picture beside others with some."""
    files = {f"zero_stage{run.zero}.json" for run in RUNS if run.zero}
    assert files == {file.name for file in (ROOT / "zero_stage_configs").glob("*.json")}
    assert {run.mix for run in RUNS} == set(MIXES) and {run.layout for run in RUNS} == set(LAYOUTS) - {"all"}
    for run in RUNS:
        if run.ranks == 4 and run.layout == "apart":
            assert any(min(of_ranks) == 0 < max(of_ranks) for of_ranks in zip(*trained(run)[0]["tiles"], strict=True))
