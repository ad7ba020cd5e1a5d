"""Runs for tools/report.py, and a strict parser of its pages."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

from internvl.evaluation.results import write_results

VOID_TAGS = {"meta", "br", "img", "input"}


class Page(HTMLParser):
    """A parsed page.

    Attributes:
        tags: (name, attributes) of each element.
        text: of all elements but the style sheet, with single spaces.
        errors: elements that are not closed, or closed in another order.
    """

    def __init__(self, file: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.errors: list[str] = []
        self.open: list[str] = []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        self.errors += [f"<{tag}> is not closed" for tag in self.open]
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        if len(names) > len(set(names)):
            self.errors.append(f"<{tag}> has an attribute twice")
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += f" {data}"

    def find(self, tag: str) -> list[dict]:
        """Return the attributes of the elements of a name."""
        return [attrs for name, attrs in self.tags if name == tag]

    def check(self) -> "Page":
        """Check that the page is well-formed and refers to nothing outside."""
        assert not self.errors, self.errors[:5]
        assert len(self.source) < 3_000_000
        for _, attrs in self.tags:
            assert attrs.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
            assert not attrs.keys() & {"href", "srcset", "action", "background", "data"}
            assert not any(name.startswith("on") for name in attrs)
        assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in self.tags}
        assert "url(" not in self.source and "@import" not in self.source
        return self


def make_step(step: int, **values: float) -> dict:
    """Make a log entry of a training step."""
    return {
        "step": step,
        "loss": 3 * math.exp(-step / 20),
        "grad_norm": 1.5,
        "learning_rate": 1e-4,
        "step_seconds": 2.0,
        "tokens_per_second": 1234.5,
        "data_wait_percent": 10.0,
        "forward_seconds": 0.5,
        "backward_seconds": 1.0,
        "optimizer_seconds": 0.1,
        "peak_memory_gib": 7.25,
        "mfu_percent": 41.5,
        "epoch": step / 50,
        **values,
    }


def make_prediction(line: int, prediction: str | None = "a cat", **values) -> dict:
    """Make a line of predictions.jsonl."""
    content = {"set": "pets", "line": line, "file": "/data/pets.jsonl", "images": [], "question": "What is it?"}
    content |= {"references": ["a cat"], "prediction": prediction, "metric": "exact_match"}
    return content | {"score": float(prediction == "a cat"), "loss": 0.5, "tokens": 3, "correct": 2} | values


def write_evaluation(run: Path, step: int, predictions: list[dict], **metrics: float) -> None:
    """Write an evaluation of a run: its folder, and its line of metrics.jsonl."""
    metrics = {f"eval/{name}": value for name, value in metrics.items()}
    entry = {"samples": len(predictions), "answered": len(predictions), "loss_tokens": 3, "metric": "exact_match"}
    sets = {"pets": {**entry, "scorer": None, "greater_is_better": True, "split": "eval"}}
    write_results(run / f"evaluation/step-{step}", predictions, {"step": step, "metrics": metrics, "sets": sets})
    append_lines(run / "metrics.jsonl", {"step": step, **metrics, "eval_seconds": 1.5})


def append_lines(file: Path, *entries: dict) -> None:
    """Append objects to a JSON Lines file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.writelines(json.dumps(entry) + "\n" for entry in entries)
