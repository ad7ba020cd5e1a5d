"""Measures data and tells what training would find in it.

    python tools/check_data.py META --model_name_or_path DIR [flags]

The flags are those of training, so that the samples are the same and what is measured is kept for it. Writes
`lengths.png`, `summary.txt` and `bad_samples.jsonl` into --report. Status 1 when a sample cannot be used, else 0.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import numpy as np

from internvl.arguments.training import parse_args
from internvl.arguments.validate import validate_arguments
from internvl.command_line import command
from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.internvl_chat.configuration_internvl_chat import count_image_tokens
from internvl.planning.epoch_plan import PlanLayout, plan_epoch
from internvl.planning.plan_report import format_plan
from internvl.planning.sample_cost import Passes, step_cost
from internvl.train.build_data import TrainingData, measure_data
from internvl.train.build_model import build_tokenizer

LORA_PASSES = Passes(vision=3, llm=3)  # adapters in both towers, activations computed again
BARS = 12  # lines of a histogram
SHOWN = 5  # samples of a list


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meta", metavar="META", help="JSON file that lists the data sets")
    parser.add_argument("--report", default="check_data", help="folder for what is written (default: check_data)")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs that the steps are planned for (default: 1)")
    args, flags = parser.parse_known_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    report = Path(args.report)
    model_args, data_args, training_args = parse_args(["--meta_path", args.meta, "--output_dir", str(report), *flags])
    validate_arguments(model_args, data_args, training_args)
    config = InternVLChatConfig.from_pretrained(model_args.model_name_or_path or "")
    config.force_image_size = data_args.force_image_size
    tokenizer = build_tokenizer(model_args, data_args)
    data = measure_data(data_args, training_args, tokenizer, count_image_tokens(config))

    report.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(bad._asdict(), ensure_ascii=False) for bad in data.bad_samples]
    (report / "bad_samples.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    sections = [data_sets(data), *offenders(data)]
    if data.usable.any():
        layout = PlanLayout(
            training_args.seed,
            args.ranks,
            training_args.per_device_train_batch_size,
            training_args.gradient_accumulation_steps,
            training_args.group_by_length and not data_args.use_packed_ds,
            data_args.use_packed_ds,
            data_args.max_packed_tokens,
            data_args.num_images_expected,
            step_cost(config, LORA_PASSES),
        )
        plan = plan_epoch(data.lengths, layout, 0, weights=data.weights)
        sections.append("an epoch\n" + format_plan(data.lengths, plan, layout, len(data.bad_samples)))
        sections += [histogram(name, values[data.usable]) for name, values in data.lengths._asdict().items()]
        draw(data, report / "lengths.png")
    text = "\n\n".join(sections)
    (report / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(f"\nwritten to {report}: " + ", ".join(sorted(file.name for file in report.iterdir())))
    sys.exit(1 if data.bad_samples else 0)


def data_sets(data: TrainingData) -> str:
    """A line a data set."""
    lines = [f"{'data set':24}{'samples':>10}{'bad':>8}{'tokens':>14}{'trained':>9}{'tiles':>10}{'no tile':>9}"]
    position = np.searchsorted(data.rows.ends, data.rows.origin(), side="right")
    for number, dataset in enumerate(data.rows.datasets):
        tokens, trained, tiles = (values[position == number] for values in data.lengths)
        usable, bad = tokens > 0, sum(bad.data_set == dataset.ds_name for bad in data.bad_samples)
        lines.append(
            f"{dataset.ds_name:24}{len(dataset):10,}{bad:8,}{tokens.sum():14,}"
            f"{trained.sum() / max(1, tokens.sum()):9.1%}{tiles.sum():10,}"
            f"{(usable & (tiles == 0)).sum() / max(1, usable.sum()):9.1%}"
        )
    return "\n".join(lines)


def offenders(data: TrainingData) -> list[str]:
    """The samples at the ends of each scale, and the bad ones."""
    usable = np.flatnonzero(data.usable)
    tokens, trained, tiles = (values[usable] for values in data.lengths)
    sections = []
    for name, values, worst in (
        ("most tokens", tokens, -tokens),
        ("most tiles", tiles, -tiles),
        ("smallest share trained", trained / np.maximum(tokens, 1), trained / np.maximum(tokens, 1)),
    ):
        lines = [name]
        for i in np.argsort(worst, kind="stable")[:SHOWN]:
            dataset, index = data.rows.locate(int(usable[i]))
            lines.append(f"  {values[i]:10.4g}  {dataset.describe(index)}")
        sections.append("\n".join(lines))
    if data.bad_samples:
        more = len(data.bad_samples) - 2 * SHOWN
        lines = [f"  {bad}" for bad in data.bad_samples[: 2 * SHOWN]] + ([f"  ... and {more} more"] if more > 0 else [])
        sections.append("\n".join([f"bad samples: {len(data.bad_samples)}", *lines]))
    return sections


def histogram(name: str, values: np.ndarray) -> str:
    width = -(-int(values.max() - values.min() + 1) // BARS)
    counts = np.bincount((values - values.min()) // width)
    lines = []
    for number, count in enumerate(counts):
        low = values.min() + number * width
        bar = "#" * round(40 * count / counts.max())
        lines.append(f"  {low:8} - {low + width - 1:<8}{count:10,}  {bar}".rstrip())
    return "\n".join([f"{name} of a sample: mean {values.mean():.1f}, median {np.median(values):.0f}", *lines])


def draw(data: TrainingData, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    for axis, (name, values) in zip(axes, data.lengths._asdict().items(), strict=True):
        axis.hist(values[data.usable], bins=60)
        axis.set(title=f"{name} of a sample", ylabel="samples")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
