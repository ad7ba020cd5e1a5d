"""Extract the middle frame of each SEED-Bench video question's video.

    python tools/extract_video_frames.py --ann-file SEED-Bench.json [--output SEED-Bench-video-image] [--workers 8]

Models are evaluated on these images. Each of the three types of video questions has a folder of videos (--ssv2,
--epic-kitchens, --breakfast). Images are saved as OUTPUT/TYPE_QUESTION.png.
"""

import argparse
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from internvl.command_line import exit_on_user_error, resolve_below
from internvl.constants import UnusableSample
from internvl.data.video_files import read_video_file
from internvl.data.videos import get_frame_indices, read_frames
from internvl.regular_files import read_json_object

# Question type -> default folder of its videos.
VIDEO_DIRS = {
    10: "./videos/20bn-something-something-v2",
    11: "./videos/EPIC-KITCHENS",
    12: "./videos/BreakfastII_15fps_qvga_sync",
}
MAX_ANNOTATION_BYTES = 2**30
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
        UnusableSample: the video is missing or broken, or has no frame in the question's segment, or a name in the
            question leads out of the folders.
    """
    question_type, data_id, segment = qa_item["question_type_id"], qa_item["data_id"], qa_item.get("segment")
    try:
        name = Path(data_id).name if question_type == EPIC_KITCHENS_TYPE else data_id
        video = str(resolve_below(video_dirs[question_type], name))
        output_file = resolve_below(output_dir, f"{question_type}_{qa_item['question_id']}.png")
        if output_file.parent != Path(output_dir).resolve():
            raise ValueError(f"the question id {qa_item['question_id']!r:.80} has a slash, and it names a file")
    except ValueError as error:
        raise UnusableSample(str(error)) from error
    if segment and question_type == BREAKFAST_TYPE:
        frame = read_video_file(video, None, partial(_choose_middle_frame, video, segment))[0]
    else:
        frame = read_frames(video, 1, "middle", clip=segment)[0]
    frame.save(output_file)
    return output_file


def _choose_middle_frame(video: str, segment: list, num_frames: int, fps: float) -> list[int]:
    """Choose the middle frame of a segment in frames."""
    if not (isinstance(segment, list) and len(segment) == 2 and all(type(frame) is int for frame in segment)):
        raise UnusableSample(f"segment {segment!r:.80} is not [first, last] in frames")
    first, end = segment[0], min(segment[1], num_frames)
    if not 0 <= first < end:
        raise UnusableSample(f"segment {segment!r:.80} contains no frame of {video}, which has {num_frames}")
    return [first + index for index in get_frame_indices(1, end - first, "middle")]


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
        questions = read_json_object(args.ann_file, MAX_ANNOTATION_BYTES)["questions"]
        questions = [item for item in questions if item["question_type_id"] in video_dirs]
        for item in questions:
            if not all(isinstance(item[key], (str, int)) for key in ("question_id", "data_id")):
                raise ValueError(f"question_id and data_id must be texts, got {item!r:.80}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{args.ann_file} is not a SEED-Bench file: {type(error).__name__} {error}") from error
    Path(args.output).mkdir(parents=True, exist_ok=True)
    failed = fetch_images_parallel(questions, video_dirs, args.output, args.workers)
    print(f"Images: {len(questions) - len(failed)}")
    print(f"Image folder: {args.output}")
    if failed:
        reasons = "; ".join(f"{question_id}: {reason}" for question_id, reason in failed.items())
        raise ValueError(f"failed for {len(failed)} of {len(questions)} questions: {reasons}")
