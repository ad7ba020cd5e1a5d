"""Which checkpoint a run goes on from: the newest whole one, whatever was done to the others."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.training_runs import ENTRY, LORA, ROOT, losses, run, started, weights

from internvl.arguments.training import parse_args
from internvl.checkpoint.manifest import MANIFEST_FILE, find_checkpoint_errors, write_manifest
from internvl.checkpoint.resume import choose_resume_checkpoint

ADAPTER = "vision_model/adapter_model.safetensors"


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    """A run with checkpoints at steps 2, 4 and 6."""
    output = tmp_path_factory.mktemp("restart") / "whole"
    run(tiny, output, *LORA, "--save_steps", "2")
    return output


def cut(name: str, share: float = 0.5):
    def damage(checkpoint: Path) -> None:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: int(len(content) * share)])

    return damage


def flip(name: str):
    """One bit in the middle of a file."""

    def damage(checkpoint: Path) -> None:
        content = bytearray((checkpoint / name).read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / name).write_bytes(content)

    return damage


def lose(name: str):
    return lambda checkpoint: (checkpoint / name).unlink()


def without_manifest(damage):
    """As an earlier version wrote it."""

    def both(checkpoint: Path) -> None:
        damage(checkpoint)
        (checkpoint / MANIFEST_FILE).unlink()

    return both


DAMAGES = {
    "adapter cut short": (cut(ADAPTER), f"{ADAPTER} has [0-9,]+ bytes, not"),
    "adapter with a flipped bit": (flip(ADAPTER), f"{ADAPTER} holds other bytes than were written"),
    "adapter lost": (lose(ADAPTER), f"{ADAPTER} is missing"),
    "optimizer with a flipped bit": (flip("optimizer.pt"), "optimizer.pt holds other bytes"),
    "optimizer empty": (cut("optimizer.pt", 0), "optimizer.pt has 0 bytes"),
    "empty state": (cut("trainer_state.json", 0), "trainer_state.json has 0 bytes"),
    "no state": (lose("trainer_state.json"), "trainer_state.json is missing"),
    "manifest cut short": (cut(MANIFEST_FILE), f"{MANIFEST_FILE} is damaged"),
    "manifest empty": (cut(MANIFEST_FILE, 0), f"{MANIFEST_FILE} is damaged"),
    "no manifest, adapter cut short": (without_manifest(cut(ADAPTER)), f"{ADAPTER} has [0-9,]+ bytes, not"),
    "no manifest, adapter empty": (without_manifest(cut(ADAPTER, 0)), f"{ADAPTER} is damaged"),
    "no manifest, empty JSON": (without_manifest(cut("data_state.json", 0)), "data_state.json is damaged"),
}


@pytest.fixture
def choose(tiny, whole, tmp_path):
    """What a run in a copy of the run's folder would go on from, given its damaged checkpoints and flags."""
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out/config.json").unlink()

    def choose(*flags: str, damage=None, of: tuple[int, ...] = ()) -> str | None:
        for step in of:
            damage(tmp_path / f"out/checkpoint-{step}")
        flags = ["--model_name_or_path", str(tiny / "model"), "--output_dir", str(tmp_path / "out"), *flags]
        return choose_resume_checkpoint(parse_args(flags)[2])

    return choose


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(choose, tmp_path, caplog, damage, reason):
    assert Path(choose(damage=damage, of=(6,))).name == "checkpoint-4"
    assert Path(choose("--resume_from_checkpoint", "auto")).name == "checkpoint-4"
    (message,) = {record.getMessage() for record in caplog.records}
    assert message.startswith(f"{tmp_path}/out/checkpoint-6 is passed over: ")
    assert re.search(reason, message)
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint .*checkpoint-6.*({reason}|no checkpoint)"):
        choose("--resume_from_checkpoint", str(tmp_path / "out/checkpoint-6"))


def test_all_checkpoints_are_damaged(choose):
    with pytest.raises(ValueError, match="no checkpoint of 3 in .* is whole .checkpoint-2: .*starts afresh"):
        choose(damage=cut(ADAPTER), of=(2, 4, 6))


def test_numbers_not_names_tell_which_is_newer(choose, tmp_path):
    (tmp_path / "out/checkpoint-2").rename(tmp_path / "out/checkpoint-10")
    (tmp_path / "out/checkpoint-best").mkdir()
    assert Path(choose()).name == "checkpoint-10"
    assert choose("--overwrite_output_dir", "True") is None


def test_large_files_are_checked_block_by_block(whole, tmp_path):
    """Every block of every file: with small blocks, a bit in any of them is found, and only there."""
    folder = tmp_path / "checkpoint-6"
    shutil.copytree(whole / "checkpoint-6", folder)
    write_manifest(folder, write=True, block=1000)
    entry = json.loads((folder / MANIFEST_FILE).read_text())["files"][ADAPTER]
    assert len(entry["crc32"]) == -(-entry["size"] // 1000) > 3
    assert find_checkpoint_errors(folder) == []
    flip(ADAPTER)(folder)
    assert find_checkpoint_errors(folder) == [f"{ADAPTER} holds other bytes than were written"]
    flip(ADAPTER)(folder)
    assert find_checkpoint_errors(folder) == []


@pytest.mark.slow
def test_two_ranks_pass_over_the_same_and_end_as_if_nothing_had_been(tiny, tmp_path):
    """Also where only one checkpoint may be kept, and the damaged one has the higher number."""
    run(tiny, tmp_path / "whole", *LORA, "--save_steps", "2", ranks=2)
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    flip("optimizer.pt")(tmp_path / "out/checkpoint-6")
    flags = [*LORA, "--save_steps", "1", "--save_total_limit", "1", "--max_steps", "5"]
    printed = run(tiny, tmp_path / "out", *flags, ranks=2).stdout
    assert printed.count("checkpoint-6 is passed over: optimizer.pt holds other bytes than were written") == 1
    assert f"resuming from {tmp_path / 'out/checkpoint-4'}" in printed
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-5"]
    run(tiny, tmp_path / "out", *LORA, ranks=2)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


LIVES = [*LORA, "--max_steps", "40", "--save_steps", "1", "--save_total_limit", "2"]


def live(tiny: Path, folder: Path, kills: int) -> list[str]:
    """Runs of `kill_and_resume.py` in a new folder; what it prints."""
    folder.mkdir()
    command, env = started(tiny, folder, *LIVES, ranks=2)
    flags = command[command.index(str(ENTRY)) + 1 :]
    command = [sys.executable, ROOT / "tests/programs/kill_and_resume.py", str(kills), "20", folder, *flags]
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
    logs = "".join(log.read_text()[-2000:] for log in folder.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:] + logs
    return done.stdout.splitlines()


@pytest.mark.slow
def test_killed_thirty_times_a_run_ends_as_if_it_had_not_been(tiny, tmp_path):
    """kill -9 of a rank, or of both, at moments drawn by a seed: the same adapters and losses, to the last bit."""
    live(tiny, tmp_path / "whole", kills=0)
    lives = live(tiny, tmp_path / "broken", kills=30)
    assert lives[-1].startswith("30 kills"), lives
    finished = [path for path in (tmp_path / "broken").iterdir() if path.is_dir()]
    assert finished
    for output in finished:
        assert losses(output) == losses(tmp_path / "whole/1"), lives
        for part in ("vision_model", "language_model"):
            ours, theirs = (folder / part / "adapter_model.safetensors" for folder in (output, tmp_path / "whole/1"))
            assert ours.read_bytes() == theirs.read_bytes(), lives
        assert not (output / "unfinished").exists()
    print("\n".join(lives))
