"""Measures the data path alone: opening a large annotation, memory of its workers, samples a second.

    python tools/benchmark_loader.py --lines 1000000

Writes an annotation of short conversations with pictures into a folder that is removed afterwards (0.9 GB a million
lines), with a tokenizer trained on it. Private memory is what the kernel tells in /proc/PID/smaps: pages that a process
shares with no other. A spawned worker is compared with one of the same kind over a thousandth of the lines.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from internvl.arguments.training import DataTrainingArguments
from internvl.command_line import command
from internvl.constants import SPECIAL_TOKENS
from internvl.data.collators import row_collator
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.planning.packed_dataset import PackedDataset

PICTURES = 64
WORDS = "the cat sits on a red chair near an old window while two dogs sleep under it and nobody is there".split()


def write_data(folder: Path, lines: int) -> None:
    """`data.jsonl`: about 900 bytes a line, one picture of 64 each."""
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        side = int(rng.integers(300, 900)), int(rng.integers(300, 900))
        noise = Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8))
        noise.resize(side).save(folder / f"{i}.jpg", quality=90)
    answers = [" ".join(rng.choice(WORDS, 155)) for _ in range(512)]
    with open(folder / "data.jsonl", "w") as file:
        for i in range(lines):
            turns = [
                {"from": "human", "value": f"<image>\nQuestion {i}: what is it?"},
                {"from": "gpt", "value": answers[i % len(answers)]},
            ]
            file.write(json.dumps({"id": i, "image": f"{i % PICTURES}.jpg", "conversations": turns}) + "\n")


def tokenizer_of(folder: Path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, special_tokens=special)
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", model_max_length=4096
    )


def dataset_of(folder: Path, name: str, tokenizer) -> LazySupervisedDataset:
    args = DataTrainingArguments(conv_style="internvl2_5", dynamic_image_size=True, use_thumbnail=True)
    return LazySupervisedDataset(name, {"root": str(folder), "annotation": str(folder / name)}, tokenizer, 256, args)


def private_memory(pid: int | str = "self") -> float:
    """MB."""
    lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1000


def worker_memory(dataset: LazySupervisedDataset, samples: int) -> float:
    """Private memory of a spawned DataLoader worker that has read so many records all over the file."""
    ids = np.linspace(0, len(dataset) - 1, samples).astype(int).tolist()
    loader = DataLoader(
        Texts(dataset),
        sampler=ids,
        batch_size=None,
        num_workers=1,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )
    for memory in loader:
        last = memory
    return last


class Texts:
    """Reads and tokenises, decodes nothing; an item is the memory of the process that made it."""

    def __init__(self, dataset: LazySupervisedDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> float:
        self.dataset.measure(index)
        return private_memory() if index in (0, len(self.dataset) - 1) else 0.0


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["INTERNVL_CACHE"] = f"{folder}/cache"
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        folder = Path(folder)
        write_data(folder, args.lines)
        with open(folder / "data.jsonl") as whole, open(folder / "part.jsonl", "w") as part:
            part.writelines(line for line, _ in zip(whole, range(max(1, args.lines // 1000)), strict=False))
        print(f"annotation: {args.lines:,} lines, {os.path.getsize(folder / 'data.jsonl') / 1e9:.2f} GB")
        tokenizer = tokenizer_of(folder)
        for attempt in ("first", "again"):
            start = time.perf_counter()
            dataset = dataset_of(folder, "data.jsonl", tokenizer)
            print(f"opened {attempt + ':':7} {time.perf_counter() - start:.3f} s")
        part = dataset_of(folder, "part.jsonl", tokenizer)
        small, large = worker_memory(part, 1000), worker_memory(dataset, 1000)
        print(f"private memory of a worker: {large:.1f} MB; over a thousandth of the lines {small:.1f} MB")
        print(f"growth: {large - small:.1f} MB")
        speeds(dataset, part, args.workers)


def speeds(dataset: LazySupervisedDataset, part: LazySupervisedDataset, workers: int) -> None:
    start, count = time.perf_counter(), min(len(dataset), 5000)
    for index in range(count):
        dataset.measure(index)
    print(f"measuring: {count / (time.perf_counter() - start):,.0f} samples a second on one core")
    rows, count = PackedDataset([dataset]), min(len(dataset), 200 * workers)
    keys = [[(0, index)] for index in range(count)]
    loader = DataLoader(rows, batch_sampler=keys, collate_fn=row_collator, num_workers=workers, prefetch_factor=4)
    start, tiles, bytes_ = time.perf_counter(), 0, 0
    for batch in loader:
        tiles += len(batch["pixel_values"])
        bytes_ += batch["pixel_values"].nbytes
    seconds = time.perf_counter() - start
    print(
        f"loading: {count / seconds:,.0f} samples and {tiles / seconds:,.0f} tiles a second with {workers} workers, "
        f"{bytes_ / tiles / 1e6:.2f} MB a tile handed over"
    )


if __name__ == "__main__":
    sys.exit(main())
