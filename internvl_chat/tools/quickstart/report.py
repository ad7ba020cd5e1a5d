"""Report the quickstart's results: a table, results.json and report.html.

Reads what the stages have written to the quickstart's folder: `done/STAGE` (seconds), `answers_MODEL.json` and
`models/MODEL` (losses, adapters).
"""

import argparse
import json
import math
from pathlib import Path

from page import render_page

# (model, domain of the held-out digits, title)
ROWS = (
    ("base", "plain", "base"),
    ("base", "shifted", "base"),
    ("adapted", "shifted", "base + LoRA"),
    ("merged", "shifted", "merged"),
    ("vision_only", "shifted", "base + LoRA, vision encoder only"),
    ("llm_only", "shifted", "base + LoRA, LLM only"),
    ("adapted", "plain", "base + LoRA"),
)
COLUMNS = ("model", "digits", "accuracy", "95% interval", "time", "adapters")
NUM_EXAMPLES = 30


def compute_wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Compute Wilson's score interval of a proportion, 95% by default."""
    share, spread = correct / total, z * z / total
    center = (share + spread / 2) / (1 + spread)
    half_width = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, center - half_width), min(1.0, center + half_width)


def read_json(path: Path) -> dict:
    """Read a JSON file."""
    return json.loads(path.read_text())


def read_losses(model_dir: Path) -> list[tuple[int, float]]:
    """Read (step, loss) of a training run."""
    history = read_json(model_dir / "trainer_state.json")["log_history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def build_row(folder: Path, model: str, domain: str, title: str, answers: dict) -> dict:
    """Build one row of the table."""
    result = answers[f"{domain}_heldout"]
    adapters = folder.glob(f"models/{model}/*/adapter_model.safetensors")
    return {
        "model": model,
        "domain": domain,
        "title": title,
        "correct": result["correct"],
        "total": result["total"],
        "accuracy": result["correct"] / result["total"],
        "interval": list(compute_wilson_interval(result["correct"], result["total"])),
        "seconds": int((folder / "done" / model).read_text()),
        "adapter_bytes": sum(path.stat().st_size for path in adapters),
    }


def collect_results(folder: Path) -> dict:
    """Collect everything that is reported.

    Models without answers, which only --compare makes, are left out.
    """
    answers = {
        path.stem.removeprefix("answers_"): read_json(path)
        for path in folder.glob("answers_*.json")
        if (folder / "done" / path.stem.removeprefix("answers_")).exists()
    }
    before, after, merged = (answers[model]["shifted_heldout"] for model in ("base", "adapted", "merged"))
    examples = zip(before["images"], before["digits"], before["answers"], after["answers"], strict=True)
    fields = ("image", "digit", "before", "after")
    return {
        "rows": [build_row(folder, *row, answers[row[0]]) for row in ROWS if row[0] in answers],
        "num_merged_differences": sum(a != b for a, b in zip(after["answers"], merged["answers"], strict=True)),
        "losses": {model: read_losses(folder / "models" / model) for model in ("base", "adapted")},
        "examples": [dict(zip(fields, example, strict=True)) for example in examples][:NUM_EXAMPLES],
        "seconds": sum(int(path.read_text()) for path in (folder / "done").iterdir() if path.name != "version"),
    }


def format_row(row: dict) -> tuple[str, ...]:
    """Format a row's cells, in the order of COLUMNS."""
    low, high = row["interval"]
    return (
        row["title"],
        row["domain"],
        f"{row['accuracy']:.1%}",
        f"{low:.1%} - {high:.1%}",
        f"{row['seconds']} s",
        f"{row['adapter_bytes'] / 1e6:.2f} MB" if row["adapter_bytes"] else "",
    )


def format_table(lines: list[tuple[str, ...]]) -> str:
    """Align the columns of a table."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="OUTPUT_DIR of shell/quickstart.sh")
    folder = parser.parse_args().folder
    results = collect_results(folder)
    lines = [COLUMNS, *map(format_row, results["rows"])]
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    (folder / "report.html").write_text(render_page(results, lines, folder / "data"))
    total = results["rows"][0]["total"]
    print(f"\n{format_table(lines)}\n")
    print(f"Merged weights and adapters: {results['num_merged_differences']} of {total} answers differ")
    print(f"All stages: {results['seconds']} s")
    print(f"Report: {folder / 'report.html'}")


if __name__ == "__main__":
    main()
