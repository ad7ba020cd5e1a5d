"""Every command block of the site runs, or says why it does not."""

import re
import shutil
from pathlib import Path

import pytest
from helpers.command_blocks import TRAINING, CommandBlock, read_command_blocks, run_command_block, write_reader_folder
from helpers.paths import REPO_ROOT

PAGES = [
    *sorted(REPO_ROOT.glob("docs/*.md")),
    *(REPO_ROOT / name for name in ("CONTRIBUTING.md", "internvl_chat/tools/README.md", "tests/README.md")),
]
BLOCKS = {str(page.relative_to(REPO_ROOT)): read_command_blocks(page) for page in PAGES}
RUNNABLE = {name: [block for block in blocks if not block.reason] for name, blocks in BLOCKS.items()}


def test_most_blocks_run():
    assert sum(map(len, RUNNABLE.values())) > 20
    other_names = [
        page.name for page in PAGES if re.search(r"^```(sh|shell|console|py)$", page.read_text(), re.MULTILINE)
    ]
    assert not other_names, "expected ```bash or ```python, whose blocks are run"


def test_tests_named_as_reasons_exist():
    reasons = [block.reason or "" for blocks in BLOCKS.values() for block in blocks]
    named = [path for reason in reasons for path in re.findall(r"tests/[\w/.]*\w", reason)]
    assert named and not [path for path in named if not (REPO_ROOT / path).exists()]


@pytest.fixture(scope="module")
def reader_folder(goldens, tmp_path_factory) -> Path:
    """Make a folder with a model, data and the result of a run, as the pages assume."""
    folder = tmp_path_factory.mktemp("reader")
    write_reader_folder(folder, goldens)
    done = run_command_block(CommandBlock(TRAINING, "bash", None, 0), folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    shutil.copytree(folder / "work_dirs/my_run", folder / "work_dirs/quickstart/models/adapted")
    (folder / "work_dirs/quickstart/data/shifted").mkdir(parents=True)
    shutil.copy(folder / "cat.jpg", folder / "work_dirs/quickstart/data/shifted/0000_0.png")
    return folder


@pytest.mark.e2e
@pytest.mark.parametrize("name", [name for name, blocks in RUNNABLE.items() if blocks])
def test_command_blocks_of_a_page_run(name, reader_folder, tmp_path):
    folder = tmp_path / "reader"
    shutil.copytree(reader_folder, folder, symlinks=True)
    for block in RUNNABLE[name]:
        done = run_command_block(block, folder)
        assert done.returncode == 0, f"{name}:{block.line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
