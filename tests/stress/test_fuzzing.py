"""Check that invalid inputs end in a step or one sentence."""

import json
import random
import re
import shutil

import pytest
from helpers.training_runs import TRAIN_ADAPTERS, TRAIN_LLM_AND_PROJECTOR, write_meta_file
from stress.fuzzing import IN_PROCESS_KINDS, Case, make_case, make_source, run_case, run_case_as_process, run_cases

pytestmark = pytest.mark.stress


@pytest.fixture(scope="module")
def source(goldens, tmp_path_factory):
    """Write the inputs of a valid run."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERNVL_CACHE", str(folder / "cache"))
        yield make_source(goldens, folder / "source")


def describe_findings(results: dict[int, tuple[list[str], str]]) -> list[str]:
    return [
        f"case {number}: {'; '.join(changes)}\n{result}"
        for number, (changes, result) in results.items()
        if result.startswith("finding")
    ]


def test_cases_in_this_process(source):
    results = run_cases(source, seed=0, numbers=range(24))
    assert not describe_findings(results)
    kinds = [result.partition(":")[0] for _, result in results.values()]
    assert kinds.count("trained") >= 5 and kinds.count("error") >= 5, kinds


def test_more_cases_in_this_process(source):
    assert not describe_findings(run_cases(source, seed=1, numbers=range(100)))


@pytest.mark.multiprocess
@pytest.mark.parametrize("kinds", [["zero"], IN_PROCESS_KINDS], ids=["zero", "others"])
def test_cases_as_processes(source, kinds):
    assert not describe_findings(run_cases(source, 2, range(4), kinds, run_case_as_process))


def set_llm_config(**fields):
    """Return a function that sets fields of the LLM configuration."""

    def change(folder):
        old = json.loads((folder / "model/config.json").read_text())
        old["llm_config"] |= fields
        (folder / "model/config.json").write_text(json.dumps(old))

    return change


def set_in_first_record(**fields):
    """Return a function that sets fields of the first record."""

    def change(folder):
        first, *rest = (folder / "train.jsonl").read_text().splitlines()
        (folder / "train.jsonl").write_text("\n".join([json.dumps(json.loads(first) | fields), *rest]))

    return change


def set_in_json(name: str, **fields):
    """Return a function that sets fields of a JSON file."""

    def change(folder):
        old = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(old | fields))

    return change


def truncate(name: str):
    """Return a function that truncates a file."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:1000])


# What fuzzing has found: a change of the valid run, flags, the expected result.
KNOWN_CASES = {
    "truncated weights": (
        truncate("model/model.safetensors"),
        "",
        "error: .*model.safetensors is not a complete safetensors file",
    ),
    "truncated tokenizer": (truncate("model/tokenizer.json"), "", "error: .*tokenizer.json is not JSON"),
    "float for an int": (
        set_llm_config(max_window_layers=1e-9),
        "",
        "error: .*config.json cannot be loaded: .*expected int, got float",
    ),
    "invalid probability": (
        set_llm_config(attention_dropout=2),
        "",
        "error: .*config.json: llm_config.attention_dropout 2 is invalid",
    ),
    "list as tokenizer class": (
        set_in_json("model/tokenizer_config.json", tokenizer_class=[]),
        "",
        "error: .*tokenizer_config.json: tokenizer_class \\[\\] is invalid",
    ),
    "list as config": (
        lambda folder: (folder / "model/config.json").write_text("[]"),
        "",
        "error: .*config.json is invalid: expected a JSON object, got a JSON list",
    ),
    "number as zero_optimization": (
        set_in_json("zero.json", zero_optimization=9),
        "--deepspeed zero.json",
        "error: --deepspeed zero.json: zero_optimization 9 is invalid",
    ),
    "number as optimizer": (
        set_in_json("zero.json", optimizer=2),
        "--deepspeed zero.json",
        "error: --deepspeed zero.json: optimizer 2 is invalid",
    ),
    "DeepSpeed file not in UTF-8": (
        lambda folder: (folder / "zero.json").write_bytes(b'{"a": "\xff"}'),
        "--deepspeed zero.json",
        "error: --deepspeed zero.json cannot be read",
    ),
    "LoRA rank out of range": (
        lambda folder: None,
        "--use_mlp_lora 99999999999999999999",
        "error: .*invalid: expected an integer from 0 to 65,536",
    ),
    "null byte in a path": (set_in_first_record(image="a\0.png"), "", "trained"),
    "lone surrogate in a path": (set_in_first_record(image="\ud800.png"), "", "trained"),
}


@pytest.mark.parametrize("name", KNOWN_CASES)
def test_known_cases(source, tmp_path, monkeypatch, name):
    change, flags, expected = KNOWN_CASES[name]
    case = Case(
        shutil.copytree(source, tmp_path / "run"), [*TRAIN_ADAPTERS, *"--max_bad_samples 4".split(), *flags.split()], []
    )
    write_meta_file(case.folder, case.folder / "images")
    change(case.folder)
    monkeypatch.chdir(case.folder)
    result = run_case(case)
    assert re.match(expected, result, re.DOTALL), result


def test_run_case_reports_findings(source, tmp_path, monkeypatch):
    """Missing samples, tracebacks and errors of one word are findings."""
    case = make_case(source, tmp_path / "run", random.Random(0), ["flags"])
    case.flags[:] = [*TRAIN_LLM_AND_PROJECTOR, "--max_bad_samples", "4"]
    assert run_case(case) == "trained"
    monkeypatch.setattr(Case, "num_records", 14)
    assert run_case(case).startswith("finding: 13 samples of 14 records")
    for error, expected in ((KeyError("a"), "finding: Traceback"), (ValueError("a"), "finding: no sentence")):

        def fail(argv, error=error):
            raise error

        monkeypatch.setattr("stress.fuzzing.prepare_trainer", fail)
        assert run_case(case).startswith(expected)
