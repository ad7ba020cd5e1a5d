"""The quickstart's data: real scans of handwritten digits as conversations, plain and with changed looks.

First stage of shell/quickstart.sh; everything is decided by the seed. Writes to FOLDER

    {plain,shifted}/0000_0.png ...              scan number and copy
    {plain,shifted}_{train,heldout}.jsonl       one conversation a line
    {plain,shifted}_train.json                  meta files for --meta_path

Plain is dark ink on white paper. Shifted is the same scan as chalk on a patterned slate, turned by 90 degrees. The
split is made over scans, so that no held-out scan is ever trained on in either look. A scan to train on is drawn in
several copies: the first as it is, the others moved a little, each with its own question and pattern.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SEED = 0
HELD_OUT = 500
SIDE = 112  # pixels of a picture; 14 to each of the scan's 8 x 8
COPIES = {"train": 4, "heldout": 1}
MOVE = 10  # most pixels that a copy is moved by, in each direction
# (question, answer): the wording asks for the form of the answer.
PHRASES = (
    ("Which digit is this?", "{}"),
    ("What number do you see?", "{}"),
    ("Read the digit.", "{}"),
    ("Name the digit in a sentence.", "The digit is {}."),
)


def split(count: int, seed: int = SEED) -> dict[str, np.ndarray]:
    """Scan numbers of `train` and `heldout`, each sorted; together all of `count`, without overlap."""
    order = np.random.default_rng(seed).permutation(count)
    return {"train": np.sort(order[HELD_OUT:]), "heldout": np.sort(order[:HELD_OUT])}


def ink(scan: np.ndarray, right: int, down: int) -> np.ndarray:
    """(8, 8) counts 0..16 -> (SIDE, SIDE) smooth ink in [0, 1], moved by so many pixels."""
    picture = Image.fromarray((scan / 16 * 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    wide = np.pad(np.asarray(picture, dtype=np.float32) / 255, MOVE)
    return wide[MOVE - down :, MOVE - right :][:SIDE, :SIDE]


def plain(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Dark ink on white paper, (SIDE, SIDE) uint8."""
    return (255 * (1 - ink)).astype(np.uint8)


def shifted(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Inverted, turned and textured: chalk on a slate with two gratings of random direction, phase and wavelength."""
    y, x = np.mgrid[:SIDE, :SIDE]
    slate = np.full((SIDE, SIDE), 70.0)
    for _ in range(2):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        wavelength = rng.uniform(10, 40)
        slate += 15 * np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / wavelength + phase)
    chalk = np.rot90(ink)
    return np.clip(slate + (250 - slate) * chalk, 0, 255).astype(np.uint8)


LOOKS = {"plain": plain, "shifted": shifted}


def conversation(image: str, digit: int, rng: np.random.Generator) -> dict:
    question, answer = PHRASES[rng.integers(len(PHRASES))]
    turns = [("human", f"<image>\n{question}"), ("gpt", answer.format(digit))]
    return {"image": image, "digit": digit, "conversations": [{"from": who, "value": text} for who, text in turns]}


def draw(folder: Path, look: str, number: int, copy: int, scan: np.ndarray, digit: int, seed: int) -> dict:
    """Write one picture; return its conversation. Both looks of a copy share the question and the move."""
    rng = np.random.default_rng((seed, number, copy))
    image = f"{look}/{number:04d}_{copy}.png"
    record = conversation(image, int(digit), rng)
    right, down = rng.integers(-MOVE, MOVE + 1, 2) if copy else (0, 0)
    Image.fromarray(LOOKS[look](ink(scan, right, down), rng)).save(folder / image, compress_level=1)
    return record


def write(folder: Path, seed: int = SEED) -> None:
    """Write pictures, conversations and meta files; the same bytes for the same seed."""
    scans, digits = load_digits(return_X_y=True)
    scans = scans.reshape(-1, 8, 8)
    for look in LOOKS:
        (folder / look).mkdir(parents=True, exist_ok=True)
        for part, numbers in split(len(scans), seed).items():
            copies = range(COPIES[part])
            records = [draw(folder, look, n, copy, scans[n], digits[n], seed) for n in numbers for copy in copies]
            (folder / f"{look}_{part}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        annotation = folder / f"{look}_train.jsonl"
        entry = {"root": str(folder), "annotation": str(annotation), "data_augment": False, "repeat_time": 1}
        (folder / f"{look}_train.json").write_text(json.dumps({f"digits_{look}": entry}, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    write(args.folder.resolve(), args.seed)


if __name__ == "__main__":
    main()
