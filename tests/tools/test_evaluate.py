"""tools/evaluate.py: the numbers of training, on one or two ranks; comparisons; wrong inputs."""

import json
import shutil

import pytest
from helpers.evaluation_cases import write_evaluation_sets
from helpers.forked_ranks import ForkedRanks
from helpers.paths import REPO_ROOT
from helpers.tiny_models import make_tiny_checkpoint
from helpers.training_runs import TRAIN_ADAPTERS, ZERO_FLAGS, build_run_environment, run_training

from internvl.checkpoint.manifest import find_checkpoint_errors
from internvl.evaluation.results import read_metrics, read_predictions
from internvl.launchers import find_free_port
from internvl.tools.evaluate import collect_data_flags, evaluate_folders, parse_args
from internvl.tools.internvl_custom2hf import main as custom2hf

EVALUATE_PROGRAM = REPO_ROOT / "internvl_chat/tools/evaluate.py"
SETS = {"one_tile": "anls", "tiles": "cer", "texts": "exact_match"}
EVALUATION = "--eval_strategy steps --eval_steps 3 --eval_max_new_tokens 5 --eval_num_samples 3".split()


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
    """The meta file of three evaluation sets."""
    folder = tmp_path_factory.mktemp("sets")
    write_evaluation_sets(folder)
    entries = {
        name: {"root": str(folder), "annotation": str(folder / f"{name}.jsonl"), "metric": metric}
        for name, metric in SETS.items()
    }
    (folder / "meta.json").write_text(json.dumps(entries))
    return folder / "meta.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory, goldens):
    folder = tmp_path_factory.mktemp("base") / "base"
    make_tiny_checkpoint(folder, goldens / "tokenizer")
    return folder


