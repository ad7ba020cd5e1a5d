"""Command blocks of the documentation, and a folder in which they run with a tiny model."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from helpers.paths import PACKAGE_DIR
from helpers.training_runs import copy_tiny_model

MODEL = "OpenGVLab/InternVL2_5-2B"  # as in the pages: a folder of this name comes before the hub
TRAINING = "internvl train internvl2.5/2b_vit_lora --meta_path my_data.json --output_dir work_dirs/my_run"
# Added to every training: rows, tiles and steps of a tiny model.
SMALL = "--force_image_size 56 --max_packed_tokens 512 --max_seq_length 512 --strict_mode False --max_steps 2"
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>bash|python)\n(?P<code>.*?)^```",
    re.MULTILINE | re.DOTALL,
)


class CommandBlock(NamedTuple):
    """A block of commands; `reason` says why it cannot run in a test, or is None."""

    code: str
    language: str
    reason: str | None
    line: int


def read_command_blocks(page: Path) -> list[CommandBlock]:
    """Read the blocks of shell commands and of Python in a page."""
    text = page.read_text(encoding="utf-8")
    return [
        CommandBlock(match["code"], match["language"], match["reason"], text[: match.start("code")].count("\n") + 1)
        for match in BLOCK.finditer(text)
    ]


def write_reader_folder(folder: Path, goldens: Path) -> None:
    """Write what the pages assume: a model, data sets, an image, and the command `internvl`."""
    copy_tiny_model(goldens, folder)
    (folder / MODEL).parent.mkdir()
    (folder / "model").rename(folder / MODEL)
    (folder / MODEL.replace("2B", "8B")).symlink_to(Path(MODEL).name)
    shutil.copytree(goldens / "dataset/images", folder / "data/images")
    lines = (goldens / "dataset/ds_main.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["conversations"][-1]["value"]]
    for name, split, entry in (
        ("my_data", records, {}),
        ("my_eval", records[:2], {"metric": "anls"}),
    ):
        (folder / f"data/{name}.jsonl").write_text("\n".join(map(json.dumps, split)))
        entry |= {"root": "data/images/", "annotation": f"data/{name}.jsonl"}
        (folder / f"{name}.json").write_text(json.dumps({"receipts": entry}))  # the pages name eval/receipts/anls
    (folder / "questions.jsonl").write_text(json.dumps(records[0] | {"image": "cat.jpg"}))
    shutil.copy(folder / "data/images/im0.png", folder / "cat.jpg")
    command = folder / "bin/internvl"
    command.parent.mkdir()
    command.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = train ] && [ "$2" != --list ] && set -- "$@" {SMALL}\n'
        f'exec {sys.executable} -m internvl "$@"\n'
    )
    command.chmod(0o755)


def run_command_block(block: CommandBlock, folder: Path) -> subprocess.CompletedProcess:
    """Run a block in a folder of `write_reader_folder`, as a reader would; the first error ends it."""
    programs = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    environment = os.environ | {
        "PATH": os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(PACKAGE_DIR),
        "INTERNVL_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [*programs[block.language], block.code]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
