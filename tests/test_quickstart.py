"""The quickstart's data, tokenizer and summary, and its command."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.paths import REPO_ROOT
from helpers.vllm_environment import make_vllm_environment_or_skip, run_engine
from PIL import Image
from sklearn.datasets import load_digits

from internvl.constants import SPECIAL_TOKENS
from internvl.conversation import get_conv_template
from internvl.evaluation.scores import score
from internvl.model.auxiliary_files import read_normalization
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tools.check_served import load_tiles
from internvl.tools.export_adapters import main as export_adapters
from internvl.tools.internvl_custom2hf import main as custom2hf
from internvl.tools.merge_lora import main as merge

sys.path.insert(0, str(REPO_ROOT / "internvl_chat/tools/quickstart"))

import digits  # noqa: E402
import tiny_model  # noqa: E402

NUM_SERVED = 40  # questions that vLLM is asked, too


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    digits.write_dataset(folder)
    return folder


def read_records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def list_scans(path: Path) -> list[int]:
    return [int(Path(record["image"]).stem.split("_")[0]) for record in read_records(path)]


@pytest.mark.e2e
def test_no_scan_is_in_two_splits(data):
    numbers = {
        split: [list_scans(data / f"{domain}_{split}.jsonl") for domain in digits.DOMAINS]
        for split in ("train", "validation", "heldout")
    }
    assert all(plain == shifted for plain, shifted in numbers.values())
    scans = {split: set(plain) for split, (plain, _) in numbers.items()}
    assert {split: len(part) for split, part in scans.items()} == {"train": 1197, "validation": 100, "heldout": 500}
    assert len(set().union(*scans.values())) == 1797


def test_seed_decides_every_byte(data, tmp_path):
    scans, labels = load_digits(return_X_y=True)
    scans = scans.reshape(-1, 8, 8)
    for domain in digits.DOMAINS:
        (tmp_path / domain).mkdir()
        for record in read_records(data / f"{domain}_train.jsonl")[::500]:
            number, copy = map(int, Path(record["image"]).stem.split("_"))
            arguments = (tmp_path, domain, number, copy, scans[number], labels[number])
            assert digits.write_sample(*arguments, seed=digits.SEED) == record
            assert (tmp_path / record["image"]).read_bytes() == (data / record["image"]).read_bytes()
            digits.write_sample(*arguments, seed=digits.SEED + 1)
            is_same = (tmp_path / record["image"]).read_bytes() == (data / record["image"]).read_bytes()
            assert is_same == (domain == "plain" and copy == 0)  # the only images without randomness


def test_shifted_digits_are_inverted_and_rotated_scans(data):
    for record in read_records(data / "shifted_heldout.jsonl")[:20]:
        shifted = np.asarray(Image.open(data / record["image"]), dtype=float)
        plain = np.asarray(Image.open(data / record["image"].replace("shifted", "plain")), dtype=float)
        assert np.corrcoef(np.rot90(255 - plain).ravel(), shifted.ravel())[0, 1] > 0.8
        assert abs(np.corrcoef(plain.ravel(), shifted.ravel())[0, 1]) < 0.8


def test_only_the_right_digit_is_correct(data):
    for record in read_records(data / "plain_heldout.jsonl"):
        scored = {"references": record["answers"], "prediction": record["conversations"][1]["value"]}
        assert score("exact_match", scored) == 1
        for answer in ("", "seven", "77", "7 or 1", "I see a 7.", "The digit is", "The digits are 7."):
            assert score("exact_match", scored | {"prediction": answer}) == 0


def test_tokenizer_restores_every_text(data, tmp_path):
    trained = tiny_model.train_tokenizer(tiny_model.read_texts(data / "plain_train.jsonl"))
    trained.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    system = get_conv_template(tiny_model.TEMPLATE).system_message
    for text in ("The digit is 7.", system, "naïve  ünïcode ☃\n\ttabs", "<|im_start|>user\n<img><IMG_CONTEXT></img>"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text and ids == trained(text).input_ids
    for token in (*SPECIAL_TOKENS, "<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert tokenizer(token).input_ids == [tokenizer.convert_tokens_to_ids(token)]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def run_quickstart(*options: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "INTERNVL_VENV": "none", **environment}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    command = ["bash", str(REPO_ROOT / "shell/quickstart.sh"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_unknown_option_is_one_line_and_status_2(tmp_path):
    process = run_quickstart("--fast", OUTPUT_DIR=str(tmp_path))
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and "--fast" in process.stderr
    assert not list(tmp_path.iterdir())


def test_folder_with_other_files_is_rejected(tmp_path):
    (tmp_path / "data").mkdir()
    process = run_quickstart("--fresh", OUTPUT_DIR=str(tmp_path))
    assert process.returncode == 1 and str(tmp_path) in process.stderr and (tmp_path / "data").exists()


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The output folder of a quickstart, and its process."""
    folder = tmp_path_factory.mktemp("quickstart")
    process = run_quickstart(OUTPUT_DIR=str(folder))
    assert process.returncode == 0, process.stdout + process.stderr
    return folder, process


