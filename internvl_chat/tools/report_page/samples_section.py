"""Evaluation samples with their images and their answers before and after training."""

import math
import random
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from internvl.data.schema import BASE_ANSWERS_SPLIT
from internvl.evaluation.results import PREDICTIONS_FILE, read_predictions
from internvl.tools.report_page.run_files import Run, parse_number
from internvl.tools.report_page.text import clean, fold, format_number
from internvl.tools.report_page.thumbnails import Thumbnails

NUM_SHOWN = 12  # samples of a tab
SEED = 0
MAX_REFERENCES, MAX_IMAGES = 4, 4


class Sample(NamedTuple):
    """An evaluation sample: its lines in the last and, if known, the first predictions."""

    after: dict[str, Any]
    before: dict[str, Any] | None
    greater_is_better: bool

    @property
    def badness(self) -> tuple[float, float]:
        """Sort key: samples with worse scores first, then those with larger losses."""
        score, loss = get_number(self.after, "score"), get_number(self.after, "loss")
        score = (score if self.greater_is_better else -score) if math.isfinite(score) else 0.0
        return score, -loss if math.isfinite(loss) else 0.0

    @property
    def gain(self) -> float:
        """Improvement of the score; of the loss, if answers have no score."""
        if self.before is None:
            return 0.0
        key = "score" if math.isfinite(get_number(self.after, "score")) else "loss"
        difference = get_number(self.after, key) - get_number(self.before, key)
        difference = difference if math.isfinite(difference) else 0.0
        return difference if key == "score" and self.greater_is_better else -difference

    @property
    def is_changed(self) -> bool:
        """Whether the answer changed; without answers, whether the loss did."""
        if self.before is None:
            return False
        answers = self.after["prediction"], self.before["prediction"]
        return answers[0] != answers[1] if None not in answers else self.gain != 0


def get_number(prediction: dict[str, Any], key: str) -> float:
    """Return a number of a prediction; NaN if it has none."""
    return parse_number(prediction[key])


def load_samples(run: Run, base: Path | None) -> tuple[list[Sample], str]:
    """Read the predictions of the last evaluation, and those of the first one or of `base`.

    Returns:
        Samples, and a sentence on what they compare. Without readable predictions both are empty.
    """
    folders = dict(run.prediction_dirs)
    after, last_step = {}, 0
    while folders and not after:
        last_step, folder = folders.popitem()
        after = read_by_line(run, folder)
    if not after:
        return [], ""
    before, description = {}, f"Answers of step {last_step:,}."
    if base is not None:
        before, description = read_by_line(run, base), f"Before: {base}. After: step {last_step:,}."
    elif folders:
        first_step = min(folders)
        before = read_by_line(run, folders[first_step])
        description = f"Before: step {first_step:,}. After: step {last_step:,}."
    directions = {name: entry.get("greater_is_better", True) is not False for name, entry in run.sets.items()}
    samples = [Sample(after[key], before.get(key), directions.get(key[0], True)) for key in choose_keys(run, after)]
    return samples, description


def choose_keys(run: Run, predictions: Mapping[tuple[str, int], dict]) -> list[tuple[str, int]]:
    """Choose the samples to show: those with scores, of a set that has any.

    Answers of the base model are shown only if there is no other set.
    """
    base_sets = {name for name, entry in run.sets.items() if entry.get("split") == BASE_ANSWERS_SPLIT}
    scored = {key for key, line in predictions.items() if line["score"] is not None}
    sets_with_scores = {name for name, _ in scored}
    keys = [key for key in predictions if key in scored or key[0] not in sets_with_scores]
    return [key for key in keys if key[0] not in base_sets] or keys


