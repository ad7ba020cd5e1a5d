"""Draw handwritten digits as images and conversations, the data of the quickstart.

The seed decides every byte. Files in the output folder:

    {plain,shifted}/0000_0.png ...                      number of the scan, number of the copy
    {plain,shifted}_{train,validation,heldout}.jsonl    annotations, one conversation per line
    {plain,shifted}_train.json                          meta files for --meta_path
    validation.json, heldout.json                       both domains, for --eval_meta_path and tools/evaluate.py
    plain_prompts.json                                  for --eval_base_answers

The domain "plain" is dark ink on white paper. "shifted" is the same scan as chalk on a patterned slate, rotated by 90
degrees. Scans are split before they are drawn, so no scan of one split is in another, in either domain. A training scan
is drawn in several copies: the first as it is, the others moved by some pixels, each with its own question and pattern.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from internvl.command_line import exit_on_user_error
from internvl.versions import require_package

SEED = 0
NUM_HELD_OUT, NUM_VALIDATION = 500, 100  # scans; the others are for training
IMAGE_SIZE = 112  # pixels of a side, 14 for each of the scan's 8
NUM_COPIES = {"train": 4, "validation": 1, "heldout": 1}
MAX_OFFSET = 10  # pixels by which a copy is moved at most, in each direction
# (question, answer): the wording of the question decides the form of the answer.
PHRASES = (
    ("Which digit is this?", "{}"),
    ("What number do you see?", "{}"),
    ("Read the digit.", "{}"),
    ("Name the digit in a sentence.", "The digit is {}."),
)


def split_scans(num_scans: int, seed: int = SEED) -> dict[str, np.ndarray]:
    """Split scan numbers into `heldout`, `validation` and `train`, each sorted."""
    order = np.random.default_rng(seed).permutation(num_scans)
    parts = np.split(order, [NUM_HELD_OUT, NUM_HELD_OUT + NUM_VALIDATION])
    return dict(zip(("heldout", "validation", "train"), map(np.sort, parts), strict=True))


def enlarge(scan: np.ndarray, right: int, down: int) -> np.ndarray:
    """Scale a scan to the image size and move it.

    Args:
        scan: (8, 8), values from 0 to 16.
        right, down: offset in pixels.

    Returns:
        (IMAGE_SIZE, IMAGE_SIZE) float32, the amount of ink in [0, 1].
    """
    image = Image.fromarray((scan / 16 * 255).astype(np.uint8)).resize(
        (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC
    )
    padded = np.pad(np.asarray(image, dtype=np.float32) / 255, MAX_OFFSET)
    return padded[MAX_OFFSET - down :, MAX_OFFSET - right :][:IMAGE_SIZE, :IMAGE_SIZE]


def draw_plain(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw dark ink on white paper, (IMAGE_SIZE, IMAGE_SIZE) uint8."""
    return (255 * (1 - ink)).astype(np.uint8)


def draw_shifted(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw rotated chalk on a slate, (IMAGE_SIZE, IMAGE_SIZE) uint8.

    The slate's pattern is the sum of two gratings of random direction, phase and wavelength.
    """
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    slate = np.full((IMAGE_SIZE, IMAGE_SIZE), 70.0)
    for _ in range(2):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        wavelength = rng.uniform(10, 40)
        slate += 15 * np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / wavelength + phase)
    chalk = np.rot90(ink)
    return np.clip(slate + (250 - slate) * chalk, 0, 255).astype(np.uint8)


DOMAINS = {"plain": draw_plain, "shifted": draw_shifted}


def make_record(image: str, digit: int, rng: np.random.Generator) -> dict:
    """Make a conversation about an image, with a random question.

    Every wording with the right digit counts as correct.
    """
    question, answer = PHRASES[rng.integers(len(PHRASES))]
    turns = [("human", f"<image>\n{question}"), ("gpt", answer.format(digit))]
    conversation = [{"from": role, "value": text} for role, text in turns]
    answers = [f"{template.format(digit)}{end}" for template in ("{}", "The digit is {}") for end in ("", ".")]
    return {"image": image, "conversations": conversation, "answers": answers}


def write_sample(folder: Path, domain: str, number: int, copy: int, scan: np.ndarray, digit: int, seed: int) -> dict:
    """Write an image and return its conversation.

    A copy has the same question and offset in both domains.
    """
    rng = np.random.default_rng((seed, number, copy))
    image = f"{domain}/{number:04d}_{copy}.png"
    record = make_record(image, int(digit), rng)
    right, down = rng.integers(-MAX_OFFSET, MAX_OFFSET + 1, 2) if copy else (0, 0)
    pixels = DOMAINS[domain](enlarge(scan, right, down), rng)
    Image.fromarray(pixels).save(folder / image, compress_level=1)
    return record


def write_meta_file(file: Path, sets: dict[str, str], **entry) -> None:
    """Write a meta file.

    Args:
        sets: name -> annotation file in the same folder.
        entry: further keys of each entry.
    """
    entries = {
        name: {"root": str(file.parent), "annotation": str(file.parent / annotation), **entry}
        for name, annotation in sets.items()
    }
    file.write_text(json.dumps(entries, indent=2))


def write_dataset(folder: Path, seed: int = SEED) -> None:
    """Write images, annotations and meta files of both domains."""
    from sklearn.datasets import load_digits

    scans, digits = load_digits(return_X_y=True)
    scans = scans.reshape(-1, 8, 8)
    for domain in DOMAINS:
        (folder / domain).mkdir(parents=True, exist_ok=True)
        for split, numbers in split_scans(len(scans), seed).items():
            copies = range(NUM_COPIES[split])
            records = [
                write_sample(folder, domain, number, copy, scans[number], digits[number], seed)
                for number in numbers
                for copy in copies
            ]
            (folder / f"{domain}_{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            print(f"{domain}_{split}.jsonl: {len(records)} samples", flush=True)
        write_meta_file(folder / f"{domain}_train.json", {f"{domain}_train": f"{domain}_train.jsonl"})
    write_meta_file(folder / "plain_prompts.json", {"plain_prompts": "plain_validation.jsonl"})
    for split in ("validation", "heldout"):
        files = {domain: f"{domain}_{split}.jsonl" for domain in DOMAINS}
        write_meta_file(folder / f"{split}.json", files, metric="exact_match")


@exit_on_user_error
def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder for images and annotations")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args(argv)
    require_package("scikit-learn", "the quickstart")
    write_dataset(args.folder.resolve(), args.seed)


if __name__ == "__main__":
    main()
