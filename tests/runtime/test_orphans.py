"""Nothing runs on when a process above the training is killed."""

import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from helpers.live_runs import HANG_SECONDS, count_logged_steps, wait_until
from helpers.paths import VISION_LORA_RECIPE
from helpers.training_runs import TRAIN_ADAPTERS, build_launch_command, build_run_environment

pytestmark = pytest.mark.multiprocess
ENDLESS = "--max_steps 100000 --save_strategy no --no_smoke_save --dataloader_num_workers 1".split()


def list_descendants(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def assert_all_end(processes: list[psutil.Process], log: Path) -> float:
    """Wait for the end of all processes; return the seconds until then."""
    start = time.monotonic()
    _, alive = psutil.wait_procs(processes, HANG_SECONDS)
    for process in alive:
        process.kill()
    assert not alive, f"{alive} run on: {log.read_text()[-3000:]}"
    return time.monotonic() - start


@pytest.mark.parametrize("seconds", [0, 3, None])
def test_ranks_end_with_a_killed_torchrun(tiny_inputs, tmp_path, seconds):
    """Kill it as soon as both ranks exist, while they start, and in training (None)."""
    command, env = build_launch_command(tiny_inputs, tmp_path / "out", *TRAIN_ADAPTERS, *ENDLESS, ranks=2)
    log = tmp_path / "log"
    with log.open("wb") as file:
        run = psutil.Popen(command, env=env, stdout=file, stderr=file)
    if seconds is None:
        wait_until(lambda: count_logged_steps(log.read_text()), log.read_text, processes=[run])
    else:
        wait_until(lambda: len(run.children()) == 2, log.read_text, processes=[run])
        time.sleep(seconds)
    processes = list_descendants(run)
    run.kill()
    assert assert_all_end(processes, log) < 20


def test_a_run_whose_shell_is_killed_saves_and_ends(tiny_inputs, tmp_path):
    flags = "--force_image_size 56 --max_dynamic_patch 4 --max_seq_length 512 --bf16 False --max_steps 100000".split()
    flags += ["--use_packed_ds", "False"]
    flags += "--save_steps 1000000 --lr_scheduler_type constant --warmup_ratio 0 --dataloader_num_workers 1".split()
    variables = {"MODEL_PATH": tiny_inputs / "model", "META_PATH": tiny_inputs / "meta.json", "ZERO_CONFIG": "none"}
    variables |= {"GPUS": 2, "BATCH_SIZE": 2, "PER_DEVICE_BATCH_SIZE": 1, "OUTPUT_DIR": tmp_path / "out"}
    env = build_run_environment(tiny_inputs) | {name: str(value) for name, value in variables.items()}
    command = ["bash", VISION_LORA_RECIPE, *flags, "--report_to", "none"]
    shell = psutil.Popen(
        command, env=env | {"INTERNVL_VENV": "none"}, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    log = tmp_path / "out/training_log.txt"
    wait_until(lambda: log.exists() and count_logged_steps(log.read_text()) >= 2, log.read_text, processes=[shell])
    processes = list_descendants(shell)
    assert {"tee"} <= {process.name() for process in processes}
    shell.send_signal(signal.SIGKILL)
    assert_all_end(processes, log)
    assert re.search(
        r"Stopping after step (\d+) \(SIGTERM\): the same command resumes from checkpoint-\1", log.read_text()
    )
    assert not (tmp_path / "out/run.lock").exists()
