"""Print the quickstart's results as a table; write results.json.

Reads what the stages have written to the quickstart's folder: `done/STAGE` (seconds), `results/MODEL` (metrics and
predictions on held-out digits, by tools/evaluate.py) and `models/MODEL` (adapters).
"""

import argparse
import json
from pathlib import Path

from internvl.evaluation.results import read_metrics, read_predictions

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


def build_row(folder: Path, model: str, domain: str, title: str) -> dict:
    """Build one row of the table."""
    metrics = read_metrics(folder / "results" / model)["metrics"]
    key = f"eval/{domain}/exact_match"
    adapters = folder.glob(f"models/{model}/*/adapter_model.safetensors")
    return {
        "model": model,
        "domain": domain,
        "title": title,
        "accuracy": metrics[key],
        "interval": [metrics[f"{key}_low"], metrics[f"{key}_high"]],
        "loss": metrics[f"eval/{domain}/loss"],
        "seconds": int((folder / "done" / model).read_text()),
        "adapter_bytes": sum(path.stat().st_size for path in adapters),
    }


def collect_results(folder: Path) -> dict:
    """Collect everything that is reported.

    Models without results, which only --compare makes, are left out.
    """
    answers = {
        model: [prediction["prediction"] for prediction in read_predictions(folder / "results" / model)]
        for model in ("adapted", "merged")
    }
    return {
        "rows": [build_row(folder, *row) for row in ROWS if (folder / "done" / f"{row[0]}_answers").exists()],
        "num_answers": len(answers["merged"]),
        "num_merged_differences": sum(a != b for a, b in zip(answers["adapted"], answers["merged"], strict=True)),
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
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    print(f"\n{format_table([COLUMNS, *map(format_row, results['rows'])])}\n")
    differences, total = results["num_merged_differences"], results["num_answers"]
    print(f"Merged weights and adapters: {differences} of {total} answers differ")
    print(f"All stages: {results['seconds']} s")


if __name__ == "__main__":
    main()
