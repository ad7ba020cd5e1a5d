"""The quickstart: its data, tokenizer and report by themselves, and the whole of it by its one command."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest
from sklearn.datasets import load_digits

from internvl.constants import SPECIAL_TOKENS
from internvl.conversation import get_conv_template
from internvl.model.tokenizers.loading import load_tokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "internvl_chat/tools/quickstart"))

import digits  # noqa: E402
import evaluate  # noqa: E402
import page  # noqa: E402
import report  # noqa: E402
import tiny_model  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    digits.write(folder)
    return folder


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scans(path: Path) -> list[int]:
    return [int(Path(record["image"]).stem.split("_")[0]) for record in records(path)]


def test_no_held_out_scan_is_trained_on_in_either_look(data):
    assert scans(data / "plain_heldout.jsonl") == scans(data / "shifted_heldout.jsonl")
    held_out = set(scans(data / "plain_heldout.jsonl"))
    train = {look: set(scans(data / f"{look}_train.jsonl")) for look in digits.LOOKS}
    assert len(held_out) == 500 and all(len(numbers) == 1297 for numbers in train.values())
    assert not held_out & (train["plain"] | train["shifted"])


def test_the_seed_decides_every_byte(data, tmp_path):
    scans, labels = load_digits(return_X_y=True)
    scans = scans.reshape(-1, 8, 8)
    for look in digits.LOOKS:
        (tmp_path / look).mkdir()
        for record in records(data / f"{look}_train.jsonl")[::500]:
            number, copy = map(int, Path(record["image"]).stem.split("_"))
            made = (tmp_path, look, number, copy, scans[number], labels[number])
            assert digits.draw(*made, seed=digits.SEED) == record
            assert (tmp_path / record["image"]).read_bytes() == (data / record["image"]).read_bytes()
            digits.draw(*made, seed=digits.SEED + 1)
            same = (tmp_path / record["image"]).read_bytes() == (data / record["image"]).read_bytes()
            assert same == (look == "plain" and copy == 0)  # the scan as it is


def test_the_shifted_look_is_the_same_scan_inverted_and_turned(data):
    for record in records(data / "shifted_heldout.jsonl")[:20]:
        after = np.asarray(Image.open(data / record["image"]), dtype=float)
        before = np.asarray(Image.open(data / record["image"].replace("shifted", "plain")), dtype=float)
        assert np.corrcoef(np.rot90(255 - before).ravel(), after.ravel())[0, 1] > 0.8
        assert abs(np.corrcoef(before.ravel(), after.ravel())[0, 1]) < 0.8


def test_every_answer_names_its_digit_and_nothing_else_counts(data):
    for record in records(data / "plain_heldout.jsonl"):
        assert evaluate.parse(record["conversations"][1]["value"]) == record["digit"]
    for answer in ("", "seven", "77", "7 or 1", "I see a 7.", "The digit is", "The digit is 7. "):
        assert evaluate.parse(answer) is None


def test_the_tokenizer_gives_back_every_text(data, tmp_path):
    made = tiny_model.train_tokenizer(tiny_model.texts(data / "plain_train.jsonl"))
    made.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    system = get_conv_template(tiny_model.TEMPLATE).system_message
    for text in ("The digit is 7.", system, "naïve  ünïcode ☃\n\ttabs", "<|im_start|>user\n<img><IMG_CONTEXT></img>"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text and ids == made(text).input_ids
    for token in (*SPECIAL_TOKENS, "<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert tokenizer(token).input_ids == [tokenizer.convert_tokens_to_ids(token)]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_wilson_interval_is_scipys():
    for correct, total in ((0, 1), (1, 1), (0, 10), (5, 10), (10, 10), (486, 500), (500, 500)):
        expected = binomtest(correct, total).proportion_ci(method="wilson")
        assert report.wilson(correct, total) == pytest.approx((expected.low, expected.high), abs=1e-6)


class References(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found += [v for name, v in attributes if name in ("src", "href", "data", "srcset", "xlink:href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        """Closed by itself."""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_stands_alone(data):
    images = [record["image"] for record in records(data / "shifted_heldout.jsonl")[:3]]
    results = {
        "rows": [{"total": 500}],
        "merged_differs": 0,
        "losses": {"base": [(1, 3.0), (2, 1.0)], "adapted": [(1, 2.0), (2, 0.5), (3, 0.2)]},
        "pictures": [{"image": i, "digit": 7, "before": "<script>", "after": "7"} for i in images],
        "seconds": 100,
    }
    text = page.page(results, [report.COLUMNS, ("base", "plain", "97.2%", "95.4% - 98.3%", "60 s", "")], data)
    references = References(text)
    assert len(references.found) == 3 and all(found.startswith("data:image/png") for found in references.found)
    assert references.open == [] and "<script" not in text
    assert not re.search(r"url\(|@import|https?://", text)


def quickstart(*options: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "INTERNVL_VENV": "none", **environment}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    command = ["bash", str(ROOT / "shell/quickstart.sh"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_an_unknown_option_is_one_sentence_and_status_2(tmp_path):
    done = quickstart("--fast", OUTPUT_DIR=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--fast" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    done = quickstart("--fresh", OUTPUT_DIR=str(tmp_path))
    assert done.returncode == 1 and str(tmp_path) in done.stderr and (tmp_path / "data").exists()


@pytest.mark.slow
def test_the_main_job_end_to_end(tmp_path):
    done = quickstart(OUTPUT_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    read = {(row["model"], row["look"]): row["accuracy"] for row in results["rows"]}
    assert read["base", "plain"] >= 0.95
    assert read["base", "shifted"] < 0.30
    assert read["adapted", "shifted"] >= 0.90
    assert abs(read["merged", "shifted"] - read["adapted", "shifted"]) <= 0.01
    assert results["merged_differs"] <= 5
    for model, look in (("base", "plain"), ("adapted", "shifted"), ("merged", "shifted")):
        found = json.loads((tmp_path / f"answers_{model}.json").read_text())[f"{look}_heldout"]
        assert found["chat_agrees"] == evaluate.SPOT_CHECKS
    assert (tmp_path / "report.html").stat().st_size > 50_000
    assert all(f"{row['accuracy']:.1%}" in done.stdout for row in results["rows"])

    # A second run repeats nothing; a stage that fails names itself and its log.
    again = quickstart(OUTPUT_DIR=str(tmp_path))
    assert again.returncode == 0 and again.stdout.count("done before") == again.stdout.count("quickstart.sh: ")
    (tmp_path / "done/merged").unlink()
    shutil.rmtree(tmp_path / "models/adapted")
    failed = quickstart(OUTPUT_DIR=str(tmp_path))
    assert failed.returncode == 1 and "merged" in failed.stderr and str(tmp_path / "logs/merged.log") in failed.stderr
