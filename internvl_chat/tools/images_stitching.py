"""Stitches the six camera views of each DriveLM key frame into one picture.

    python tools/images_stitching.py --data-root .../images/drivelm --ann-file v1_1_val_nus_q_only.json

Every view is resized to 896 x 448 and bears the camera's name; front views above, back views below, 2688 x 896 in all.
Written to DATA_ROOT/stitch/SCENE_FRAME.jpg.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from internvl.command_line import command
from internvl.data.images import load_image

CAMERAS = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
COLUMNS, WIDTH, HEIGHT = 3, 896, 448
MAGENTA = (255, 0, 255)


def custom_image(image_paths: dict[str, str | Path]) -> Image.Image:
    """The six views, camera name -> file, as one picture (2688 x 896)."""
    stitched = Image.new("RGB", (COLUMNS * WIDTH, -(-len(CAMERAS) // COLUMNS) * HEIGHT))
    for place, camera in enumerate(CAMERAS):
        view = load_image(str(image_paths[camera])).resize((WIDTH, HEIGHT))
        ImageDraw.Draw(view).text((0, 0), camera, fill=MAGENTA, font=_font(50))
        stitched.paste(view, (place % COLUMNS * WIDTH, place // COLUMNS * HEIGHT))
    return stitched


def get_images(ann_file: str | Path, data_root: str | Path) -> Iterator[tuple[str, dict[str, Path]]]:
    """(SCENE_FRAME, camera name -> file) for every key frame of the annotation.

    Raises:
        ValueError: the file is no DriveLM annotation, or a frame lacks a camera.
    """
    try:
        scenes = json.loads(Path(ann_file).read_text(encoding="utf-8"))
        frames = [(f"{s}_{f}", frame) for s, scene in scenes.items() for f, frame in scene["key_frames"].items()]
        named = [(name, frame["image_paths"]) for name, frame in frames]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{ann_file} is no DriveLM annotation: {type(error).__name__} {error}") from error
    for name, paths in named:
        if missing := [camera for camera in CAMERAS if camera not in paths]:
            raise ValueError(f"frame {name} has no picture of {', '.join(missing)}")
        relative = {camera: paths[camera].replace("../nuscenes/samples/", "nuscenes/samples/") for camera in CAMERAS}
        yield name, {camera: Path(data_root) / path.lstrip("/") for camera, path in relative.items()}


def _font(size: int):
    """DejaVu Sans Bold where the system has it, else Pillow's own."""
    try:
        return ImageFont.truetype("DejaVuSans-Bold.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default="InternVL-Domain-Adaptation-Data/images/drivelm")
    parser.add_argument("--ann-file", default="path/to/v1_1_val_nus_q_only.json")
    args = parser.parse_args(argv)

    folder = Path(args.data_root) / "stitch"
    frames = list(get_images(args.ann_file, args.data_root))
    folder.mkdir(parents=True, exist_ok=True)
    for name, paths in frames:
        custom_image(paths).save(folder / f"{name}.jpg")
    print(f"{len(frames)} pictures: {folder}")


if __name__ == "__main__":
    main()
