"""Data that falls unevenly on the ranks is trained to the end, alike under every way to share the work."""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from helpers.training_runs import LORA, ROOT, copy_model
from PIL import Image

from internvl.dist_utils import free_port

FROZEN = "--freeze_backbone True --freeze_llm True --freeze_mlp True".split()
VISION, LLM = [*FROZEN, "--use_backbone_lora", "4"], [*FROZEN, "--use_llm_lora", "4"]
PACKED = [*LORA, *"--use_packed_ds True --max_packed_tokens 512 --num_images_expected 6 --strict_mode False".split()]
KEPT = [*LORA, "--grad_checkpoint", "False", "--loss_reduction_all_gather", "True"]
STAGES = {"ddp": [], **{f"zero{n}": ["--deepspeed", f"zero_stage{n}_config.json"] for n in (2, 3)}}

# name -> records, what trains and how
FEW = {"vision": ("uneven tiles", *VISION), "bad": ("turns bad", *KEPT)}
MANY = {
    "vision": ("one picture", *VISION),
    "llm": ("uneven tiles", *LLM),
    "whole": ("uneven tiles",),
    "text": ("no picture", *VISION),
    "bad": ("all turn bad", *LORA),
    "packed": ("uneven tiles", *PACKED),
}


@pytest.fixture
def train(goldens, tmp_path) -> Callable[[int, dict], dict]:
    """Number of ranks, runs -> what each run told, by kind and way to share the work; a hang is a failure."""
    copy_model(goldens, tmp_path)
    noise = Image.effect_noise((60, 40), 80).convert("RGB")
    noise.save(tmp_path / "small.png")
    noise.resize((300, 60)).save(tmp_path / "wide.png")

    def train(ranks: int, kinds: dict) -> dict[tuple[str, str], list[dict]]:
        runs = {f"{kind}-{way}": [*kinds[kind], *flags] for way, flags in STAGES.items() for kind in kinds}
        torchrun = [ROOT / "shell/torchrun.py", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
        program = ROOT / "tests/programs/uneven_ranks.py"
        command = [sys.executable, *torchrun, program, tmp_path, json.dumps(runs)]
        env = os.environ | {"PYTHONPATH": f"{ROOT}/internvl_chat:{ROOT}/tests", "OMP_NUM_THREADS": "1"}
        env["INTERNVL_CACHE"] = str(tmp_path / "cache")
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        told = json.loads((tmp_path / "told.json").read_text())
        return {tuple(name.split("-")): ranks for name, ranks in told.items()}

    return train


def check(told: dict, kinds: dict) -> None:
    """All went to the end, and all ranks have the same weights and the losses that they have without DeepSpeed."""
    assert told.keys() == {(kind, way) for way in STAGES for kind in kinds}
    for (kind, way), ranks in told.items():
        first, plain = ranks[0], told[kind, "ddp"][0]
        assert first["steps"][0] == first["steps"][1] > 0, (kind, way)
        assert len({rank["digest"] for rank in ranks}) == 1, (kind, way)
        assert first["losses"] == pytest.approx(plain["losses"], abs=1e-4), (kind, way)
        assert len(first["losses"]) == first["steps"][0]


def test_ranks_without_pictures_or_rows_and_a_file_that_goes_away(train):
    told = train(2, FEW)
    check(told, FEW)
    for way in STAGES:
        shown, not_shown = (sum(rank["tiles"]) for rank in told["vision", way])
        assert shown and not not_shown, "one rank never sees a picture, while only the vision encoder's adapters train"
        (bad,) = told["bad", way][0]["bad"]
        assert "goes.png does not exist" in bad


@pytest.mark.slow
def test_four_ranks_on_two_rows_a_step_or_fewer(train):
    told = train(4, MANY)
    check(told, MANY)
    for way in STAGES:
        assert sum(sum(rank["tiles"]) > 0 for rank in told["vision", way]) == 1
        assert not any(sum(rank["tiles"]) for kind in ("text", "bad") for rank in told[kind, way])
        assert len(told["bad", way][0]["bad"]) == 5 and not any(told["bad", way][0]["losses"])
