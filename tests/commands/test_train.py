"""`internvl train` starts the same launcher as the recipes, with or without a recipe."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import EXAMPLE_META, PACKAGE_DIR, TRAIN_DIR, VISION_LORA_RECIPE
from helpers.training_runs import TRAIN_ADAPTERS, build_run_flags, read_losses, run_training

from internvl.arguments.preference import PREFERENCE_ARGUMENTS
from internvl.commands.train import main

FLAGS = f"--model_name_or_path ORG/NAME --meta_path {EXAMPLE_META} --output_dir out".split()


@pytest.fixture
def start(tmp_path):
    """Return `start(*flags, NAME=value, ...)`, which runs `internvl train` in an empty folder, without GPUs."""

    def run(*flags, command=(sys.executable, "-m", "internvl", "train"), **variables) -> subprocess.CompletedProcess:
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(PACKAGE_DIR)}
        env |= {"CUDA_VISIBLE_DEVICES": ""} | {name: str(value) for name, value in variables.items()}
        words = [*map(str, command), *map(str, flags)]
        return subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    return run


@pytest.fixture
def dry_run(start):
    """Return a function like `start` that returns the words of the printed command: start and flags."""

    def run(*flags, **variables) -> tuple[list[str], list[str]]:
        done = start("--dry-run", *flags, MASTER_PORT=29999, **variables)
        assert done.returncode == 0, done.stderr
        words = shlex.split(done.stdout)
        num_start_words = 1 + next(i for i, word in enumerate(words) if Path(word).parent == TRAIN_DIR)
        return words[:num_start_words], words[num_start_words:]

    return run


def get_error(*argv) -> str:
    with pytest.raises(SystemExit) as error:
        main([*map(str, argv)])
    return str(error.value)


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["internvl2.5/8b_vit_lora", "8b_vit_lora", "shell/internvl2.5/8b_vit_lora.sh"])
def test_a_recipe_by_its_name_is_the_script(start, dry_run, name):
    variables = {"DRY_RUN": 1, "MASTER_PORT": 29999, "INTERNVL_PYTHON": sys.executable}
    done = start("--max_steps", "3", command=["bash", VISION_LORA_RECIPE], **variables)
    command, flags = dry_run(name, "--max_steps", "3")
    assert [*command, *flags] == shlex.split(done.stdout)
    assert sys.executable in command, "the Python of this command trains"


@pytest.mark.multiprocess
def test_any_script_is_a_recipe(dry_run, tmp_path):
    (tmp_path / "mine.sh").write_text(f"MODEL_PATH=ORG/MINE\n. {VISION_LORA_RECIPE.parent}/../launch.sh\n")
    _, flags = dry_run("mine.sh")
    assert flags[flags.index("--model_name_or_path") + 1] == "ORG/MINE"


@pytest.mark.multiprocess
def test_without_a_recipe_only_the_given_flags_count(dry_run):
    flags = [*FLAGS, *"--per_device_train_batch_size 2 --learning_rate=1e-3".split()]
    variables = {"MODEL_PATH": "other", "BATCH_SIZE": 7, "ZERO_CONFIG": "other"}  # of recipes
    start, printed = dry_run("--nproc", "3", *flags, **variables)
    assert printed == flags
    assert start[-1] == str(TRAIN_DIR / "internvl_chat_finetune.py")
    assert "--nproc_per_node=3" in start


@pytest.mark.multiprocess
@pytest.mark.parametrize("flags", [["--preference"], ["--beta", "0.2"], ["--loss_type=sigmoid"]])
def test_pairs_of_answers_have_their_program(dry_run, flags):
    start, printed = dry_run(*flags, *FLAGS)
    assert start[-1] == str(TRAIN_DIR / "internvl_chat_mpo.py")
    assert printed == [*(flag for flag in flags if flag != "--preference"), *FLAGS]


@pytest.mark.multiprocess
def test_a_file_of_flags(dry_run, tmp_path):
    """launch.sh reads no YAML: what it needs comes as flags."""
    config = tmp_path / "run.yaml"
    config.write_text(f"model_name_or_path: ORG/NAME\nmeta_path: {EXAMPLE_META}\noutput_dir: first\nbeta: 0.2\n")
    start, flags = dry_run("--config", "run.yaml", "--output_dir", "second")
    assert start[-1] == str(TRAIN_DIR / "internvl_chat_mpo.py")
    assert flags == [
        *("--config=run.yaml", "--model_name_or_path=ORG/NAME", f"--meta_path={EXAMPLE_META}"),
        *("--output_dir", "second"),
    ]
    assert "--output_dir=first" in dry_run("--config=run.yaml")[1]
    assert "--output_dir=first" not in dry_run("--config=run.yaml", "--output-dir=second")[1]


@pytest.mark.multiprocess
def test_number_of_ranks(dry_run):
    job = {"SLURM_JOB_ID": 1, "SLURM_JOB_NUM_NODES": 2, "SLURM_GPUS_ON_NODE": 4}
    assert "--nproc_per_node=2" in dry_run("8b_vit_lora", "--nproc=2", GPUS=1)[0]
    assert "--nproc_per_node=1" in dry_run("8b_vit_lora", "--nproc", "auto", GPUS=8)[0]
    assert "--nproc_per_node=8" in dry_run("8b_vit_lora", GPUS=8)[0]
    assert {"srun", "--ntasks=8", "--job-name=internvl"} <= {*dry_run(*FLAGS, **job)[0]}
    assert "--ntasks=4" in dry_run(*FLAGS, "--nproc", "2", **job)[0], "ranks of each node"
    task = job | {"SLURM_STEP_ID": 0, "SLURM_PROCID": 1, "SLURM_STEP_NUM_TASKS": 8, "SLURM_STEP_NUM_NODES": 2}
    assert dry_run(*FLAGS, **task)[0][-3:-1] == [sys.executable, "-u"], "a task of srun is a rank"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "expected a recipe (--list lists them), --config FILE, or flags (see --help)."),
        (["8b_vit_lor"], "unknown recipe: '8b_vit_lor'; did you mean internvl2.5/8b_vit_lora?"),
        (["zzz"], "unknown recipe: 'zzz'; `internvl train --list` lists all recipes."),
        (["8b_vit_lora", "--max_step_size", "3"], "unknown flag: --max_step_size; did you mean --max_steps?"),
        (["--lerning_rate=3"], "unknown flag: --lerning_rate; did you mean --learning_rate?"),
        (["--max-seq-len-gth", "3"], "unknown flag: --max_seq_len_gth; did you mean --max_seq_length?"),
        (["--npoc", "3"], "unknown flag: --npoc; did you mean --nproc?"),
        (
            ["--max_steps", "3", "8b_vit_lora"],
            "expected one recipe, before all flags: move '8b_vit_lora', or remove it.",
        ),
        (["--zzzzz", "3"], "unknown flag: --zzzzz; `internvl train --help` lists all flags."),
        (["--nproc", "0", *FLAGS], "--nproc 0 is invalid: expected auto, or an integer from 1 to 1024."),
        (["--nproc", "two", *FLAGS], "--nproc two is invalid: expected auto, or an integer from 1 to 1024."),
        (["x.sh", "--preference"], "--config and --preference are for runs without a recipe: remove 'x.sh'."),
        (["--config", "none.yaml"], "--config none.yaml cannot be read: No such file or directory."),
        (["--list", "zzz"], "no recipe contains 'zzz'; `internvl train --list` lists all recipes."),
    ],
)  # fmt: skip
def test_an_error_is_one_sentence(argv, message):
    assert get_error(*argv) == f"error: {message}"


def test_an_unknown_flag_of_a_file_has_its_line(tmp_path):
    (config := tmp_path / "run.yaml").write_text("meta_path: a\n\nlerning_rate: 3\n")
    message = f"error: {config}, line 3: unknown flag: --lerning_rate; did you mean --learning_rate?"
    assert get_error("--config", config) == message


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate", "1e-4"], "launch.sh: --meta_path and --output_dir are required: .*"),
        ([*FLAGS, "--meta_path", "none.json"], "launch.sh: --meta_path none.json is not a file; .*example.json."),
        ([*FLAGS, "--model_name_or_path=./none"], "launch.sh: --model_name_or_path ./none is not a folder and .*"),
        ([*FLAGS, "--output_dir=/dev/null/out"], "launch.sh: cannot create --output_dir /dev/null/out: .*"),
    ],
)
def test_launch_sh_names_the_flags(start, flags, message):
    done = start(*flags)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(f"{message}\n", done.stderr), done.stderr


def test_list_shows_the_settings_of_recipes(capsys):
    main(["--list", "vit_LORA"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == "recipe model LoRA rank ZeRO packed".split()
    assert len(rows) == 7
    assert ["internvl2.5/8b_vit_lora", "OpenGVLab/InternVL2_5-8B", "vision 16, LLM 16", "2", "yes"] in [
        re.split(r"  +", row) for row in rows
    ]


def test_help_has_all_flags_and_eight_first(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    flags = re.findall(r"^  --(\w+)", text.partition("the flags that matter first:\n")[2], re.MULTILINE)
    assert len({*flags}) == len(flags)
    first = text.partition("the flags that matter first:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^  --(\w+)", first, re.MULTILINE) == [
        *("model_name_or_path", "meta_path", "output_dir", "use_backbone_lora", "use_llm_lora"),
        *("learning_rate", "num_train_epochs", "max_packed_tokens"),
    ]
    for argument_class in PREFERENCE_ARGUMENTS:
        for base in argument_class.__mro__:
            if base.__module__.startswith("internvl."):
                assert {*vars(base).get("__annotations__", {})} <= {*flags}, base


@pytest.mark.multiprocess
def test_training_without_a_recipe(start, tiny_inputs, tmp_path):
    """Two ranks, with the losses of the training program alone."""
    flags = [*TRAIN_ADAPTERS, *"--max_steps 2 --save_strategy no --no_smoke_save".split()]
    output = tmp_path / "command"
    done = start(
        *build_run_flags(tiny_inputs, output, ranks=2), *flags, "--nproc", "2",
        INTERNVL_CACHE=tiny_inputs / "cache", OMP_NUM_THREADS=1,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Trainable parameters" in (output / "training_log.txt").read_text()
    run_training(tiny_inputs, tmp_path / "program", *flags, ranks=2)
    assert read_losses(output) == read_losses(tmp_path / "program")