def read_by_line(run: Run, folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Read predictions by (set, line); empty if they are damaged."""
    try:
        return {(line["set"], line["line"]): line for line in read_predictions(folder)}
    except (OSError, ValueError) as error:
        run.add_problem(folder / PREDICTIONS_FILE, error)
        return {}


# -- choosing ----------------------------------------------------------------------------------------------------------


def take_by_set(samples: Iterable[Sample], number: int = NUM_SHOWN) -> list[Sample]:
    """Take the first samples, about as many of each evaluation set."""
    queues: dict[str, list[Sample]] = {}
    for sample in samples:
        queues.setdefault(sample.after["set"], []).append(sample)
    rounds = (queue[index] for index in range(number) for queue in queues.values() if index < len(queue))
    taken = [sample for _, sample in zip(range(number), rounds, strict=False)]
    order = {name: position for position, name in enumerate(queues)}
    return sorted(taken, key=lambda sample: order[sample.after["set"]])


def choose_worst(samples: list[Sample]) -> list[Sample]:
    return take_by_set(sorted(samples, key=lambda sample: sample.badness))


def choose_changed(samples: list[Sample]) -> list[Sample]:
    """Choose changed answers, in turn the most worsened and the most improved ones."""
    changed = sorted((sample for sample in samples if sample.is_changed), key=lambda sample: sample.gain)
    in_turn = chain.from_iterable(zip(changed, reversed(changed), strict=True))  # each sample twice
    return take_by_set(islice(in_turn, len(changed)))


def choose_random(samples: list[Sample]) -> list[Sample]:
    return take_by_set(random.Random(SEED).sample(samples, len(samples)))


# Tab -> what it shows, and how its samples are chosen.
TABS: dict[str, tuple[str, Callable[[list[Sample]], list[Sample]]]] = {
    "worst": ("The samples with the lowest scores, or the largest losses if answers have no score.", choose_worst),
    "changed": ("Answers that changed: in turn the most worsened and the most improved ones.", choose_changed),
    "random": ("A random choice, the same in each report.", choose_random),
}


# -- rendering ---------------------------------------------------------------------------------------------------------


def render_samples(run: Run, base: Path | None) -> str:
    """Render the section; empty without predictions."""
    samples, description = load_samples(run, base)
    if not samples:
        return ""
    thumbnails = Thumbnails()
    buttons, panels = "", ""
    for number, (name, (text, choose_fn)) in enumerate(TABS.items()):
        chosen = choose_fn(samples)
        checked = " checked" if number == 0 else ""
        buttons += f'<input type="radio" name="tab" id="tab-{name}"{checked}><label for="tab-{name}">{name}</label>'
        cards = "".join(render_card(sample, thumbnails) for sample in chosen) or "<p>None.</p>"
        panels += (
            f'<div class="panel" id="panel-{name}"><p class="soft">{text}</p><div class="cards">{cards}</div></div>'
        )
    description = f"{clean(description)} {len(samples):,} samples. {summarize_changes(samples)}"
    return f'<h2>Samples</h2><p class="soft">{description}</p><div class="tabs">{buttons}{panels}</div>'


def summarize_changes(samples: list[Sample]) -> str:
    """Count improved and worsened samples."""
    paired = [sample for sample in samples if sample.before is not None]
    if not paired:
        return ""
    improved, worsened = sum(sample.gain > 0 for sample in paired), sum(sample.gain < 0 for sample in paired)
    return f"{improved:,} improved, {worsened:,} worsened."


def render_card(sample: Sample, thumbnails: Thumbnails) -> str:
    """Render a sample."""
    line = sample.after
    question = re.sub(r"^(<image>\s*)+", "", line["question"])
    rows = [("question", "", fold(question))]
    references = line["references"]
    texts = [fold(reference) for reference in references[:MAX_REFERENCES]]
    if len(references) > MAX_REFERENCES:
        texts.append(f'<span class="soft">and {len(references) - MAX_REFERENCES} more</span>')
    rows.append(("reference", "", " <span class=soft>|</span> ".join(texts)))
    for name, prediction in (("before", sample.before), ("after", line)):
        if prediction is not None and prediction["prediction"] is not None:
            rows.append((name, rate(sample, prediction), fold(prediction["prediction"])))
    items = "".join(f'<dt>{name}</dt><dd class="{css}">{text}</dd>' for name, css, text in rows if text)
    if turns := line.get("history"):
        pairs = [pair if isinstance(pair, list) else [pair] for pair in turns[:20]]
        earlier = "".join(f"<li>{clean(' / '.join(map(str, pair)))}</li>" for pair in pairs)
        title = f"<summary>{len(turns)} earlier questions and answers</summary>"
        items = f"<dt></dt><dd><details>{title}<ol>{earlier}</ol></details></dd>{items}"
    values = [describe_value(sample, key) for key in ("score", "loss")]
    source = f"{clean(line['set'], 80)}, line {line['line']}"
    head = f'<span class="source" title="{clean(line["file"], 300)}">{source}</span>' + " · ".join(filter(None, values))
    return (
        f'<article class="card">{render_media(line, thumbnails)}'
        f'<div class="text"><p class="soft">{head}</p><dl>{items}</dl></div></article>'
    )


def rate(sample: Sample, prediction: dict[str, Any]) -> str:
    """Return the CSS class of an answer by its score, if it is a share."""
    score = get_number(prediction, "score")
    if not 0 <= score <= 1:
        return "answer"
    score = score if sample.greater_is_better else 1 - score
    return "answer good" if score >= 0.75 else "answer bad" if score < 0.25 else "answer fair"


def describe_value(sample: Sample, key: str) -> str:
    """Describe score or loss: `score 0 → 1`."""
    after = get_number(sample.after, key)
    if math.isnan(after):
        return ""
    before = math.nan if sample.before is None else get_number(sample.before, key)
    return f"{key} {'' if math.isnan(before) else format_number(before) + ' → '}{format_number(after)}"


def render_media(line: dict[str, Any], thumbnails: Thumbnails) -> str:
    """Render the images of a sample, or the first frame of its video."""
    if "video" in line:
        return f'<div class="media">{thumbnails.render_video(line["video"])}</div>'
    paths = [path for path in line.get("images", []) if isinstance(path, str)]
    if not paths:
        return ""
    css_class = "media several" if len(paths) > 1 else "media"
    more = f'<p class="soft">and {len(paths) - MAX_IMAGES} more images</p>' if len(paths) > MAX_IMAGES else ""
    shown = "".join(thumbnails.render_image(path, is_single=len(paths) == 1) for path in paths[:MAX_IMAGES])
    return f'<div class="{css_class}">{shown}{more}</div>'
