"""Fuzz the data, checkpoints and flags of a tiny run.

    python tests/stress/fuzzing.py --seed 3

Each case changes one or two things in the inputs of a valid run and trains one step. Its number and the seed decide
what changes. The case must finish that step, with every record accounted for, or fail with one sentence. Anything else
is a finding, and the exit status is 1. `test_fuzzing.py` runs some cases.
"""

import argparse
import contextlib
import dataclasses
import gc
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from accelerate.state import AcceleratorState
from helpers.paths import GOLDENS_ARCHIVE, REPO_ROOT
from helpers.training_runs import (
    TRAIN_ADAPTERS,
    TRAIN_LLM_AND_PROJECTOR,
    build_launch_command,
    build_run_flags,
    copy_tiny_model,
    prepare_trainer,
    write_meta_file,
)
from stress.mutations import FLAG_VALUES, mutate_file

from internvl.arguments.data import DataTrainingArguments
from internvl.arguments.model import ModelArguments
from internvl.arguments.per_part import LoraArguments, PartRateArguments
from internvl.arguments.training import TrainingArguments

CASE_TIMEOUT_SECONDS = 120
# Flags of transformers that a training depends on and that have no effect outside its output folder.
TRANSFORMERS_FLAGS = """
    learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs lr_scheduler_type
    warmup_steps per_device_train_batch_size gradient_accumulation_steps seed data_seed bf16 fp16 optim save_steps
    logging_steps save_strategy save_total_limit dataloader_num_workers dataloader_prefetch_factor eval_strategy
    logging_strategy lr_scheduler_kwargs optim_args gradient_checkpointing resume_from_checkpoint log_level
""".split()


