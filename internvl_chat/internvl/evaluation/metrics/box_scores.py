"""Score of boxes: box_iou."""

import math
import re
import sys

import numpy as np

from internvl.constants import shorten

# On one line. A run of brackets is taken as a whole: a text of many brackets or commas costs linear time.
BOX = re.compile(r"(?<!\[)\[+(?!\[)([^,\n]*),([^,\n]*),([^,\n]*),([^]\n]*)\]")
MIN_IOU = 0.5
NO_BOX = (0.0, 0.0, 0.0, 0.0)


def measure_boxes(records: list[dict]) -> np.ndarray:
    """Measure boxes: whether the IoU is at least 0.5, and the IoU."""
    ious = [compute_record_iou(record) for record in records]
    return np.array([(iou >= MIN_IOU, iou) for iou in ious], np.float64)


def summarize_boxes(sums: np.ndarray, num_records: int) -> dict[str, np.ndarray]:
    """Compute the accuracy at an IoU of 0.5 and the mean IoU."""
    return {"accuracy": sums[..., 0] / num_records, "mean_iou": sums[..., 1] / num_records}


def compute_record_iou(record: dict) -> float:
    """Compute the IoU of the predicted box and the first reference.

    A prediction has four numbers in brackets: thousandths of the image if their sum is at least 4, else fractions. A
    reference is a box in pixels, or a text that is read like a prediction.
    """
    size = record["width"], record["height"]
    reference = record["references"][0]
    with np.errstate(all="ignore"):  # infinity, NaN
        box = scale_box(parse_box(record["prediction"]), size)
        is_text = isinstance(reference, str)
        expected = scale_box(parse_box(reference), size) if is_text else np.array(reference, np.float32)
        return compute_iou(box, expected)


def parse_box(text: str) -> tuple[float, ...] | None:
    """Return the first four numbers in brackets; None if there are none or one is not a number."""
    match = BOX.search(text)
    try:
        return tuple(map(float, match.groups())) if match else None
    except ValueError:
        return None


def scale_box(box: tuple[float, ...] | None, size: tuple[float, float]) -> np.ndarray:
    """Convert thousandths or fractions to pixels (4,), in float32 as InternVL does: an IoU of exactly 0.5 counts."""
    scaled = np.array(box or NO_BOX, np.float32)
    if scaled.sum() >= 4:
        scaled = scaled / np.float32(1000)
    return scaled * np.array([*size, *size], np.float32)


def compute_iou(box: np.ndarray, other: np.ndarray) -> float:
    """Compute the intersection over union of two boxes (4,); 0 where it is negative or not finite."""
    sides = np.maximum(0, np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2]))
    intersection = sides.prod()
    union = (box[2:] - box[:2]).prod() + (other[2:] - other[:2]).prod() - intersection
    iou = float(intersection / union)
    return iou if math.isfinite(iou) and iou > 0 else 0.0


def find_box_error(record: dict) -> str | None:
    """Return what is wrong with the size of the image or the reference."""
    for side in ("width", "height"):
        if not _is_number(record[side]) or record[side] <= 0:
            return f"{side} {shorten(record[side])} is invalid: expected the {side} of the image in pixels"
    reference = record["references"][0]
    if isinstance(reference, str):
        return None if parse_box(reference) else f"reference {shorten(reference)} has no box [x1, y1, x2, y2]"
    is_box = isinstance(reference, list) and len(reference) == 4 and all(map(_is_number, reference))
    return None if is_box else f"reference {shorten(reference)} is not a box [x1, y1, x2, y2]"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