@pytest.mark.e2e
def test_quickstart_end_to_end(quickstart):
    folder, process = quickstart
    results = json.loads((folder / "results.json").read_text())
    accuracy = {(row["model"], row["domain"]): row["accuracy"] for row in results["rows"]}
    assert accuracy["base", "plain"] >= 0.95
    assert accuracy["base", "shifted"] < 0.30
    assert accuracy["adapted", "shifted"] >= 0.90
    assert abs(accuracy["merged", "shifted"] - accuracy["adapted", "shifted"]) <= 0.01
    assert results["num_merged_differences"] <= 5
    assert (folder / "report.html").stat().st_size > 50_000
    assert "8.0 samples per row" in (folder / "logs/adapted.log").read_text(), "the recipe packs"
    assert all(f"{row['accuracy']:.1%}" in process.stdout for row in results["rows"])

    # In a pipe: a line every half minute, and neither progress bars nor warnings of libraries.
    console = process.stdout + process.stderr
    assert not re.search(r"\r|it/s|warning|CUDA|DeepSpeed", console, re.IGNORECASE)
    seconds = int((folder / "done/base").read_text())
    progress = re.findall(r"^ +\d+:[03]0  step \d+/\d+, loss [\d.]+, left [\d:]+$", console, re.MULTILINE)
    assert len(progress) >= (seconds > 60) and console.count("\n") < 40 + results["seconds"] / 30


@pytest.mark.e2e
@pytest.mark.serving
def test_vllm_answers_as_chat_does(quickstart, tmp_path):
    python, models = make_vllm_environment_or_skip(), quickstart[0] / "models"
    merge([str(models / "adapted"), str(tmp_path / "merged"), "--dtype", "float32", "--with_remote_code"])
    custom2hf(["--custom_path", str(tmp_path / "merged"), "--save_path", str(tmp_path / "native")])
    flags = ["--layout", "chat", "--write_base", str(tmp_path / "base"), "--with_remote_code"]
    export_adapters([str(models / "adapted"), str(tmp_path / "adapter"), *flags])
    records = read_records(quickstart[0] / "data/shifted_heldout.jsonl")[:NUM_SERVED]
    images = [quickstart[0] / "data" / record["image"] for record in records]
    texts = [record["conversations"][0]["value"] for record in records]
    questions = [[text.replace("<image>\n", ""), str(path)] for text, path in zip(texts, images, strict=True)]
    adapters = {"merged": {}, "native": {}, "base": {"adapted": tmp_path / "adapter"}}
    jobs = [
        {"model": tmp_path / name, "adapters": paths, "max_tokens": 12, "questions": questions}
        for name, paths in adapters.items()
    ]
    merged, native, unmerged = run_engine(python, tmp_path, jobs)["answers"]

    def chat(folder: Path) -> list[str]:
        model = InternVLChatModel.from_pretrained(folder, dtype=torch.float32).eval()
        statistics = read_normalization(folder)
        tiles = [load_tiles(Image.open(path), model.config, statistics) for path in images]
        return [model.chat(tokenizer, t, text, {"max_new_tokens": 12}) for t, text in zip(tiles, texts, strict=True)]

    def decode(answers: list[list[int]]) -> list[str]:
        return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]

    tokenizer = load_tokenizer(models / "merged")
    adapted = chat(models / "adapted")
    assert sum(a in record["answers"] for a, record in zip(adapted, records, strict=True)) >= 0.8 * NUM_SERVED
    assert decode(merged["base"]) == decode(native["base"]) == decode(unmerged["adapted"]) == adapted
    assert decode(unmerged["base"]) == chat(models / "base") != adapted


@pytest.mark.e2e
def test_second_run_repeats_nothing_and_a_failed_stage_names_itself(quickstart):
    folder, _ = quickstart
    again = run_quickstart(OUTPUT_DIR=str(folder))
    assert again.returncode == 0 and again.stdout.count("skipped, done before") == again.stdout.count("/8] ") == 8
    (folder / "done/merged").unlink()
    shutil.rmtree(folder / "models/adapted")
    failed = run_quickstart(OUTPUT_DIR=str(folder))
    assert failed.returncode == 1 and "merged" in failed.stderr and str(folder / "logs/merged.log") in failed.stderr
