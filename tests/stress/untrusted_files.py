"""Fuzz the readers of untrusted files: media, tables, checkpoints, model folders.

    python tests/stress/untrusted_files.py --seed 3 --cases 400

A grammar builds a folder of each kind: files with valid, damaged, huge or deeply nested content, links, FIFOs and
sockets, under names that point inside, outside and nowhere. A reader of the package then reads it in a forked child.
The child must answer within seconds, below a bound of memory, with a result or one sentence. It may open no file
outside the folder, start no process and connect to no address: an audit hook sees what Python does, and inotify sees
every open of the bait files outside, also by C libraries. The exit status is 1 if there is a finding, which prints its
case. `test_untrusted_files.py` runs some cases.
"""

import argparse
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
from helpers.samples import load_cached_tokenizer
from PIL import Image
from stress.file_grammar import Grammar

from internvl.arguments.data import DataTrainingArguments
from internvl.checkpoint.manifest import find_checkpoint_errors
from internvl.data.schema import load_meta
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.tokenizers.loading import load_tokenizer

MAX_SECONDS = 20.0  # on a busy machine; an answer takes well below a second
MAX_MEMORY_BYTES = 3 << 30  # address space beyond what the parent has
MAX_MESSAGE_CHARS = 1000
FORBIDDEN_EVENTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")
STATUS_FINDING = 3
CHECKPOINT_JSON = ("manifest.json", "trainer_state.json", "data_state.json")
MODEL_JSON = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "adapter_config.json",
    "preprocessor_config.json",
    "model.safetensors.index.json",
)


# -- readers -----------------------------------------------------------------------------------------------------------


def open_dataset(folder: Path, annotation: Path, source: SimpleNamespace) -> LazySupervisedDataset:
    entry = {"root": str(folder / "root"), "annotation": str(annotation)}
    flags = DataTrainingArguments(conv_style="internvl2_5", force_image_size=28, dynamic_image_size=True)
    return LazySupervisedDataset("fuzzed", entry, load_cached_tokenizer(source.tokenizer, 400), 4, flags)


def read_records(dataset: LazySupervisedDataset) -> None:
    """Measure and load every sample; each is usable or has a reason of one line."""
    for index in range(min(len(dataset), 20)):
        for read_fn in (dataset.measure, lambda i: dataset.get(i, 0)):
            check_error(lambda read_fn=read_fn, index=index: read_fn(index))


def fill_media_root(grammar: Grammar) -> None:
    for name in ("a.png", "b.jpg", "c.mp4", "d.gif", "frames/f_1.png", "frames/f_2.png", "frames/notes.txt"):
        grammar.place(grammar.folder / "root" / name)


def make_record(grammar: Grammar) -> dict:
    record = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]}
    key = grammar.draw.choice(["image", "image", "video", "images", "clip"])
    record[key] = grammar.draw.choice([grammar.refer, lambda: [grammar.refer(), grammar.refer()], grammar.make_value])()
    return record


def fuzz_media(grammar: Grammar, source: SimpleNamespace) -> Callable:
    fill_media_root(grammar)
    file = grammar.folder / "data.jsonl"
    lines = [json.dumps(make_record(grammar)) for _ in range(6)]
    lines += [grammar.draw.choice(["{" * 100_000, '{"a": ' + "9" * 5000 + "}", "null", "[]", '"' + "x" * 10**6 + '"'])]
    file.write_text("\n".join(lines))
    return lambda: read_records(open_dataset(grammar.folder, file, source))


def fuzz_annotation(grammar: Grammar, source: SimpleNamespace) -> Callable:
    fill_media_root(grammar)
    file = grammar.folder / grammar.draw.choice(["data.jsonl", "data.parquet", "data.arrow", "saved/state.json"])
    grammar.place(file, grammar.draw.choice([None, json.dumps(make_record(grammar)).encode()]), may_link_outside=False)
    target = file.parent if file.name == "state.json" else file
    return lambda: read_records(open_dataset(grammar.folder, target, source))