@pytest.fixture
def run_tool(tiny_inputs, monkeypatch):
    """Return a function that runs the tool in this process."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))

    def run_tool(*argv):
        evaluate_folders(parse_args(list(map(str, argv))))

    return run_tool


def require_equal_results(folder, other, tolerance=1e-6):
    """Require equal predictions and metrics; losses within a tolerance."""
    predictions, others = read_predictions(folder), read_predictions(other)
    for prediction, other_prediction in zip(predictions, others, strict=True):
        losses = [line.pop("loss") for line in (prediction, other_prediction)]
        assert prediction == other_prediction and losses[0] == pytest.approx(losses[1], abs=tolerance)
    content, other_content = read_metrics(folder), read_metrics(other)
    for key in ("sets", "settings", "skipped"):
        assert content[key] == other_content[key]
    is_perplexity = {name: name.endswith("perplexity") for name in content["metrics"]}
    assert content["metrics"].keys() == other_content["metrics"].keys()
    for name, value in content["metrics"].items():
        allowed = tolerance * (value if is_perplexity[name] else 1)
        assert value == pytest.approx(other_content["metrics"][name], abs=allowed), name


@pytest.mark.e2e
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16 zero2"])
def test_numbers_are_those_of_the_training(tiny_inputs, meta, run_tool, tmp_path, precision):
    out, half = tmp_path / "out", ["--bf16", "True"] if "bf16" in precision else []
    half += ZERO_FLAGS["zero2"] if "zero2" in precision else []
    flags = [*TRAIN_ADAPTERS, "--freeze_mlp", "False", *EVALUATION, "--eval_meta_path", meta, *half]
    run_training(tiny_inputs, out, *flags)
    for folder, step, results in (
        (out / "checkpoint-3", 3, out / "evaluation/checkpoint-3-meta"),
        (out, 6, out / "evaluation/meta"),
    ):
        run_tool(folder, meta, "--eval_num_samples", 3)  # all questions by default
        require_equal_results(results, out / f"evaluation/step-{step}")
        assert read_metrics(results)["model"] == str(folder)
    assert find_checkpoint_errors(out / "checkpoint-3") == []  # it can still be resumed


@pytest.mark.e2e
def test_held_out_records_are_those_of_the_run(tiny_inputs, run_tool, tmp_path):
    out, share = tmp_path / "out", ("--eval_share", "0.4")
    run_training(tiny_inputs, out, *TRAIN_ADAPTERS, *EVALUATION, *share, "--max_steps", "3", "--seed", "5")
    run_tool(out, tiny_inputs / "meta.json", *share, "--eval_num_samples", 3, "--output", tmp_path / "results")
    require_equal_results(tmp_path / "results", out / "evaluation/step-3")
    num_lines = len((tiny_inputs / "train.jsonl").read_text().splitlines())
    assert 0 < len(read_predictions(tmp_path / "results")) < num_lines


@pytest.mark.multiprocess
def test_two_ranks_write_the_same_files(tiny_inputs, meta, base, tmp_path):
    outputs = []
    for ranks in (1, 2):
        output, printed = tmp_path / str(ranks), tmp_path / f"printed-{ranks}"
        printed.mkdir()
        flags = ["--output", output, "--eval_max_new_tokens", 4, "--per_device_eval_batch_size", 2]
        command = list(map(str, [EVALUATE_PROGRAM, base, meta, *flags]))
        done = ForkedRanks(command, build_run_environment(tiny_inputs), ranks, find_free_port(), printed).wait()
        assert done.returncode == 0, done.stderr
        content = json.loads((output / "metrics.json").read_text()) | {"seconds": None}
        outputs.append([(output / "predictions.jsonl").read_bytes(), content, done.stdout.replace(str(output), "OUT")])
    assert outputs[0] == outputs[1]
    lines = outputs[0][2].splitlines()
    assert lines[1].split() == "set samples loss perplexity token accuracy metric score 95 % interval".split()
    assert [line.split()[0] for line in lines[2:6]] == [*SETS, "all"] and lines[6] == "Results: OUT"


def test_comparison_with_a_checkpoint_and_with_its_results(base, meta, run_tool, tmp_path, goldens, capsys):
    make_tiny_checkpoint(tmp_path / "other", goldens / "tokenizer", llm="llama")
    run_tool(base, meta, "--output", tmp_path / "a", "--compare", tmp_path / "other", "--eval_max_new_tokens", 4)
    run_tool(base, meta, "--output", tmp_path / "b", "--compare", tmp_path / "a/other", "--eval_max_new_tokens", 4)
    contents = [json.loads((tmp_path / name / "comparison.json").read_text()) for name in "ab"]
    assert contents[0]["sets"] == contents[1]["sets"]
    assert contents[0]["names"] == [str(base), str(tmp_path / "other")]
    for entry in contents[0]["sets"]:
        for folder, key in (("a", "value"), ("a/other", "other")):
            metrics = read_metrics(tmp_path / folder)["metrics"]
            assert metrics[f"eval/{entry['name']}/loss"] == pytest.approx(entry["loss"][key], abs=1e-9)
            assert metrics[f"eval/{entry['name']}/{entry['metric']}"] == entry["score"][key]
    changed = [json.loads(line) for line in (tmp_path / "a/changed.jsonl").read_text().splitlines()]
    pairs = zip(read_predictions(tmp_path / "a"), read_predictions(tmp_path / "a/other"), strict=True)
    assert changed and len(changed) == sum(one["prediction"] != other["prediction"] for one, other in pairs)
    assert f"Comparison of {base} (first) with {tmp_path / 'other'} (second):" in capsys.readouterr().out


def test_datasets_that_are_trained_are_left_out_if_others_are_not(base, meta, run_tool, tmp_path):
    entries = json.loads(meta.read_text())
    entries["tiles"]["split"], entries["texts"]["split"] = "eval", "base_answers"
    del entries["texts"]["metric"]
    (tmp_path / "mixed.json").write_text(json.dumps(entries))
    run_tool(base, tmp_path / "mixed.json", "--output", tmp_path / "out", "--eval_num_samples", 1)
    content = read_metrics(tmp_path / "out")
    assert list(content["sets"]) == ["tiles", "texts"]
    assert content["metrics"]["eval/forgetting"] == content["metrics"]["eval/texts/loss"]
    assert content["settings"] == {"max_new_tokens": 128, "num_samples": 1}


def test_flags_that_messages_advise_are_those_of_the_data(base, meta):
    argv = [str(base), str(meta)]
    data_args = collect_data_flags(parse_args([*argv, "--max_bad_samples", "3", "--allow_outside_root", "True"]), base)
    assert (data_args.max_bad_samples, data_args.allow_outside_root) == (3, True)
    data_args = collect_data_flags(parse_args(argv), base)
    assert (data_args.max_bad_samples, data_args.allow_outside_root) == (0.01, False)


# -- wrong inputs ------------------------------------------------------------------------------------------------------


def edit_results(folder, **changes):
    lines = [line | changes for line in read_predictions(folder)]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def results(base, meta, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "base"
    argv = [base, meta, "--output", folder, "--eval_max_new_tokens", 2, "--eval_num_samples", 1]
    evaluate_folders(parse_args(list(map(str, argv))))
    return folder


def test_results_are_not_overwritten(base, meta, results, run_tool):
    with pytest.raises(ValueError, match="has the results of another evaluation: choose another folder by --output"):
        run_tool(base, meta, "--output", results)


WRONG_INPUTS = {
    "another question": ({"question": "Why?"}, (), "not about the same samples: question of set one_tile line 1"),
    "other settings": ({}, ("--eval_max_new_tokens", 3), "results have other settings: expected .*3.*, got .*2"),
    "damaged line": ({"line": "1"}, (), "predictions.jsonl line 1 is invalid: 'line' must be int, got '1'"),
    "negative number": ({}, ("--eval_num_samples", -1), "--eval_num_samples -1 is invalid"),
    "no batch": ({}, ("--per_device_eval_batch_size", 0), "--per_device_eval_batch_size 0 is invalid"),
    "negative share": ({}, ("--max_bad_samples", -1), "--max_bad_samples -1.0 is invalid"),
    "share of 1": ({}, ("--eval_share", 1), "--eval_share 1.0 is invalid"),
}


@pytest.mark.parametrize("changes, flags, message", WRONG_INPUTS.values(), ids=WRONG_INPUTS)
def test_wrong_inputs(base, meta, results, run_tool, tmp_path, changes, flags, message):
    shutil.copytree(results, tmp_path / "results")
    edit_results(tmp_path / "results", **changes)
    defaults = ("--eval_max_new_tokens", 2, "--eval_num_samples", 1, "--output", tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        run_tool(base, meta, *defaults, "--compare", tmp_path / "results", *flags)


def test_wrong_folders(base, meta, run_tool, tmp_path):
    custom2hf(["--custom_path", str(base), "--save_path", str(tmp_path / "hf")])
    for folder, message in (
        (tmp_path / "hf", r"tools/internvl_hf2custom.py"),
        (tmp_path / "absent", r"the folder .*absent does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            run_tool(folder, meta, "--output", tmp_path / "out")
        with pytest.raises(ValueError, match=message):  # before the first model is evaluated
            run_tool(base, meta, "--output", tmp_path / "out", "--compare", folder)
    with pytest.raises(ValueError, match=r"meta file .*absent.json cannot be opened"):
        run_tool(base, tmp_path / "absent.json", "--output", tmp_path / "out")
    assert not (tmp_path / "out/metrics.json").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/out cannot be written .*: choose another folder by --output"):
        run_tool(base, meta, "--output", tmp_path / "file/out")
