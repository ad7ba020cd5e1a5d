"""Small runs on data, checkpoints and flags that something is wrong with: `python tests/stress/fuzzing.py --seed 3`.

Each case changes one or two things of a tiny run that is right, as its number and the seed say, and trains one step.
It must end in that step, with every record of the data counted, or in one sentence; anything else is a finding, and the
status is 1. `test_fuzz.py` runs some of it.
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
from pathlib import Path

from accelerate.state import AcceleratorState
from helpers.training_runs import FULL, LORA, ROOT, copy_model, flags_of, prepare, started, write_meta
from stress.mutations import WORDS, change

from internvl.arguments.per_part import LoraArguments, RateArguments
from internvl.arguments.training import DataTrainingArguments, ModelArguments, TrainingArguments

SECONDS = 120  # after which a case hangs
# Of transformers' own flags, those that a training depends on and that reach nothing outside.
THEIRS = (
    "learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs lr_scheduler_type "
)
THEIRS += (
    "warmup_steps per_device_train_batch_size gradient_accumulation_steps seed data_seed bf16 fp16 optim save_steps "
)
THEIRS += (
    "logging_steps save_strategy save_total_limit dataloader_num_workers dataloader_prefetch_factor eval_strategy "
)
THEIRS += "logging_strategy lr_scheduler_kwargs optim_args gradient_checkpointing resume_from_checkpoint log_level"


def own_flags() -> list[str]:
    """Flags of this repository, and those of transformers above."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments.__mro__[1])}
    ours = [
        f.name
        for cls in (ModelArguments, DataTrainingArguments, LoraArguments, RateArguments)
        for f in dataclasses.fields(cls)
    ]
    ours += [field.name for field in dataclasses.fields(TrainingArguments) if field.name not in inherited]
    return sorted({*ours, *THEIRS.split()} - {"quantize_backbone", "quantize_llm", "deepspeed"})


# -- cases -------------------------------------------------------------------------------------------------------------

KINDS = {
    "records": ["train.jsonl"],
    "meta": ["meta.json"],
    "picture": ["images/*"],
    "config": ["model/config.json"],
    "tokenizer": ["model/*token*.json"],
    "weights": ["model/model.safetensors"],
    "zero": ["zero.json"],
    "flags": [],
}  # fmt: skip


HERE = [kind for kind in KINDS if kind != "zero"]  # DeepSpeed changes its process for good


@dataclasses.dataclass
class Case:
    """One run: a folder with all it reads, its flags, and what was changed of it."""

    folder: Path
    flags: list[str]
    changes: list[str]

    @property
    def argv(self) -> list[str]:
        return [*flags_of(self.folder, self.folder / "out"), *self.flags, "--max_steps", "1"]

    @property
    def records(self) -> int:
        """Lines that hold something, however often they are repeated."""
        lines = len([line for line in (self.folder / "train.jsonl").read_bytes().split(b"\n") if line.strip(b"\r")])
        (entry,) = json.loads((self.folder / "meta.json").read_text()).values()
        return int(lines * entry.get("repeat_time", 1))


def make_source(goldens: Path, folder: Path) -> Path:
    """The run that is right."""
    folder.mkdir(parents=True)
    copy_model(goldens, folder)
    records = [json.loads(line) for line in (goldens / "dataset/ds_main.jsonl").read_text().splitlines()]
    good = [record for record in records if record["conversations"][-1]["value"]]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, good)))
    shutil.copytree(goldens / "dataset/images", folder / "images")
    write_meta(folder, folder / "images")
    return folder


def make_case(source: Path, folder: Path, draw: random.Random, kinds: list[str]) -> Case:
    shutil.copytree(source, folder)
    write_meta(folder, folder / "images")
    case = Case(folder, [*draw.choice([LORA, FULL]), "--max_bad_samples", "4", "--no_smoke_save", "True"], [])
    if draw.random() < 0.3:
        case.flags += "--use_packed_ds True --max_packed_tokens 600 --num_images_expected 12".split()
    for kind in draw.choices(kinds, k=draw.choice([1, 1, 2])):
        if kind == "flags":
            flag, word = draw.choice(own_flags()), draw.choice(WORDS)
            case.flags += [f"--{flag}", word]
            case.changes.append(f"--{flag} {word!r:.40}")
            continue
        if kind == "zero":
            shutil.copy(draw.choice(sorted((ROOT / "zero_stage_configs").glob("*.json"))), folder / "zero.json")
            case.flags += ["--deepspeed", str(folder / "zero.json")]
        files = [file for pattern in KINDS[kind] for file in sorted(folder.glob(pattern)) if file.stat().st_size]
        case.changes.append(change(draw.choice(files), draw))
    return case


