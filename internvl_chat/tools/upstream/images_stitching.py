"""Stitch the six camera views of DriveLM key frames.

    python tools/images_stitching.py --data-root .../images/drivelm --ann-file v1_1_val_nus_q_only.json

Each view is resized to 896 x 448 pixels and labeled with its camera. Three front views are above three back views:
2688 x 896 pixels in total. Images are saved as DATA_ROOT/stitch/SCENE_FRAME.jpg.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from internvl.command_line import exit_on_user_error, resolve_below
from internvl.data.images import load_image
from internvl.regular_files import read_json_object

MAX_ANNOTATION_BYTES = 2**30
CAMERAS = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
NUM_COLUMNS, VIEW_WIDTH, VIEW_HEIGHT = 3, 896, 448
LABEL_COLOR, LABEL_SIZE = (255, 0, 255), 50


def custom_image(image_paths: Mapping[str, str | Path]) -> Image.Image:
    """Stitch six views (camera name -> file) to one image."""
    num_rows = len(CAMERAS) // NUM_COLUMNS
    stitched = Image.new("RGB", (NUM_COLUMNS * VIEW_WIDTH, num_rows * VIEW_HEIGHT))
    for index, camera in enumerate(CAMERAS):
        view = load_image(str(image_paths[camera])).resize((VIEW_WIDTH, VIEW_HEIGHT))
        ImageDraw.Draw(view).text((0, 0), camera, fill=LABEL_COLOR, font=_load_font(LABEL_SIZE))
        row, column = divmod(index, NUM_COLUMNS)
        stitched.paste(view, (column * VIEW_WIDTH, row * VIEW_HEIGHT))
    return stitched


def get_images(ann_file: str | Path, data_root: str | Path) -> Iterator[tuple[str, dict[str, Path]]]:
    """Yield SCENE_FRAME and camera name -> file for every key frame.

    Raises:
        ValueError: the file is not a DriveLM annotation, a frame lacks a camera, or a path leads out of `data_root`.
    """
    try:
        scenes = read_json_object(ann_file, MAX_ANNOTATION_BYTES)
        frames = [(f"{s}_{f}", frame) for s, scene in scenes.items() for f, frame in scene["key_frames"].items()]
        paths_by_frame = [(name, dict(frame["image_paths"])) for name, frame in frames]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{ann_file} is not a DriveLM annotation: {type(error).__name__} {error}") from error
    for name, paths in paths_by_frame:
        if "/" in name:
            raise ValueError(f"{ann_file} is invalid: the frame {name!r:.80} has a slash, and its name names a file")
        if missing := [camera for camera in CAMERAS if camera not in paths]:
            raise ValueError(f"frame {name} has no image of {', '.join(missing)}")
        relative = [str(paths[camera]).replace("../nuscenes/samples/", "nuscenes/samples/") for camera in CAMERAS]
        files = [resolve_below(data_root, path.lstrip("/")) for path in relative]
        yield name, dict(zip(CAMERAS, files, strict=True))


def _load_font(size: int):
    """Load DejaVu Sans Bold if installed, else Pillow's font."""
    try:
        return ImageFont.truetype("DejaVuSans-Bold.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


@exit_on_user_error
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-root",
        default="InternVL-Domain-Adaptation-Data/images/drivelm",
        help="images (default: %(default)s)",
    )
    parser.add_argument("--ann-file", default="path/to/v1_1_val_nus_q_only.json", help="DriveLM annotation")
    args = parser.parse_args(argv)

    output_dir = resolve_below(args.data_root, "stitch")
    frames = list(get_images(args.ann_file, args.data_root))
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, paths in frames:
        custom_image(paths).save(resolve_below(output_dir, f"{name}.jpg"))
    print(f"Images: {len(frames)}")
    print(f"Image folder: {output_dir}")
