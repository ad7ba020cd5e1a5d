"""Runs on data, checkpoints and flags that are wrong somehow end in a step or in one sentence; see `fuzzing.py`."""

import json
import random
import re
import shutil

import pytest
from helpers.training_runs import FULL, LORA, write_meta
from stress.fuzzing import HERE, Case, fuzz, make_case, make_source, outcome, outcome_of_process


@pytest.fixture(scope="module")
def source(goldens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERNVL_CACHE", str(folder / "cache"))
        yield make_source(goldens, folder / "source")


def findings(found: dict) -> list[str]:
    wrong = [(number, *case) for number, case in found.items() if case[1].startswith("finding")]
    return [f"case {number}: {'; '.join(changes)}\n{result}" for number, changes, result in wrong]


def test_cases_in_this_process(source):
    found = fuzz(source, seed=0, numbers=range(24))
    assert not findings(found)
    kinds = [result.partition(":")[0] for _, result in found.values()]
    assert kinds.count("trained") >= 5 and kinds.count("error") >= 5, kinds


@pytest.mark.slow
def test_more_cases_in_this_process(source):
    assert not findings(fuzz(source, seed=1, numbers=range(180)))


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [["zero"], HERE], ids=["zero", "others"])
def test_cases_as_processes(source, kinds):
    assert not findings(fuzz(source, 2, range(4), kinds, outcome_of_process))


def config(**fields):
    def change(folder):
        old = json.loads((folder / "model/config.json").read_text())
        old["llm_config"] |= fields
        (folder / "model/config.json").write_text(json.dumps(old))

    return change


def first_line(**fields):
    def change(folder):
        first, *rest = (folder / "train.jsonl").read_text().splitlines()
        (folder / "train.jsonl").write_text("\n".join([json.dumps(json.loads(first) | fields), *rest]))

    return change


def edited(name: str, **fields):
    def change(folder):
        old = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(old | fields))

    return change


def cut(name: str):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:1000])


# What was found: how to change the run that is right, its flags, and how it ends.
FOUND = {
    "weights cut short": (cut("model/model.safetensors"), "", "error: the checkpoint .*: SafetensorError"),
    "a tokenizer cut short": (cut("model/tokenizer.json"), "", "error: the tokenizer in .* cannot be loaded"),
    "a type": (config(max_window_layers=1e-9), "", "error: the checkpoint .*expected int, got float"),
    "a probability": (config(attention_dropout=2), "", "error: .*attention_dropout 2 in config.json is no probability"),
    "a list for a class": (edited("model/tokenizer_config.json", tokenizer_class=[]), "", "error: the tokenizer in"),
    "a list for a config": (lambda f: (f / "model/config.json").write_text("[]"), "", "error: the checkpoint .*list"),
    "a number for ZeRO": (edited("zero.json", zero_optimization=9), "--deepspeed zero.json", "error: .*9 is no object"),
    "a number for AdamW": (edited("zero.json", optimizer=2), "--deepspeed zero.json", "error: .*2 is no object"),
    "no UTF-8 for ZeRO": (
        lambda f: (f / "zero.json").write_bytes(b'{"a": "\xff"}'),
        "--deepspeed zero.json",
        "error: --deepspeed zero.json is not valid JSON",
    ),
    "a rank beyond all layers": (lambda f: None, "--use_mlp_lora 99999999999999999999", "error: .*is at most 65,536"),
    "a zero byte in a path": (first_line(image="a\0.png"), "", "trained"),
    "half a pair in a path": (first_line(image="\ud800.png"), "", "trained"),
}  # fmt: skip


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found_before(source, tmp_path, monkeypatch, what):
    change, flags, expected = FOUND[what]
    case = Case(shutil.copytree(source, tmp_path / "run"), [*LORA, *"--max_bad_samples 4".split(), *flags.split()], [])
    write_meta(case.folder, case.folder / "images")
    change(case.folder)
    monkeypatch.chdir(case.folder)
    assert re.match(expected, outcome(case), re.DOTALL), outcome(case)


def test_the_harness_sees_what_is_wrong(source, tmp_path, monkeypatch):
    """A traceback, an error of one word, and a sample that nobody counts."""
    case = make_case(source, tmp_path / "run", random.Random(0), ["flags"])
    case.flags[:] = [*FULL, "--max_bad_samples", "4"]
    assert outcome(case) == "trained"
    monkeypatch.setattr(Case, "records", 14)
    assert outcome(case).startswith("finding: 13 samples of 14 records")
    for error, said in ((KeyError("a"), "finding: Traceback"), (ValueError("a"), "finding: no sentence")):

        def fail(argv, error=error):
            raise error

        monkeypatch.setattr("fuzzing.prepare", fail)
        assert outcome(case).startswith(said)
