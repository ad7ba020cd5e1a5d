"""Flags in a YAML file: `--config`, and the run.yaml that repeats a run."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from helpers.paths import PACKAGE_DIR
from hypothesis import given
from hypothesis import strategies as st

from internvl.arguments.preference import PREFERENCE_ARGUMENTS
from internvl.arguments.run_file import MAX_RUN_FILE_BYTES, expand_run_files, format_run_file, read_run_file
from internvl.arguments.training import FINETUNE_ARGUMENTS, list_given_flags, parse_args
from internvl.runtime.shutdown import read_ddp_timeout


@pytest.fixture
def write_file(tmp_path):
    """Return a function that writes a run file and returns its path."""

    def write_file(content: str | bytes) -> str:
        file = tmp_path / "flags.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(file)

    return write_file


def parse(*argv):
    """Parse a command line and return all flags by name."""
    return {name: value for args in parse_args(["--output_dir", "x", *argv]) for name, value in vars(args).items()}


# -- reading -----------------------------------------------------------------------------------------------------------

# Line of YAML -> flag, its value. A type of YAML (1.1: no is False, 010 is 8, 1e-4 is a text) does not matter.
VALUES = {
    "learning_rate: 1e-4": ("learning_rate", 1e-4),
    "learning_rate: 1.0e-05": ("learning_rate", 1e-5),
    "max_steps: -1": ("max_steps", -1),
    "save_steps: 0.25": ("save_steps", 0.25),
    "evaluation_strategy: no": ("evaluation_strategy", "no"),
    "run_name: 010": ("run_name", "010"),
    "run_name: 12:30": ("run_name", "12:30"),
    "run_name: 2026-01-02": ("run_name", "2026-01-02"),
    "run_name: --max_steps=9": ("run_name", "--max_steps=9"),
    "run_name: 'a: b # c'": ("run_name", "a: b # c"),
    "run_name: ü": ("run_name", "ü"),
    "model_name_or_path: ''": ("model_name_or_path", ""),
    "use_thumbnail: true": ("use_thumbnail", True),
    "strict_mode: no": ("strict_mode", False),
    "report_to: [tensorboard, tensorboard]": ("report_to", ["tensorboard", "tensorboard"]),
    "report_to: tensorboard": ("report_to", ["tensorboard"]),
    "report_to:\n- tensorboard": ("report_to", ["tensorboard"]),
    "llm_lora_targets: [q_proj, v_proj]": ("llm_lora_targets", ["q_proj", "v_proj"]),
    "lr_scheduler_kwargs: '{\"num_cycles\": 2}'\nlr_scheduler_type: cosine": ("lr_scheduler_kwargs", {"num_cycles": 2}),
    '{"max_steps": 3}': ("max_steps", 3),
    "\ufeffmax_steps: 3": ("max_steps", 3),
    "# nothing\n{}": ("max_steps", -1),
}


@pytest.mark.parametrize("line", VALUES)
def test_value_is_the_text_after_the_flag(write_file, line):
    name, value = VALUES[line]
    assert parse("--config", write_file(line))[name] == value


def test_flags_behind_the_file_override_it(write_file):
    file = write_file("max_steps: 3\nlearning_rate: 3\n")
    found = parse("--max_steps", "7", f"--config={file}", "--learning_rate", "9")
    assert (found["max_steps"], found["learning_rate"]) == (3, 9)


def test_a_second_file_overrides_the_first(write_file, tmp_path):
    (tmp_path / "base.yaml").write_text("max_steps: 7\nlearning_rate: 9\n")
    file = write_file("max_steps: 3")
    found = parse("--config", str(tmp_path / "base.yaml"), "--config", file)
    assert (found["max_steps"], found["learning_rate"]) == (3, 9)


NO_FLAGS = "FILE is invalid: expected `flag: value` in each line."
NO_VALUE = "needs a value: a text, a number or a list of them."
INVALID_FILES = {
    "near miss": (
        "max_steps: 3\nlearning_rte: 1",
        "FILE, line 2: unknown flag: 'learning_rte'; did you mean --learning_",
    ),
    "no near miss": ("qqqq: 1", "FILE, line 1: unknown flag: 'qqqq'; --help lists all flags."),
    "removed flag": ("no_cuda: 1", "FILE, line 1: unknown flag: 'no_cuda'; use --use_cpu True."),
    "another program's flag": ("loss_type: sigmoid", "FILE, line 1: unknown flag: 'loss_type'"),
    "dashes": ("--max_steps: 3", "FILE, line 1: unknown flag: '--max_steps'; did you mean --max_steps?"),
    "another file": ("config: a.yaml", "FILE, line 1: unknown flag: 'config'"),
    "wrong type": ("\nlearning_rate: fast", "FILE, line 2: argument --learning_rate.*: invalid float value: 'fast'."),
    "not a choice": ("normalize_type: x", "FILE, line 1: argument --normalize_type.*: invalid choice: 'x'"),
    "not a truth value": (
        "use_thumbnail: on",
        "FILE, line 1: argument --use_thumbnail.*: Truthy value expected: got on",
    ),
    "list of numbers": (
        "learning_rate: [1, 2]",
        "FILE, line 1: argument --learning_rate.*: invalid float value: '1,2'.",
    ),
    "twice": ("max_steps: 3\n\nmax_steps: 3", "FILE, line 3: 'max_steps' is already given in line 1."),
    "no value": ("max_steps:", f"FILE, line 1: 'max_steps' {NO_VALUE}"),
    "null": ("max_steps: null", f"FILE, line 1: 'max_steps' {NO_VALUE}"),
    "empty list": ("report_to: []", f"FILE, line 1: 'report_to' {NO_VALUE}"),
    "list in a list": ("report_to: [[a]]", f"FILE, line 1: 'report_to' {NO_VALUE}"),
    "mapping": ("lr_scheduler_kwargs: {a: 1}", f"FILE, line 1: 'lr_scheduler_kwargs' {NO_VALUE}"),
    "itself": ("report_to: &a [*a]", f"FILE, line 1: 'report_to' {NO_VALUE}"),
    "Python object": ("run_name: !!python/object/apply:os.getcwd []", f"FILE, line 1: 'run_name' {NO_VALUE}"),
    "null character": ('run_name: "\\0"', f"FILE, line 1: 'run_name' {NO_VALUE}"),
    "no name": ("? [a]\n: 1", "FILE, line 1: expected the name of a flag."),
    "list": ("- max_steps", NO_FLAGS),
    "text": ("max_steps", NO_FLAGS),
    "empty": ("", NO_FLAGS),
    "two documents": ("max_steps: 3\n---\nmax_steps: 4", "FILE, line 2: invalid YAML: .*found another document."),
    "tabs": ("max_steps: 3\n\tlearning_rate: 1", "FILE, line 2: invalid YAML: "),
    "not YAML": ("a: b: c", "FILE, line 1: invalid YAML: mapping values are not allowed here."),
    "control character": (b"a: 1\nb: \x01", "FILE, line 2: invalid YAML: "),
    "not UTF-8": (b"a: 1\nb: \xff", "FILE, line 2: invalid YAML: expected text in UTF-8."),
    "no character": ('a: "\\UFFFFFFFF"', "FILE, line 1: invalid YAML: "),
    "deeply nested": ("[" * 20_000, "FILE, line 1: invalid YAML: maximum recursion depth exceeded"),
    "too large": (
        "#" * (MAX_RUN_FILE_BYTES + 1),
        "--config FILE cannot be read: .* has 65,537 bytes, more than 65,536",
    ),
}


@pytest.mark.parametrize(("content", "message"), INVALID_FILES.values(), ids=INVALID_FILES)
def test_invalid_file_is_one_sentence_with_its_line(write_file, content, message):
    file = write_file(content)
    with pytest.raises(ValueError, match="^" + message.replace("FILE", file).replace("?", r"\?")) as error:
        parse("--config", file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("argv", [["--config"], ["--config="], ["--config", "--max_steps", "3"]], ids=str)
def test_config_requires_a_file(argv):
    with pytest.raises(ValueError, match="^--config requires a file of flags, such as run.yaml.$"):
        parse(*argv)


def test_missing_files_and_other_kinds_are_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name, reason in {"none": "No such file", ".": "Is a directory", "fifo": ".*is a FIFO, not a regular"}.items():
        with pytest.raises(ValueError, match=f"^--config {tmp_path / name} cannot be read: {reason}"):
            parse("--config", str(tmp_path / name))


def test_near_miss_on_the_command_line_names_the_flag():
    with pytest.raises(ValueError, match=r"^unknown flag: --learning_rte 1; did you mean --learning_rate\?$"):
        parse("--learning_rte", "1")


def test_reading_needs_no_torch():
    code = "import sys, internvl.arguments.run_file; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(PACKAGE_DIR)}).returncode == 0
    )


# -- what is read before all flags -------------------------------------------------------------------------------------


def test_timeout_of_the_process_group_is_read_from_the_file(write_file):
    file = write_file("ddp_timeout: 7")
    assert read_ddp_timeout(["--config", file]) == 7
    assert read_ddp_timeout(["--config", file, "--ddp_timeout", "9"]) == 9
    assert read_ddp_timeout(["--config", "/nowhere/run.yaml"]) == 3600


def test_output_folder_is_checked_from_the_file(write_file, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    file = write_file(f"output_dir: {tmp_path}/model\nmodel_name_or_path: {tmp_path}/model")
    command = [sys.executable, "-m", "internvl.runtime.output_lock", "--config", file]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(PACKAGE_DIR)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: --output_dir {tmp_path}/model is --model_name_or_path")


# -- writing -----------------------------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    st.sampled_from(
        ["", "no", "True", "true", "null", "~", "1e-4", "0.5", "-3", "010", "=", "<<", "a\nb", "#", "\ud800"]
    ),
)


@given(st.dictionaries(TEXTS, st.one_of(TEXTS, st.lists(TEXTS, min_size=1)), min_size=1))
def test_what_is_written_is_read_back(tmp_path_factory, flags):
    file = tmp_path_factory.getbasetemp() / "written.yaml"
    file.write_text(format_run_file(flags, ["Repeat:", ""]), encoding="utf-8")
    assert {name: flag.value for name, flag in read_run_file(str(file)).items()} == flags


def test_other_readers_of_yaml_get_the_same_types():
    flags = {"evaluation_strategy": "no", "max_steps": "6", "bf16": "True", "warmup_ratio": "0.03", "report_to": "none"}
    found = yaml.safe_load(format_run_file(flags, []))
    assert found == flags | {"max_steps": 6, "bf16": True, "warmup_ratio": 0.03}


def test_given_flags_are_those_of_the_command_line():
    argv = "--use-llm-lora=4 --learning_rate 1e-5 --no_strict_mode --bf16 --debug underflow_overflow --max_steps 1"
    argv = [*argv.split(), "--max_steps", "2", "--lr_scheduler_type", "cosine", "--llm_lora_targets", "a", "b"]
    given = list_given_flags([*argv, "--hub_token", "secret", "--local_rank", "0"], FINETUNE_ARGUMENTS)
    assert given == {
        "use_llm_lora": "4",
        "llm_lora_targets": ["a", "b"],
        "strict_mode": "False",
        "max_steps": "2",
        "learning_rate": "1e-05",
        "lr_scheduler_type": "cosine",
        "bf16": "True",
        "debug": ["underflow_overflow"],
    }
    assert list_given_flags(["--loss_type", "hinge"], PREFERENCE_ARGUMENTS) == {"loss_type": "hinge"}


def test_given_flags_of_upstreams_json_file(tmp_path):
    flags = {
        "output_dir": "x",
        "use_llm_lora": 4,
        "bf16": True,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "run_name": None,
    }
    (tmp_path / "arguments.json").write_text(json.dumps(flags | {"report_to": ["none"], "lr_scheduler_type": "cosine"}))
    given = list_given_flags([str(tmp_path / "arguments.json")], FINETUNE_ARGUMENTS)
    assert given == {
        "output_dir": "x",
        "use_llm_lora": "4",
        "bf16": "True",
        "lr_scheduler_kwargs": '{"num_cycles": 2}',
        "report_to": ["none"],
        "lr_scheduler_type": "cosine",
    }
    (tmp_path / "run.yaml").write_text(format_run_file(given, []))
    assert parse("--config", str(tmp_path / "run.yaml"))["lr_scheduler_kwargs"] == {"num_cycles": 2}


def test_expanding_leaves_other_words(write_file):
    words = ["--max_steps", "3", "--run_name", "config", "--report_to=--config"]
    assert expand_run_files(words) == words
    assert expand_run_files(["--config", write_file("report_to: [a, b]"), *words]) == ["--report_to=a,b", *words]
