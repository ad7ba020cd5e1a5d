"""Measure the data path alone: opening annotations, worker memory, samples per second.

    python tools/benchmark_loader.py --lines 1000000

Writes an annotation file of short conversations with images (0.9 GB per million lines) and a tokenizer into a temporary
folder. Rates are medians over parts of the samples, with their 95 % interval. Memory is private memory, from
/proc/PID/smaps: pages that a process shares with no other. The memory growth is that of a spawned worker compared with
a worker that has only a thousandth of the lines.
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
from torch.utils.data import DataLoader, Dataset

from internvl.arguments.data import DataTrainingArguments
from internvl.command_line import exit_on_user_error
from internvl.constants import SPECIAL_TOKENS
from internvl.data.collators import collate_rows
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.planning.packed_dataset import PackedDataset
from internvl.tools.benchmark.turns import compute_median_interval, format_interval

NUM_IMAGES = 64
NUM_PARTS = 12  # whose rates have an interval
WORDS = "the cat sits on a red chair near an old window while two dogs sleep under it and nobody is there".split()


def write_data(folder: Path, num_lines: int) -> None:
    """Write `data.jsonl`, about 900 bytes per line, and its images."""
    rng = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        size = int(rng.integers(300, 900)), int(rng.integers(300, 900))
        noise = Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8))
        noise.resize(size).save(folder / f"{i}.jpg", quality=90)
    answers = [" ".join(rng.choice(WORDS, 155)) for _ in range(512)]
    with open(folder / "data.jsonl", "w") as file:
        for i in range(num_lines):
            conversation = [
                {"from": "human", "value": f"<image>\nQuestion {i}: what is it?"},
                {"from": "gpt", "value": answers[i % len(answers)]},
            ]
            record = {"id": i, "image": f"{i % NUM_IMAGES}.jpg", "conversations": conversation}
            file.write(json.dumps(record) + "\n")


def train_tokenizer():
    """Train a byte-level BPE tokenizer on the words of the data."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, special_tokens=special_tokens)
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", model_max_length=4096
    )


def open_dataset(folder: Path, name: str, tokenizer) -> LazySupervisedDataset:
    """Open an annotation file as training does, with the default tiling."""
    args = DataTrainingArguments(conv_style="internvl2_5", dynamic_image_size=True, use_thumbnail=True)
    return LazySupervisedDataset(name, {"root": str(folder), "annotation": str(folder / name)}, tokenizer, 256, args)


def get_private_memory() -> float:
    """Return the private memory of this process, in MB."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1000


class WorkerMemoryDataset(Dataset):
    """Private memory in MB after tokenizing a sample, without decoding images."""

    def __init__(self, dataset: LazySupervisedDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> float:
        self.dataset.measure(index)
        # Reading smaps is slow: only for the first and the last sample.
        return get_private_memory() if index in (0, len(self.dataset) - 1) else 0.0


def measure_worker_memory(dataset: LazySupervisedDataset, num_samples: int) -> float:
    """Measure the memory of a spawned DataLoader worker, in MB.

    It reads samples from all over the file.
    """
    indices = np.linspace(0, len(dataset) - 1, num_samples).astype(int).tolist()
    loader = DataLoader(
        WorkerMemoryDataset(dataset),
        sampler=indices,
        batch_size=None,
        num_workers=1,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )
    *_, memory_after_last = loader
    return memory_after_last


@exit_on_user_error
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000, help="records of the annotation file")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="DataLoader workers")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["INTERNVL_CACHE"] = f"{folder}/cache"
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        folder = Path(folder)
        write_data(folder, args.lines)
        with open(folder / "data.jsonl") as data, open(folder / "part.jsonl", "w") as part:
            part.writelines(line for line, _ in zip(data, range(max(1, args.lines // 1000)), strict=False))
        print(f"Annotation file: {args.lines:,} lines, {os.path.getsize(folder / 'data.jsonl') / 1e9:.2f} GB")
        tokenizer = train_tokenizer()
        start = time.perf_counter()
        dataset = open_dataset(folder, "data.jsonl", tokenizer)  # builds the index of lines
        print(f"Opening, first time: {time.perf_counter() - start:.3f} s, once")
        seconds = []
        for _ in range(NUM_PARTS):
            start = time.perf_counter()
            open_dataset(folder, "data.jsonl", tokenizer)
            seconds.append(time.perf_counter() - start)
        print(f"Opening, from cache: {format_interval(compute_median_interval(seconds), '.3f')} s")
        small_dataset = open_dataset(folder, "part.jsonl", tokenizer)
        small, large = measure_worker_memory(small_dataset, 1000), measure_worker_memory(dataset, 1000)
        print(f"Private memory of a worker: {large:.1f} MB; with a thousandth of the lines: {small:.1f} MB")
        print(f"Memory growth: {large - small:.1f} MB")
        measure_throughput(dataset, args.workers)


def measure_throughput(dataset: LazySupervisedDataset, num_workers: int) -> None:
    """Print samples per second of measuring and of loading."""
    rates, part_size = [], max(1, min(len(dataset), 5000) // NUM_PARTS)
    for part in range(NUM_PARTS):
        start = time.perf_counter()
        for index in range(part * part_size, (part + 1) * part_size):
            dataset.measure(index)
        rates.append(part_size / (time.perf_counter() - start))
    print(f"Measuring: {format_interval(compute_median_interval(rates), ',.0f')} samples/s on one core")
    part_size = max(1, min(len(dataset), 300 * num_workers) // (1 + NUM_PARTS))
    num_batches = 1 + (1 + NUM_PARTS) * part_size
    keys = [[(0, index % len(dataset))] for index in range(num_batches)]  # one row of one sample, in epoch 0
    loader = DataLoader(
        PackedDataset([dataset]),
        batch_sampler=keys,
        collate_fn=collate_rows,
        num_workers=num_workers,
        prefetch_factor=4,
    )
    batches = iter(loader)
    tile_megabytes = next(batches)["pixel_values"][0].nbytes / 1e6
    rates, tile_rates = [], []
    for number in range(1 + NUM_PARTS):
        start = time.perf_counter()
        num_tiles = sum(len(next(batches)["pixel_values"]) for _ in range(part_size))
        seconds = time.perf_counter() - start
        if number:  # in the first part, the workers start
            rates.append(part_size / seconds)
            tile_rates.append(num_tiles / seconds)
    print(
        f"Loading: {format_interval(compute_median_interval(rates), ',.0f')} samples/s, "
        f"{format_interval(compute_median_interval(tile_rates), ',.0f')} tiles/s with {num_workers} workers, "
        f"{tile_megabytes:.2f} MB per tile"
    )


if __name__ == "__main__":
    sys.exit(main())
