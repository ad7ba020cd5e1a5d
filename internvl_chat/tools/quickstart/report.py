"""What came out of the quickstart: a table on the terminal, results.json, and report.html, which stands alone.

Last stage of shell/quickstart.sh. Reads what the stages left in its FOLDER: `done/STAGE` (seconds),
`answers_MODEL.json` and `models/MODEL` (loss curve, adapters).
"""

import argparse
import json
import math
from pathlib import Path

from page import page

# (model, looks to report, what it is)
MODELS = (
    ("base", "plain", "base"),
    ("base", "shifted", "base"),
    ("adapted", "shifted", "+ both adapters"),
    ("merged", "shifted", "merged"),
    ("vision_alone", "shifted", "+ vision adapters alone"),
    ("language_alone", "shifted", "+ language adapters alone"),
    ("adapted", "plain", "+ both adapters"),
)
PICTURES = 30
COLUMNS = ("model", "digits", "read", "95 % interval", "stage", "adapters")


def wilson(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share; never outside [0, 1], not empty at 0 or 1."""
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def loss_curve(model: Path) -> list[tuple[int, float]]:
    history = read(model / "trainer_state.json")["log_history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def row(folder: Path, model: str, look: str, title: str, answers: dict) -> dict:
    """One line of the table."""
    found = answers[f"{look}_heldout"]
    low, high = wilson(found["correct"], found["total"])
    adapters = folder.glob(f"models/{model}/*/adapter_model.safetensors")
    return {
        "model": model,
        "look": look,
        "title": title,
        "correct": found["correct"],
        "total": found["total"],
        "accuracy": found["correct"] / found["total"],
        "interval": [low, high],
        "seconds": int((folder / "done" / model).read_text()),
        "adapter_bytes": sum(path.stat().st_size for path in adapters),
    }


def collect(folder: Path) -> dict:
    """Everything that is reported. Models without answers (made by --compare only) are left out."""
    answers = {
        path.stem.removeprefix("answers_"): read(path)
        for path in folder.glob("answers_*.json")
        if (folder / "done" / path.stem.removeprefix("answers_")).exists()
    }
    before, after, merged = (answers[model]["shifted_heldout"] for model in ("base", "adapted", "merged"))
    shown = zip(before["images"], before["digits"], before["answers"], after["answers"], strict=True)
    return {
        "rows": [row(folder, model, look, title, answers[model]) for model, look, title in MODELS if model in answers],
        "merged_differs": sum(a != b for a, b in zip(after["answers"], merged["answers"], strict=True)),
        "losses": {model: loss_curve(folder / "models" / model) for model in ("base", "adapted")},
        "pictures": [dict(zip(("image", "digit", "before", "after"), four, strict=True)) for four in shown][:PICTURES],
        "seconds": sum(int(path.read_text()) for path in (folder / "done").iterdir() if path.name != "version"),
    }


def cells(row: dict) -> tuple[str, ...]:
    low, high = row["interval"]
    return (
        row["title"],
        row["look"],
        f"{row['accuracy']:.1%}",
        f"{low:.1%} - {high:.1%}",
        f"{row['seconds']} s",
        f"{row['adapter_bytes'] / 1e6:.2f} MB" if row["adapter_bytes"] else "",
    )


def table(results: dict) -> str:
    """The rows as text, columns aligned."""
    lines = [COLUMNS, *map(cells, results["rows"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="OUTPUT_DIR of shell/quickstart.sh")
    folder = parser.parse_args().folder
    results = collect(folder)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    (folder / "report.html").write_text(page(results, [COLUMNS, *map(cells, results["rows"])], folder / "data"))
    held_out = results["rows"][0]["total"]
    print(f"\n{table(results)}\n")
    print(f"Answers that differ between adapters and merged weights: {results['merged_differs']} of {held_out}")
    print(f"All stages together: {results['seconds']} s\nReport: {folder / 'report.html'}")


if __name__ == "__main__":
    main()
