"""tools/check_data.py reports what training skips, loses and uses although it is suspicious."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.odd_samples import make_odd_samples, write_media
from helpers.paths import REPO_ROOT
from helpers.samples import make_turns
from helpers.training_runs import (
    TRAIN_ADAPTERS,
    copy_tiny_model,
    prepare_trainer,
    remove_image_tokens,
    write_meta_file,
)

from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tools import check_data

FLAGS = """--conv_style internvl2_5 --force_image_size 56 --dynamic_image_size True --use_thumbnail True
    --max_dynamic_patch 4""".split()
PACKING = "--use_packed_ds True --max_packed_tokens 420".split()
FAULTS = REPO_ROOT / "tests/data/faults"


@pytest.fixture(scope="module")
def model(goldens, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    copy_tiny_model(goldens, folder)
    return folder / "model"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Make a folder for data, with its own cache."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def check(model, folder):
    """Return a function that checks `meta.json`; it returns the exit status."""

    def check(report: str, *flags: str) -> int | str:
        argv = [str(folder / "meta.json"), "--model_name_or_path", str(model), "--report", str(folder / report)]
        with pytest.raises(SystemExit) as end:
            check_data.main([*argv, *FLAGS, *flags])
        return end.value.code

    return check


def write_records(folder: Path, *records: dict, images: Path | None = None) -> None:
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    write_meta_file(folder, images or folder)


def read_plan(printed) -> dict[str, str]:
    """Return the lines of the printed epoch plan: name -> text."""
    text = printed if isinstance(printed, str) else printed.readouterr().out
    lines = text.partition("Epoch plan:\n")[2].partition("\n\n")[0].splitlines()
    return {line[:22].strip(): line[22:] for line in lines}


def read_reasons(report: Path) -> dict[int, str]:
    """Return line -> reason of the skipped samples."""
    entries = [json.loads(line) for line in (report / "skipped_samples.jsonl").read_text().splitlines()]
    return {entry["line"]: entry["reason"] for entry in entries}


def test_report_lists_skipped_samples_and_statistics(goldens, folder, check, capsys):
    lines = (goldens / "dataset/ds_main.jsonl").read_text().splitlines()
    write_meta_file(folder, goldens / "dataset/images")
    broken = dict(enumerate(lines)) | {3: lines[3].replace(".png", ".gif"), 5: lines[5][:40]}
    (folder / "train.jsonl").write_text("\n".join(broken.values()))
    assert check("broken", "--ranks", "2", *PACKING) == 1
    text = capsys.readouterr().out
    skipped = [json.loads(line) for line in (folder / "broken/skipped_samples.jsonl").read_text().splitlines()]
    reasons = {entry["line"]: entry["reason"] for entry in skipped}
    assert "does not exist" in reasons[4] and "line 6 is not JSON" in reasons[6]
    assert all(entry["dataset"] == "tiny" and entry["file"] == str(folder / "train.jsonl") for entry in skipped)
    expected = ["Most tiles:", "Smallest share of loss tokens:", "Tokens per sample:", "= 2 ranks x", "Epoch plan:"]
    for line in [*expected, f"Skipped samples: {len(skipped)}"]:
        assert line in text
    assert (folder / "broken/summary.txt").read_text().splitlines()[0] in text
    assert (folder / "broken/lengths.png").read_bytes().startswith(b"\x89PNG")

    good = [line for number, line in enumerate(lines, start=1) if number not in reasons]
    (folder / "train.jsonl").write_text("\n".join(good))
    assert check("good", *PACKING) == 0
    assert (folder / "good/skipped_samples.jsonl").read_text() == ""
    assert check("none", *PACKING, "--max_packed_tokens", "9") == 1, "no sample fits into a row"
    assert "do not fit into a row" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--conv_style", "vicuna"], "--conv_style vicuna"),
        (["--colour", "red"], "unknown flag: --colour red"),
        (["--ranks", "0"], "--ranks 0 is invalid: expected an integer from 1"),
    ],
)
def test_invalid_flags_are_one_error(check, flags, reason):
    assert str(check("report", *flags)).startswith(f"error: {reason}")


def test_damaged_pixels_are_found_by_decoding_only(folder, check, capsys):
    records = [json.loads(line) for line in (FAULTS / "F05_cut_pictures.jsonl").read_text().splitlines()]
    write_records(
        folder, *records, {"image": "plain.png", "conversations": make_turns("What?", "A.")}, images=FAULTS / "img"
    )
    assert check("headers") == 0 and not read_reasons(folder / "headers")
    assert "only headers were read. --decode also finds damage" in capsys.readouterr().out
    assert check("decoded", "--decode", "--dataloader_num_workers", "2") == 1
    reasons = read_reasons(folder / "decoded")
    assert reasons.keys() == {1, 2, 3} and all("cannot be read" in reason for reason in reasons.values())
    text = capsys.readouterr().out
    assert (
        "4 samples decoded, with the video frames of 3 epochs; 3 of them unusable" in text
        and "Skipped samples: 3" in text
    )


@pytest.mark.parametrize("packing", [[], [*PACKING, "--max_packed_tokens", "100", "--allow_overflow", "True"]])
def test_damaged_samples_are_in_no_table(folder, check, capsys, packing):
    """The plan is that of training, which finds them when it loads them: rows and steps stay, samples are fewer.

    With packing the damaged ones are pieces of split samples.
    """
    good = {"image": "plain.png", "conversations": make_turns("What?", "A.")}
    damaged = {"image": "cut_half.jpg", "conversations": make_turns("What?", "A long answer. " * 30)}
    write_records(folder, good, damaged, damaged, good, images=FAULTS / "img")
    check("headers", *packing)
    headers = read_plan(capsys)
    check("decoded", "--decode", *packing)
    text = capsys.readouterr().out
    decoded = read_plan(text)
    assert "Skipped samples: 2; --max_bad_samples allows 0, so training would end" in text
    assert headers["samples"] == "4 (0 skipped)"
    assert decoded["samples"] == "2 (2 skipped)" and decoded["rows"].split()[0] == headers["rows"].split()[0]
    assert decoded["steps per epoch"] == headers["steps per epoch"]
    assert decoded["truncated answers"].startswith("0 of 2 samples, ")
    (dataset_line,) = [line for line in text.splitlines() if line.startswith("tiny")]
    _, samples, skipped, tokens, *_ = dataset_line.split()
    assert (samples, skipped) == ("4", "2") and decoded["tokens"].startswith(f"{tokens}, of them ")
    write_records(folder, good, good, images=FAULTS / "img")
    check("good", *packing)
    kept = read_plan(capsys)
    assert [decoded[name] for name in ("tokens", "tiles")] == [kept[name] for name in ("tokens", "tiles")]


def test_truncated_answers_are_counted(folder, check, capsys):
    long_answer = json.loads((FAULTS / "F12_long_answer.jsonl").read_text())
    short = {"conversations": make_turns("Hi", "A.")}
    write_records(folder, short, long_answer, short)
    assert check("report", "--max_seq_length", "200") == 0
    text = capsys.readouterr().out
    (table_line,) = [line for line in text.splitlines() if "truncated answers" in line]
    assert "1 of 3 samples, " in table_line and "loss tokens lost (9" in table_line
    assert f"Truncated answers: {table_line.split(maxsplit=2)[2]}" in text
    assert f"tiny line 2 ({folder}/train.jsonl)" in text.partition("Most lost loss tokens:")[2].splitlines()[1]


def test_suspicious_texts_are_counted(folder, check, capsys):
    in_pixels = json.loads((FAULTS / "F13_boxes_in_pixels.jsonl").read_text())
    answers = {
        "boxes outside 0-1000": "<box>[[1, 2, 3, 4]]</box> <box>[[5, 6, 1000, 1001]]</box>",
        "boxes with x2 < x1 or y2 < y1": "<box>[[700, 200, 300, 400]]</box>",
        "boxes in fractions of 1, expected 0-1000": "<box>[[0.1, 0.2, 0.3, 0.4]]</box>",
        "empty answers": "A.",
        "control tokens of a chat template as text": "<|im_end|>",
        "placeholders other than <image> and <video>": "<Image>",
    }
    records = [{"conversations": make_turns("Hm?", answer)} for answer in answers.values()]
    records[3] = {"conversations": make_turns("Hm?", "A.", "Hm?", "")}
    fine = "<ref>cat</ref><box>[[0, 0, 1000, 1000], [1, 2, 3, 4]]</box> as <box>[[x1, y1, x2, y2]]</box> <img>"
    records += [{"conversations": make_turns("Hm?", fine)}]
    records += [{"conversations": [*make_turns("Hm?", "A."), {"from": "gpt", "value": "B."}]}]
    records += [{"conversations": make_turns("Hm?", "It is a cat."), "question": "Hm?", "answer": "cat", "label": 3}]
    records += [{"conversations": make_turns("Hm?", "A."), "Answer": "B. Because.", "caption": ["A", "cat"]}]
    write_records(folder, *records, in_pixels, images=FAULTS / "img")
    assert check("report") == 0, "they are used"
    section = capsys.readouterr().out.partition("Suspicious samples (used as they are):\n")[2].partition("\n\n")[0]
    counts = dict(line.strip().partition(", first ")[0].split(maxsplit=1)[::-1] for line in section.splitlines())
    unused = [f"content in the key {key}, which is not used" for key in ("Answer", "caption")]
    expected = dict.fromkeys([*answers, "human and gpt turns that do not alternate", *unused], "1")
    assert counts == expected | {"boxes outside 0-1000": "2"}
    assert f"first tiny line 1 ({folder}/train.jsonl)" in section


def test_preference_pairs_are_checked(folder, check, capsys):
    pair = {"question": "Hm?", "chosen": "A.", "rejected": "B."}
    boxes = pair | {"rejected": "<box>[[1, 2, 3, 4000]]</box>", "image": "plain.png"}
    write_records(folder, pair, pair | {"chosen": None}, boxes, pair | {"image": "crc.png"}, images=FAULTS / "img")
    assert check("report", "--preference", "--decode", "--max_seq_length", "1000") == 1
    reasons = read_reasons(folder / "report")
    assert reasons.keys() == {2, 4} and reasons[2] == "chosen: chosen must be a string, got None"
    assert f"1  boxes outside 0-1000, first tiny line 3 ({folder}/train.jsonl)" in capsys.readouterr().out


@pytest.mark.multiprocess
def test_names_that_are_no_text_are_printed_and_written(folder, model):
    """A lone surrogate stands for a byte of a file name that is not UTF-8; the terminal knows only ASCII."""
    write_records(folder, {"image": "\udce9é.png", "conversations": make_turns("What?", "A.")})
    argv = ["tools/check_data.py", folder / "meta.json", "--model_name_or_path", model, "--report", folder / "report"]
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, *map(str, argv), *FLAGS],
        cwd=REPO_ROOT / "internvl_chat",
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert r"\udce9\xe9.png does not exist" in done.stdout
    assert r"\udce9é.png does not exist" in read_reasons(folder / "report")[1]


@pytest.mark.multiprocess
def test_warnings_are_printed(folder, model, check):
    write_records(folder, {"conversations": make_turns("What?", "A.")})
    check("report")
    (lengths,) = (folder / "cache").glob("lengths-*.npy")
    lengths.write_bytes(lengths.read_bytes()[:-1] + b"?")
    argv = ["tools/check_data.py", folder / "meta.json", "--model_name_or_path", model, "--report", folder / "report"]
    done = subprocess.run(
        [sys.executable, *map(str, argv), *FLAGS],
        cwd=REPO_ROOT / "internvl_chat",
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and f"WARNING Damaged cache file: {lengths} (checksum mismatch)" in done.stderr


# -- models ------------------------------------------------------------------------------------------------------------


def test_new_tokens_of_the_tokenizer_are_named(folder, model, check, capsys):
    """Without the flags of training, too, which decide whether their rows are trained."""
    shutil.copytree(model, folder / "model")
    tokenizer = load_tokenizer(folder / "model")
    tokenizer.add_tokens(["<left>", "<right>"])
    tokenizer.save_pretrained(folder / "model")
    write_records(folder, {"conversations": make_turns("Where?", "<left>")}, {"conversations": make_turns("?", "A.")})
    flags = ["--model_name_or_path", str(folder / "model")]
    assert check("full", *flags) == 0
    text = capsys.readouterr().out
    assert "New tokens of the tokenizer: <left>, <right>. These flags add rows for them, and train them" in text
    assert check("lora", *flags, *TRAIN_ADAPTERS) == 1
    assert "These flags add rows for them, and do not train them: answers" in capsys.readouterr().out
    assert "an answer uses '<left>'" in read_reasons(folder / "lora")[1]
    assert check("none") == 0 and "New tokens" not in capsys.readouterr().out


def test_models_without_image_tokens_and_composed_models_are_checked(folder, model, check, capsys):
    """Training adds the tokens; of a composed model check_data reads the configurations of both parts."""
    record = {"image": "plain.png", "conversations": make_turns("What?", "A.")}
    write_records(folder, record, images=FAULTS / "img")
    assert check("complete") == 0
    expected = read_plan(capsys)
    shutil.copytree(model, folder / "llm")
    remove_image_tokens(folder / "llm")
    assert check("tokens", "--model_name_or_path", str(folder / "llm")) == 0
    assert read_plan(capsys) == expected
    config = json.loads((folder / "llm/config.json").read_text())["llm_config"]
    (folder / "llm/config.json").write_text(json.dumps(config))
    parts = ["--vision_path", str(model), "--llm_path", str(folder / "llm")]
    argv = [str(folder / "meta.json"), "--report", str(folder / "composed"), *parts, *FLAGS]
    with pytest.raises(SystemExit) as end:
        check_data.main(argv)
    assert end.value.code == 0 and read_plan(capsys) == expected


# -- agreement with training -------------------------------------------------------------------------------------------


def train_and_list_skipped(model: Path, folder: Path, *flags: str) -> tuple[set[str], object]:
    """Train an epoch; return the sentences about skipped samples, and the trainer."""
    argv = ["--model_name_or_path", str(model), "--meta_path", str(folder / "meta.json"), "--output_dir"]
    argv += [str(folder / "out"), *FLAGS, *TRAIN_ADAPTERS, "--num_train_epochs", "1", "--save_strategy", "no"]
    trainer = prepare_trainer([*argv, "--report_to", "none", "--max_bad_samples", "10000", *flags])
    trainer.train()
    return set(trainer.skipped_samples.skipped), trainer


def assert_agrees(check, model: Path, folder: Path, *flags: str) -> tuple[dict, dict]:
    """Compare check_data with a training; return its reasons without and with --decode."""
    check("headers", *flags)
    check("decoded", "--decode", "--num_train_epochs", "1", *flags)
    headers, decoded = (read_reasons(folder / report) for report in ("headers", "decoded"))
    skipped, trainer = train_and_list_skipped(model, folder, *flags)
    path = folder / "train.jsonl"
    assert skipped == {f"tiny line {line} ({path}): {reason}" for line, reason in decoded.items()}
    assert headers.items() <= decoded.items()
    rows = trainer.train_dataset
    for sample, lengths in enumerate(trainer.schedule.lengths):
        dataset, index = rows.locate(sample)
        if dataset.line_number(index) not in decoded:
            row = rows[0, sample]
            loss_tokens = int((row["labels"] != -100).sum())
            assert lengths.item() == (len(row["input_ids"]), loss_tokens, len(row["pixel_values"])), dataset.describe(
                index
            )
    return headers, decoded


FRAMES = "--min_num_frame 2 --max_num_frame 4 --max_seq_length 300".split()


def test_check_and_training_agree_on_the_odd_set(check, model, folder, monkeypatch):
    """The inputs of bug reports, and records that only a parser or a limit finds."""
    records = []
    for path in sorted(FAULTS.glob("F*.jsonl")):
        records += [json.loads(line) for line in path.read_text().splitlines()]
    write_records(folder, *records, images=FAULTS)
    for record in records:
        for key in ("image", "video"):
            if isinstance(record.get(key), str):
                record[key] = f"{'img' if key == 'image' else 'vid'}/{record[key]}"
        record["images"] = [f"img/{name}" for name in record.get("images", [])]
    lines = [json.dumps(record) for record in records]
    turns = make_turns("What?", "A.")
    foreign = [{"system_prompt": "S."}, {"Image": "img/plain.png"}, {"history": [["a", "b"]]}, {"label": False}]
    lines += [json.dumps({"conversations": turns} | keys) for keys in foreign]
    lines += [json.dumps({"conversations": json.dumps(turns)}), '{"conversations": [], "conversations": []}']
    lines += ["[" * 100_000, '{"conversations": ' * 9000, "version https://git-lfs.github.com/spec/v1"]
    (folder / "train.jsonl").write_text("\n".join(lines))
    headers, decoded = assert_agrees(check, model, folder, *FRAMES)
    assert len(decoded) < len(lines), "some are usable"
    damaged = {number for number, line in enumerate(lines, start=1) if "cut_" in line or "crc" in line}
    assert decoded.keys() - headers.keys() == damaged


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.stress)])
def test_check_and_training_agree_on_generated_samples(check, model, folder, seed):
    write_media(folder / "source")
    has_damage = make_odd_samples(folder / "source", folder, seed, num_samples=200)
    write_meta_file(folder, folder / "media")
    headers, decoded = assert_agrees(check, model, folder, *FRAMES, *PACKING)
    assert all(has_damage[line - 1] for line in decoded.keys() - headers.keys()), "pixel damage only"
    assert 40 < len(decoded) < 160


# -- evaluation sets ---------------------------------------------------------------------------------------------------


def write_evaluation_file(folder: Path, records: list[dict], **entry) -> list[str]:
    """Write a meta file of one evaluation set; return the flags that name it."""
    (folder / "eval.jsonl").write_text("\n".join(map(json.dumps, records)))
    entry = {"root": str(folder), "annotation": str(folder / "eval.jsonl"), **entry}
    (folder / "eval.json").write_text(json.dumps({"evaluated": entry}))
    return ["--eval_meta_path", str(folder / "eval.json")]


def test_evaluation_is_planned_and_compared_with_the_training_data(folder, check, capsys):
    records = [{"conversations": make_turns(f"What is {n}?", f"It is {n}.")} for n in range(40)]
    write_records(folder, *records)
    evaluated = [*records[:3], *({"conversations": make_turns(f"And {n}?", "No.")} for n in range(5))]
    flags = write_evaluation_file(folder, evaluated, metric="anls")
    flags += ["--eval_share", "0.2", "--eval_strategy", "steps", "--eval_steps", "5", "--max_steps", "20"]
    assert check("report", *flags, "--decode") == 0
    text = capsys.readouterr().out
    num_shared = 3  # without those that are held out
    lines = text.partition("Evaluation plan:\n")[2].partition("\n\n")[0].splitlines()
    plan = {line[:22].strip(): line[22:] for line in lines}
    assert plan["evaluation sets"] == "evaluated (anls), tiny" and plan["evaluations"].startswith("4, each as long as ")
    assert plan["questions answered"].startswith("8, with references of ") and "H100" in plan["share of the time"]
    num_held_out = int(plan["samples"].split()[0]) - 8
    assert 0 < num_held_out < 20 and f"{'tiny':24}{40 - num_held_out:10,}" in text
    (shared,) = [line for line in text.splitlines() if line.startswith("Evaluation data in the training data: ")]
    assert 1 <= int(shared.split(": ")[1].split()[0]) <= num_shared
    assert "records of evaluation set evaluated are also in training dataset tiny, such as evaluated line " in shared


def test_unusable_evaluation_samples_are_listed(folder, check, capsys):
    write_records(folder, *[{"conversations": make_turns("What?", "A.")}] * 4)
    good = {"conversations": make_turns("Which?", "B.")}
    flags = write_evaluation_file(folder, [good, good | {"image": "absent.png"}])
    assert check("report", *flags) == 1
    assert "Skipped evaluation samples: 1; --max_bad_samples allows 0, so training would end" in capsys.readouterr().out
    (entry,) = [json.loads(line) for line in (folder / "report/skipped_samples.jsonl").read_text().splitlines()]
    assert (entry["dataset"], entry["line"]) == ("evaluated", 2) and "absent.png does not exist" in entry["reason"]
    assert check("none", *write_evaluation_file(folder, [good | {"image": "absent.png"}])) == 1


def test_data_set_of_the_command_is_checked_although_a_run_file_names_another(goldens, folder, check):
    lines = (goldens / "dataset/ds_main.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text(lines[0])
    write_meta_file(folder, goldens / "dataset/images")
    (folder / "run.yaml").write_text("meta_path: /nowhere/meta.json\noutput_dir: /nowhere\n")
    assert check("checked", *PACKING, "--config", str(folder / "run.yaml")) == 0
    assert (folder / "checked/summary.txt").exists()
