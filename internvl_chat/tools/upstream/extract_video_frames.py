"""Extract the middle frame of each SEED-Bench video question's video.

    python tools/extract_video_frames.py --ann-file SEED-Bench.json [--output SEED-Bench-video-image] [--workers 8]

Models are evaluated on these images. Each of the three types of video questions has a folder of videos (--ssv2,
--epic-kitchens, --breakfast). Images are saved as OUTPUT/TYPE_QUESTION.png.
"""

import argparse
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from internvl.command_line import exit_on_user_error
from internvl.constants import UnusableSample
from internvl.data.videos import get_frame_indices, read_frames

# Question type -> default folder of its videos.
VIDEO_DIRS = {
    10: "./videos/20bn-something-something-v2",
    11: "./videos/EPIC-KITCHENS",
    12: "./videos/BreakfastII_15fps_qvga_sync",
}
OUTPUT_DIR = "SEED-Bench-video-image"
EPIC_KITCHENS_TYPE = 11  # videos are all in one folder; the folder in `data_id` is ignored
BREAKFAST_TYPE = 12  # `segment` is in frames; it is in seconds for the other types


def transform_video(buffer: np.ndarray) -> list[Image.Image]:
    """Convert frames (N, H, W, 3) uint8 to images."""
    return [Image.fromarray(frame) for frame in buffer]


def get_index(num_frames: int, num_segments: int) -> np.ndarray:
    """Return the middle frame of each of `num_segments` equal segments.

    A video with fewer frames than segments gives all its frames.
    """
    return np.array(get_frame_indices(min(num_frames, num_segments), num_frames, "middle"))


def fetch_images(qa_item: dict, video_dirs: dict[int, str] = VIDEO_DIRS, output_dir: str | Path = OUTPUT_DIR) -> Path:
    """Save the image of one question and return its path.

    Raises:
        UnusableSample: the video is missing or broken, or has no frame in the question's segment.
    """
    question_type, data_id, segment = qa_item["question_type_id"], qa_item["data_id"], qa_item.get("segment")
    video = Path(video_dirs[question_type]) / (Path(data_id).name if question_type == EPIC_KITCHENS_TYPE else data_id)
    if segment and question_type == BREAKFAST_TYPE:
        segment = _convert_to_seconds(video, *segment)
    frame = read_frames(str(video), 1, "middle", clip=segment)[0]
    output_file = Path(output_dir) / f"{question_type}_{qa_item['question_id']}.png"
    frame.save(output_file)
    return output_file


def _convert_to_seconds(video: Path, start: int, end: int) -> tuple[float, float]:
    """Convert a segment in frames to seconds.

    Fractions of a frame are added: rounding then gives the same frames again.
    """
    import av

    try:
        with av.open(str(video)) as container:
            fps = float(container.streams.video[0].average_rate)
    except (OSError, IndexError) as error:
        raise UnusableSample(f"video {video} is not readable: {error}") from error
    return (start + 0.25) / fps, (end + 0.5) / fps


def fetch_images_parallel(
    qa_items: Iterable[dict],
    video_dirs: dict[int, str] = VIDEO_DIRS,
    output_dir: str | Path = OUTPUT_DIR,
    workers: int = 8,
) -> dict[str, str]:
    """Call `fetch_images` for all questions; return the failed ones.

    Returns:
        question id -> reason.
    """

    def fetch(item: dict) -> tuple[str, str | None]:
        try:
            fetch_images(item, video_dirs, output_dir)
        except UnusableSample as error:
            return item["question_id"], str(error)
        return item["question_id"], None

    with ThreadPoolExecutor(workers) as pool:
        return {question_id: reason for question_id, reason in pool.map(fetch, qa_items) if reason}


@exit_on_user_error
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ann-file", default="SEED-Bench.json", help="questions of SEED-Bench (default: %(default)s)")
    parser.add_argument("--output", default=OUTPUT_DIR, help="folder for the images (default: %(default)s)")
    parser.add_argument("--ssv2", default=VIDEO_DIRS[10], help="videos of type 10 (default: %(default)s)")
    parser.add_argument("--epic-kitchens", default=VIDEO_DIRS[11], help="videos of type 11 (default: %(default)s)")
    parser.add_argument("--breakfast", default=VIDEO_DIRS[12], help="videos of type 12 (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=8, help="videos read in parallel (default: %(default)s)")
    args = parser.parse_args(argv)

    video_dirs = dict(zip(VIDEO_DIRS, (args.ssv2, args.epic_kitchens, args.breakfast), strict=True))
    try:
        questions = json.loads(Path(args.ann_file).read_text(encoding="utf-8"))["questions"]
        questions = [item for item in questions if item["question_type_id"] in video_dirs]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{args.ann_file} is not a SEED-Bench file: {error}") from error
    Path(args.output).mkdir(parents=True, exist_ok=True)
    failed = fetch_images_parallel(questions, video_dirs, args.output, args.workers)
    print(f"Images: {len(questions) - len(failed)}")
    print(f"Image folder: {args.output}")
    if failed:
        reasons = "; ".join(f"{question_id}: {reason}" for question_id, reason in failed.items())
        raise ValueError(f"failed for {len(failed)} of {len(questions)} questions: {reasons}")