def list_fuzzed_flags() -> list[str]:
    """Return the flags of this repository and those of transformers above."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments.__mro__[1])}
    ours = [
        f.name
        for cls in (ModelArguments, DataTrainingArguments, LoraArguments, PartRateArguments)
        for f in dataclasses.fields(cls)
    ]
    ours += [field.name for field in dataclasses.fields(TrainingArguments) if field.name not in inherited]
    return sorted({*ours, *TRANSFORMERS_FLAGS} - {"quantize_backbone", "quantize_llm", "deepspeed"})


# -- cases -------------------------------------------------------------------------------------------------------------

# What is changed: files of the case, by pattern. "zero" adds a DeepSpeed configuration and changes it.
KINDS = {
    "records": ["train.jsonl"],
    "meta": ["meta.json"],
    "image": ["images/*"],
    "config": ["model/config.json"],
    "tokenizer": ["model/*token*.json"],
    "weights": ["model/model.safetensors"],
    "zero": ["zero.json"],
    "flags": [],
}  # fmt: skip
IN_PROCESS_KINDS = [kind for kind in KINDS if kind != "zero"]  # DeepSpeed leaves global state in its process


@dataclasses.dataclass
class Case:
    """A run: the folder of its inputs, its flags, what was changed."""

    folder: Path
    flags: list[str]
    changes: list[str]

    @property
    def argv(self) -> list[str]:
        """Return the command line, limited to one step."""
        return [*build_run_flags(self.folder, self.folder / "out"), *self.flags, "--max_steps", "1"]

    @property
    def num_records(self) -> int:
        """Return the non-empty lines of the annotation file times `repeat_time`."""
        lines = len([line for line in (self.folder / "train.jsonl").read_bytes().split(b"\n") if line.strip(b"\r")])
        (entry,) = json.loads((self.folder / "meta.json").read_text()).values()
        return int(lines * entry.get("repeat_time", 1))


def make_source(goldens: Path, folder: Path) -> Path:
    """Write the inputs of a valid run."""
    folder.mkdir(parents=True)
    copy_tiny_model(goldens, folder)
    records = [json.loads(line) for line in (goldens / "dataset/ds_main.jsonl").read_text().splitlines()]
    good = [record for record in records if record["conversations"][-1]["value"]]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, good)))
    shutil.copytree(goldens / "dataset/images", folder / "images")
    write_meta_file(folder, folder / "images")
    return folder


def make_case(source: Path, folder: Path, generator: random.Random, kinds: list[str]) -> Case:
    """Copy the inputs of a valid run and change some of them."""
    shutil.copytree(source, folder)
    write_meta_file(folder, folder / "images")
    flags = [*generator.choice([TRAIN_ADAPTERS, TRAIN_LLM_AND_PROJECTOR])]
    case = Case(folder, [*flags, *"--max_bad_samples 4 --no_smoke_save True".split()], [])
    if generator.random() < 0.3:
        case.flags += "--use_packed_ds True --max_packed_tokens 600 --num_images_expected 12".split()
    for kind in generator.choices(kinds, k=generator.choice([1, 1, 2])):
        if kind == "flags":
            flag, value = generator.choice(list_fuzzed_flags()), generator.choice(FLAG_VALUES)
            case.flags += [f"--{flag}", value]
            case.changes.append(f"--{flag} {value!r:.40}")
            continue
        if kind == "zero":
            shutil.copy(
                generator.choice(sorted((REPO_ROOT / "zero_stage_configs").glob("*.json"))), folder / "zero.json"
            )
            case.flags += ["--deepspeed", str(folder / "zero.json")]
        files = [file for pattern in KINDS[kind] for file in sorted(folder.glob(pattern)) if file.stat().st_size]
        case.changes.append(mutate_file(generator.choice(files), generator))
    return case


# -- outcomes ----------------------------------------------------------------------------------------------------------


class CaseTimeoutError(BaseException):
    """A timeout of a case (no `Exception`: the program would catch it)."""


@contextlib.contextmanager
def quiet_case(seconds: int) -> Iterator[None]:
    """Run a case without output; raise CaseTimeoutError after some seconds."""
    AcceleratorState._reset_state(True)  # accelerate (1.15) keeps the device and the precision of the previous case

    def raise_timeout(*_):
        raise CaseTimeoutError(f"longer than {seconds} s")

    signal.signal(signal.SIGALRM, raise_timeout)
    signal.alarm(seconds)
    discarded = io.StringIO()
    try:
        with contextlib.redirect_stdout(discarded), contextlib.redirect_stderr(discarded):
            yield
    finally:
        signal.alarm(0)


def run_case(case: Case) -> str:
    """Run a case in this process.

    Returns `trained`, `error: SENTENCE` or `finding: DETAILS`.
    """
    try:
        with quiet_case(CASE_TIMEOUT_SECONDS):
            trainer = prepare_trainer(case.argv)
            trainer.train()
    except (ValueError, OSError) as error:
        return judge_message(str(error))
    except SystemExit as error:
        return judge_message(str(error.code).removeprefix("error: "))
    except BaseException:
        return f"finding: {traceback.format_exc()}"
    finally:
        gc.collect()
    rows = trainer.train_dataset
    num_samples = sum(map(len, rows.datasets))
    if num_samples != case.num_records:
        return f"finding: {num_samples} samples of {case.num_records} records"
    num_usable = int((trainer.schedule.lengths["tokens"][:num_samples] > 0).sum())
    num_split = len({sample for sample, _ in rows.pieces})
    num_unusable = sum(f"({rows.datasets[0].annotations.path})" in reason for reason in trainer.skipped_samples.skipped)
    if num_usable + num_split + num_unusable < num_samples or trainer.state.global_step != 1:
        counts = f"{num_usable} usable and {num_unusable} unusable of {num_samples} samples"
        return f"finding: {counts}, {trainer.state.global_step} steps"
    return "trained"


def shorten_traceback(result: str) -> str:
    """Keep the last frames in this repository and the last line."""
    lines = result.strip().splitlines()
    return "\n".join([line.strip() for line in lines if f'File "{REPO_ROOT}' in line][-3:] + lines[-1:])


def judge_message(message: str) -> str:
    """Return whether an error message is a sentence that people can read."""
    is_sentence = len(message.split()) >= 4 and "Traceback" not in message and len(message) < 20_000
    return f"error: {message}" if is_sentence else f"finding: no sentence: {message!r:.300}"


def run_case_as_process(case: Case) -> str:
    """Run a case from the command line; returns what `run_case` does."""
    command, env = build_launch_command(case.folder, case.folder / "out", *case.flags, "--max_steps", "1", ranks=1)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=4 * CASE_TIMEOUT_SECONDS)
    if done.returncode == 0:
        return "trained"
    if "Traceback" in done.stderr or "error: " not in done.stderr:
        return f"finding: status {done.returncode}\n{done.stderr[-3000:]}"
    return judge_message(done.stderr.rpartition("error: ")[2])


def run_cases(
    source: Path, seed: int, numbers, kinds=(), run_fn=run_case, seconds: float = float("inf"), report_fn=None
) -> dict[int, tuple[list[str], str]]:
    """Run numbered cases until the time is over.

    Returns the changes and the result of each case, by number. `report_fn` is called after each.
    """
    results, start = {}, time.monotonic()
    for number in numbers:
        if time.monotonic() - start > seconds:
            break
        with tempfile.TemporaryDirectory() as folder:
            generator = random.Random(f"{seed} {number}")
            case = make_case(source, Path(folder) / "run", generator, list(kinds or IN_PROCESS_KINDS))
            results[number] = case.changes, run_fn(case)
        if report_fn:
            report_fn(number, *results[number])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=100, help="number of cases (default: 100)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case; --cases 1 runs it alone")
    parser.add_argument("--seconds", type=float, default=600, help="start no case after this time (default: 600)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="what to change")
    parser.add_argument("--all", action="store_true", help="also print cases that end with an error message")
    parser.add_argument("--processes", action="store_true", help="run each case in new processes")
    args = parser.parse_args()

    def report(number: int, changes: list[str], result: str) -> None:
        if result.startswith("finding") or args.cases == 1 or args.all:
            shown = result if args.cases == 1 else shorten_traceback(result)
            print(f"case {number}: {'; '.join(changes)}\n{shown}\n", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["INTERNVL_CACHE"] = str(Path(folder) / "cache")
        with tarfile.open(GOLDENS_ARCHIVE) as archive:
            archive.extractall(Path(folder) / "goldens", filter="data")
        source = make_source(Path(folder) / "goldens", Path(folder) / "source")
        numbers = range(args.first, args.first + args.cases)
        run_fn = run_case_as_process if args.processes else run_case
        results = run_cases(source, args.seed, numbers, args.kinds, run_fn, args.seconds, report)
    counts = Counter(result.partition(":")[0] for _, result in results.values())
    print(f"{len(results)} cases: {', '.join(f'{count} {word}' for word, count in counts.most_common())}")
    sys.exit(1 if counts["finding"] else 0)


if __name__ == "__main__":
    main()