def fuzz_table(grammar: Grammar, source: SimpleNamespace) -> Callable:
    """Write a table whose image column has bytes and paths, as `datasets` saves it."""
    fill_media_root(grammar)
    conversations = [[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]] * 4
    paths = [ref if isinstance(ref := grammar.refer(), str) else "a.png" for _ in range(4)]
    paths = [path.encode("utf-8", "replace").decode() for path in paths]
    column = [{"bytes": grammar.draw.choice([None, grammar.make_content()]), "path": path} for path in paths]
    table = pa.table({"image": column, "conversations": conversations})
    kind = grammar.draw.choice(["Image", "Audio", "Video", "Pdf", "Nifti", "Mesh"])
    features = {"info": {"features": {"image": {"_type": kind}, "conversations": grammar.make_value()}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    if grammar.draw.random() < 0.5:
        file = grammar.folder / "data.parquet"
        pq.write_table(table, file)
    else:
        file = grammar.folder / "saved"
        file.mkdir()
        with pa.OSFile(str(file / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        state = {"_data_files": [{"filename": grammar.draw.choice(["data.arrow", grammar.refer()])}], "_indices": None}
        (file / "state.json").write_text(json.dumps(grammar.draw.choice([state, grammar.change_json(state)])))
        (file / "dataset_info.json").write_text(json.dumps(grammar.make_value()))
    return lambda: read_records(open_dataset(grammar.folder, file, source))


def fuzz_meta(grammar: Grammar, source: SimpleNamespace) -> Callable:
    file = grammar.folder / "meta.json"
    meta = {"a": {"root": "root", "annotation": "data.jsonl", "repeat_time": 1, "max_dynamic_patch": 6}}
    grammar.place(file, json.dumps(grammar.change_json(meta)).encode(), may_link_outside=False)

    def read() -> None:
        for name, entry in load_meta(str(file)).items():
            flags = DataTrainingArguments(conv_style="internvl2_5")
            LazySupervisedDataset(name, entry, load_cached_tokenizer(source.tokenizer, 400), 4, flags)

    return read


def fuzz_checkpoint(grammar: Grammar, source: SimpleNamespace) -> Callable:
    checkpoint = grammar.folder / "checkpoint-3"
    shutil.copytree(source.checkpoint, checkpoint)
    name = grammar.draw.choice([name for name in CHECKPOINT_JSON if (checkpoint / name).is_file()])
    content = json.loads((checkpoint / name).read_text())
    if name == "manifest.json" and grammar.draw.random() < 0.5:
        content["files"][str(grammar.refer())] = {"size": 4, "crc32": ["00000000"]}
    else:
        content = grammar.change_json(content)
    grammar.place(checkpoint / name, json.dumps(content).encode())
    return lambda: find_checkpoint_errors(checkpoint)


def fuzz_model(grammar: Grammar, source: SimpleNamespace) -> Callable:
    model = grammar.folder / "model"
    shutil.copytree(source.model, model)
    for _ in range(grammar.draw.choice([1, 1, 2])):
        name = grammar.draw.choice(MODEL_JSON)
        file = model / name
        content = json.loads(file.read_text()) if file.is_file() else {"a": 1}
        grammar.place(file, json.dumps(grammar.change_json(content)).encode(), may_link_outside=False)
    if grammar.draw.random() < 0.2:
        grammar.place(model / "model.safetensors", may_link_outside=False)

    def read() -> None:
        check_error(lambda: load_tokenizer(model))
        InternVLChatModel.from_pretrained(model)

    return read


KINDS = {
    "media": fuzz_media,
    "annotation": fuzz_annotation,
    "table": fuzz_table,
    "meta": fuzz_meta,
    "checkpoint": fuzz_checkpoint,
    "model": fuzz_model,
}


# -- one case ----------------------------------------------------------------------------------------------------------


def check_error(read_fn: Callable) -> None:
    """Run a reader; its error, if any, must be one sentence.

    Raises:
        AssertionError: it is another exception or a message that nobody can read.
    """
    try:
        read_fn()
    except (ValueError, OSError) as error:  # UnusableSample is a ValueError
        message = str(error)
        if "\n" in message.strip() or not 10 < len(message) <= MAX_MESSAGE_CHARS:
            raise AssertionError(f"not one sentence ({len(message)} characters): {message[:300]!r}") from None


class BaitWatch:
    """Counts how often files outside of the case are opened, by inotify."""

    def __init__(self, files: list[Path]):
        libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = libc.inotify_init1(os.O_NONBLOCK)
        for file in files:
            assert libc.inotify_add_watch(self.descriptor, bytes(file), 0x20) >= 0, file  # IN_OPEN

    def count(self) -> int:
        try:
            return len(os.read(self.descriptor, 1 << 16)) // 16
        except BlockingIOError:
            return 0


def forbid(event: str, args: tuple) -> None:
    """Audit hook: end the child at once if it starts a process or connects."""
    if event in FORBIDDEN_EVENTS:
        os.write(2, f"finding: {event} {args!r:.300}\n".encode())
        os._exit(STATUS_FINDING)


def run_in_child(read_fn: Callable, log: Path) -> int:
    """Run a reader in a forked child with limits; return its wait status."""
    child = os.fork()
    if child:
        deadline = time.monotonic() + MAX_SECONDS
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return status
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return -1
            time.sleep(0.002)
    status = 1
    try:
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (own + MAX_MEMORY_BYTES,) * 2)
        sys.addaudithook(forbid)
        check_error(read_fn)
        status = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))  # pytest has replaced `sys.stderr`
        status = STATUS_FINDING
    finally:
        os._exit(status)


def run_case(seed: int, number: int, folder: Path, source: SimpleNamespace) -> tuple[str, str | None]:
    """Run one case; return its kind and its finding, if any."""
    draw = random.Random(f"{seed} {number}")
    case, outside = folder / "case", folder / "outside"
    for path in (case, outside):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(outside / "bait.png")
    (outside / "bait.json").write_text('{"conversations": []}')
    with pa.OSFile(str(outside / "bait.arrow"), "wb") as sink:
        table = pa.table({"a": [1]})
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    kind = list(KINDS)[number % len(KINDS)]
    grammar = Grammar(draw, case, outside)
    read_fn = KINDS[kind](grammar, source)
    os.chdir(case)
    watch = BaitWatch([*outside.iterdir()])
    log = folder / "log.txt"
    status = run_in_child(read_fn, log)
    num_opened = watch.count()
    os.close(watch.descriptor)
    printed = log.read_text(errors="replace")[-2000:] if log.exists() else ""
    if status == -1:
        return kind, f"no answer within {MAX_SECONDS:.0f} s\n{printed}"
    if num_opened:
        return kind, f"opened a file outside {num_opened} times\n{printed}"
    if status:
        return kind, f"wait status {status}\n{printed}"
    return kind, None


def fuzz(source: SimpleNamespace, folder: Path, seed: int, cases: range) -> list[str]:
    """Run cases and return the findings."""
    findings, kinds = [], Counter()
    for number in cases:
        kind, finding = run_case(seed, number, folder, source)
        kinds[kind] += 1
        if finding:
            findings.append(f"case {number} ({kind}): {finding}")
            print(findings[-1], flush=True)
    print(f"{sum(kinds.values())} cases ({dict(kinds)}), {len(findings)} findings", flush=True)
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=Path, help="folder with model/ (and its tokenizer) and checkpoint/ of a tiny run"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=400)
    args = parser.parse_args()
    source = SimpleNamespace(
        model=args.source / "model", tokenizer=args.source / "model", checkpoint=args.source / "checkpoint"
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["INTERNVL_CACHE"] = f"{folder}/cache"
        findings = fuzz(source, Path(folder), args.seed, range(args.first, args.first + args.cases))
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
