"""Takes the middle frame out of the film of each SEED-Bench video question, for evaluation as pictures.

    python tools/extract_video_frames.py --ann-file SEED-Bench.json [--output SEED-Bench-video-image] [--workers 8]

The three kinds of video questions have their films in one folder each (`--ssv2`, `--epic-kitchens`, `--breakfast`).
Written to OUTPUT/TYPE_QUESTION.png.
"""

import argparse
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from internvl.command_line import command
from internvl.constants import UnusableSample
from internvl.data.videos import get_frame_indices, read_frames

# Type of question -> folder of its films.
ROOTS = {
    10: "./videos/20bn-something-something-v2",
    11: "./videos/EPIC-KITCHENS",
    12: "./videos/BreakfastII_15fps_qvga_sync",
}
OUTPUT = "SEED-Bench-video-image"
SEGMENT_IN_FRAMES = 12  # this type counts its `segment` in frames, the others in seconds


def transform_video(buffer: np.ndarray) -> list[Image.Image]:
    """Frames (N, H, W, 3) uint8 -> pictures."""
    return [Image.fromarray(frame) for frame in buffer]


def get_index(num_frames: int, num_segments: int) -> np.ndarray:
    """The middle frame of each of `num_segments` equal parts of a film; all frames of a film that has fewer."""
    return np.array(get_frame_indices(min(num_frames, num_segments), num_frames, "middle"))


def fetch_images(qa_item: dict, roots: dict[int, str] = ROOTS, output: str | Path = OUTPUT) -> Path:
    """Writes the picture of one question and returns its path.

    Raises:
        BadSample: the film is missing or broken, or the question's segment holds no frame.
    """
    kind = qa_item["question_type_id"]
    film = Path(roots[kind]) / (Path(qa_item["data_id"]).name if kind == 11 else qa_item["data_id"])
    segment = qa_item.get("segment")
    if segment and kind == SEGMENT_IN_FRAMES:
        segment = _seconds(film, *segment)
    frame = read_frames(str(film), 1, "middle", clip=segment)[0]
    file = Path(output) / f"{kind}_{qa_item['question_id']}.png"
    frame.save(file)
    return file


def _seconds(film: Path, first: int, last: int) -> tuple[float, float]:
    """Frames `first` up to `last` as seconds; a quarter of a frame later, so that rounding finds the same frames."""
    import av

    try:
        with av.open(str(film)) as container:
            fps = float(container.streams.video[0].average_rate)
    except (OSError, IndexError) as error:
        raise UnusableSample(f"video {film} cannot be read: {error}") from error
    return (first + 0.25) / fps, (last + 0.5) / fps


def fetch_images_parallel(
    qa_items: Iterable[dict], roots: dict[int, str] = ROOTS, output: str | Path = OUTPUT, workers: int = 8
) -> dict[str, str]:
    """`fetch_images` of all questions; returns question id -> reason for those that have no picture now."""

    def fetch(item: dict) -> tuple[str, str | None]:
        try:
            fetch_images(item, roots, output)
        except UnusableSample as error:
            return item["question_id"], str(error)
        return item["question_id"], None

    with ThreadPoolExecutor(workers) as pool:
        return {question: reason for question, reason in pool.map(fetch, qa_items) if reason}


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ann-file", default="SEED-Bench.json", help="the benchmark's questions")
    parser.add_argument("--output", default=OUTPUT, help="folder for the pictures")
    parser.add_argument("--ssv2", default=ROOTS[10], help="films of questions of type 10")
    parser.add_argument("--epic-kitchens", default=ROOTS[11], help="films of questions of type 11")
    parser.add_argument("--breakfast", default=ROOTS[12], help="films of questions of type 12")
    parser.add_argument("--workers", type=int, default=8, help="films read at the same time")
    args = parser.parse_args(argv)

    roots = dict(zip(ROOTS, (args.ssv2, args.epic_kitchens, args.breakfast), strict=True))
    try:
        questions = json.loads(Path(args.ann_file).read_text(encoding="utf-8"))["questions"]
        questions = [item for item in questions if item["question_type_id"] in roots]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{args.ann_file} is no list of SEED-Bench questions: {error}") from error
    Path(args.output).mkdir(parents=True, exist_ok=True)
    failed = fetch_images_parallel(questions, roots, args.output, args.workers)
    print(f"{len(questions) - len(failed)} pictures: {args.output}")
    if failed:
        listed = "; ".join(f"{question}: {reason}" for question, reason in failed.items())
        raise ValueError(f"{len(failed)} of {len(questions)} questions have no picture: {listed}")


if __name__ == "__main__":
    main()
