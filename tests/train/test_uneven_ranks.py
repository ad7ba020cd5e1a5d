"""Train on data that falls unevenly on the ranks.

With DDP and each ZeRO stage, ranks without an image or a row must not hang, and all end with the same parameters.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from helpers.paths import REPO_ROOT
from helpers.training_runs import FREEZE_ALL, TRAIN_ADAPTERS, ZERO_FLAGS, copy_tiny_model
from PIL import Image

from internvl.launchers import find_free_port

VISION_LORA, LLM_LORA = [*FREEZE_ALL, "--use_backbone_lora", "4"], [*FREEZE_ALL, "--use_llm_lora", "4"]
PACKED = [
    *TRAIN_ADAPTERS,
    *"--use_packed_ds True --max_packed_tokens 512 --num_images_expected 6 --strict_mode False".split(),
]
NO_RECOMPUTATION = [*TRAIN_ADAPTERS, "--grad_checkpoint", "False", "--loss_reduction_all_gather", "True"]
STRATEGIES = {"ddp": [], "zero2": ZERO_FLAGS["zero2"], "zero3": ZERO_FLAGS["zero3"]}

# Name of a run: its records in `programs/uneven_ranks.py`, then its flags.
TWO_RANK_RUNS = {"vision": ("uneven tiles", *VISION_LORA), "unusable": ("one image deleted", *NO_RECOMPUTATION)}
FOUR_RANK_RUNS = {
    "vision": ("one image", *VISION_LORA),
    "llm": ("uneven tiles", *LLM_LORA),
    "full": ("uneven tiles",),
    "text": ("no image", *VISION_LORA),
    "unusable": ("all images deleted", *TRAIN_ADAPTERS),
    "packed": ("uneven tiles", *PACKED),
}


pytestmark = pytest.mark.multiprocess


@pytest.fixture
def train(goldens, tmp_path) -> Callable[[int, dict], dict]:
    """Return a function that trains runs with every strategy.

    It returns the results of each rank, keyed by run and strategy. A hang fails after 400 s.
    """
    copy_tiny_model(goldens, tmp_path)
    noise = Image.effect_noise((60, 40), 80).convert("RGB")
    noise.save(tmp_path / "small.png")
    noise.resize((300, 60)).save(tmp_path / "wide.png")

    def train(ranks: int, runs: dict) -> dict[tuple[str, str], list[dict]]:
        all_runs = {f"{run}-{name}": [*runs[run], *flags] for name, flags in STRATEGIES.items() for run in runs}
        torchrun = [REPO_ROOT / "shell/torchrun.py", f"--nproc_per_node={ranks}", f"--master_port={find_free_port()}"]
        program = REPO_ROOT / "tests/programs/uneven_ranks.py"
        command = [sys.executable, *torchrun, program, tmp_path, json.dumps(all_runs)]
        env = os.environ | {"PYTHONPATH": f"{REPO_ROOT}/internvl_chat:{REPO_ROOT}/tests", "OMP_NUM_THREADS": "1"}
        env["INTERNVL_CACHE"] = str(tmp_path / "cache")
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        results = json.loads((tmp_path / "results.json").read_text())
        return {tuple(name.split("-")): ranks for name, ranks in results.items()}

    return train


def check_all_runs_finished(results: dict, runs: dict) -> None:
    """Assert that each run finished and its ranks agree.

    All ranks have the same parameters at the end, and losses equal those without DeepSpeed.
    """
    assert results.keys() == {(run, strategy) for strategy in STRATEGIES for run in runs}
    for (run, strategy), ranks in results.items():
        first, reference = ranks[0], results[run, "ddp"][0]
        assert first["steps"][0] == first["steps"][1] > 0, (run, strategy)
        assert len({rank["digest"] for rank in ranks}) == 1, (run, strategy)
        assert first["losses"] == pytest.approx(reference["losses"], abs=1e-4), (run, strategy)
        assert len(first["losses"]) == first["steps"][0]


def test_two_ranks_with_a_rank_without_images_and_a_deleted_image(train):
    results = train(2, TWO_RANK_RUNS)
    check_all_runs_finished(results, TWO_RANK_RUNS)
    for strategy in STRATEGIES:
        with_images, without_images = (sum(rank["tiles"]) for rank in results["vision", strategy])
        assert with_images and not without_images, "one rank has no image, and only vision adapters are trainable"
        (unusable,) = results["unusable", strategy][0]["bad"]
        assert "deleted.png does not exist" in unusable


def test_four_ranks_with_at_most_two_rows_per_step(train):
    results = train(4, FOUR_RANK_RUNS)
    check_all_runs_finished(results, FOUR_RANK_RUNS)
    for strategy in STRATEGIES:
        assert sum(sum(rank["tiles"]) > 0 for rank in results["vision", strategy]) == 1
        assert not any(sum(rank["tiles"]) for run in ("text", "unusable") for rank in results[run, strategy])
        unusable = results["unusable", strategy][0]
        assert len(unusable["bad"]) == 5 and not any(unusable["losses"])
