"""The notebook for one card: every cell runs, with a tiny model on the CPU."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from helpers.environments import layer_environment, make_layer_or_skip
from helpers.paths import PACKAGE_DIR, REPO_ROOT, TESTS_DIR

NOTEBOOK = REPO_ROOT / "examples/finetune_1b.ipynb"
LAYER = ("notebook", ["nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29", "ipywidgets>=8.0"])
PARAMETERS = {"IMAGE_SIZE": 224, "ROW_TOKENS": 448, "BATCH_SIZE": 2, "MAX_STEPS": 3, "EVAL_SAMPLES": 8}


def read_cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_has_no_outputs():
    codes = [cell for cell in read_cells() if cell["cell_type"] == "code"]
    assert codes and not any(cell["outputs"] or cell["execution_count"] for cell in codes)


def test_links_lead_to_files():
    texts = ["".join(cell["source"]) for cell in read_cells() if cell["cell_type"] == "markdown"]
    links = re.findall(r"\]\(([^)]+)\)", "\n".join(texts))
    assert links and not [link for link in links if not (NOTEBOOK.parent / link).is_file()]


@pytest.fixture(scope="module")
def base_model(tmp_path_factory) -> Path:
    """A tiny model with random weights whose tokenizer knows the digits' texts."""
    import numpy as np
    import torch

    from internvl.tools.quickstart import digits, tiny_model

    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("base")
    records = [digits.make_record("0.png", digit, rng) for digit in range(10) for _ in range(20)]
    torch.manual_seed(0)
    tokenizer = tiny_model.train_tokenizer(t["value"] for record in records for t in record["conversations"])
    model = tiny_model.build_model(tokenizer)
    model.save_pretrained(folder)
    tiny_model.save_tokenizer(tokenizer, model.config, folder)
    return folder


@pytest.mark.e2e
def test_every_cell_runs(base_model, tmp_path):
    python = make_layer_or_skip(*LAYER)
    command = tmp_path / "bin/internvl"  # as pip would write it
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {python} -m internvl "$@"\n')
    command.chmod(0o755)
    env = layer_environment(python, PYTHONPATH=str(PACKAGE_DIR), JUPYTER_PLATFORM_DIRS="1", OMP_NUM_THREADS="1")
    env["PATH"] = f"{command.parent}{os.pathsep}{env['PATH']}"
    parameters = json.dumps(PARAMETERS | {"MODEL": str(base_model), "WORK_DIR": "work"})
    words = [TESTS_DIR / "programs/run_notebook.py", NOTEBOOK, tmp_path / "executed.ipynb", parameters]
    done = subprocess.run([python, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    work = tmp_path / "work"
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "executed.ipynb", "work"}
    assert {path.name for path in work.iterdir()} == {"check_data", "data", "merged", "run"}
    outputs = [
        output
        for cell in json.loads((tmp_path / "executed.ipynb").read_text(encoding="utf-8"))["cells"]
        for output in cell.get("outputs", ())
    ]
    log = "".join("".join(output["text"]) for output in outputs if output.get("name") == "stdout")
    assert "samples             4,788 (0 skipped)" in log and "Training finished: 3 steps" in log
    assert log.count(", expected '") == 5 and "Comparison of" in log and "Kind:             merged checkpoint" in log
    shown = [kind for output in outputs for kind in output.get("data", ())]
    assert {"image/png", "text/html"} <= {*shown}
    assert not [output for output in outputs if "Warning" in "".join(output.get("text", ""))]
    assert json.loads((work / "merged/config.json").read_text())["force_image_size"] == PARAMETERS["IMAGE_SIZE"]