# -- outcomes ----------------------------------------------------------------------------------------------------------


class Hangs(BaseException):
    pass


def hang(*_):
    raise Hangs(f"it ran longer than {SECONDS} s")


def outcome(case: Case) -> str:
    """`trained`, `error: SENTENCE` or `finding: ...` of a case in this process."""
    AcceleratorState._reset_state(True)
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    silent = io.StringIO()
    try:
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            trainer = prepare(case.argv)
            trainer.train()
    except (ValueError, OSError) as error:
        return judged(str(error))
    except SystemExit as error:
        return judged(str(error.code).removeprefix("error: "))
    except BaseException:
        return f"finding: {traceback.format_exc()}"
    finally:
        signal.alarm(0)
        gc.collect()
    rows = trainer.train_dataset
    samples = sum(map(len, rows.datasets))
    if samples != case.records:
        return f"finding: {samples} samples of {case.records} records"
    usable = int((trainer.schedule.lengths.tokens[:samples] > 0).sum())
    parts = len({sample for sample, _ in rows.parts})
    bad = sum(f"({rows.datasets[0].records.path})" in sentence for sentence in trainer.bad_samples)
    if usable + parts + bad < samples or trainer.state.global_step != 1:
        return f"finding: {usable} usable and {bad} bad of {samples}, {trainer.state.global_step} steps"
    return "trained"


def brief(result: str) -> str:
    """The lines of a traceback that are in this repository, and its last."""
    lines = result.strip().splitlines()
    return "\n".join([line.strip() for line in lines if f'File "{ROOT}' in line][-3:] + lines[-1:])


def judged(message: str) -> str:
    """An error is for people: a sentence of several words, that is no program's."""
    plain = len(message.split()) >= 4 and "Traceback" not in message and len(message) < 20_000
    return f"error: {message}" if plain else f"finding: no sentence: {message!r:.300}"


def outcome_of_process(case: Case) -> str:
    """The same of a case in processes of its own, from the command line."""
    command, env = started(case.folder, case.folder / "out", *case.flags, "--max_steps", "1", ranks=1)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=4 * SECONDS)
    if done.returncode == 0:
        return "trained"
    if "Traceback" in done.stderr or "error: " not in done.stderr:
        return f"finding: status {done.returncode}\n{done.stderr[-3000:]}"
    return judged(done.stderr.rpartition("error: ")[2])


def fuzz(source: Path, seed: int, numbers, kinds=(), judge=outcome, seconds: float = float("inf"), tell=None) -> dict:
    """Number -> (changes, outcome) of cases, until the time is over."""
    found, start = {}, time.monotonic()
    for number in numbers:
        if time.monotonic() - start > seconds:
            break
        with tempfile.TemporaryDirectory() as folder:
            draw = random.Random(f"{seed} {number}")
            case = make_case(source, Path(folder) / "run", draw, list(kinds or HERE))
            found[number] = case.changes, judge(case)
        if tell:
            tell(number, *found[number])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--first", type=int, default=0, help="number of the first; with --cases 1: that case alone")
    parser.add_argument("--seconds", type=float, default=600, help="after which no other begins (default: 600)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="what is changed")
    parser.add_argument("--all", action="store_true", help="show errors, too")
    parser.add_argument("--processes", action="store_true", help="each case as processes of its own")
    args = parser.parse_args()

    def tell(number: int, changes: list[str], result: str) -> None:
        if result.startswith("finding") or args.cases == 1 or args.all:
            print(f"case {number}: {'; '.join(changes)}\n{result if args.cases == 1 else brief(result)}\n", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["INTERNVL_CACHE"] = str(Path(folder) / "cache")
        with tarfile.open(ROOT / "tests/goldens.tar.xz") as archive:
            archive.extractall(Path(folder) / "goldens", filter="data")
        source = make_source(Path(folder) / "goldens", Path(folder) / "source")
        numbers, judge = range(args.first, args.first + args.cases), outcome_of_process if args.processes else outcome
        found = fuzz(source, args.seed, numbers, args.kinds, judge, args.seconds, tell)
    counts = Counter(result.partition(":")[0] for _, result in found.values())
    print(f"{len(found)} cases: {', '.join(f'{count} {word}' for word, count in counts.most_common())}")
    sys.exit(1 if counts["finding"] else 0)


if __name__ == "__main__":
    main()
