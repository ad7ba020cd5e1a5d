"""Check the data of a run: unusable samples, lengths, epoch plan.

    python tools/check_data.py META --model_name_or_path DIR [flags of training]

With the flags of training the samples are the same as in training, and training reuses the measurements. Writes
`lengths.png`, `summary.txt` and `skipped_samples.jsonl` into --report. Exit status: 1 if a sample is unusable, else 0.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import numpy as np

from internvl.arguments.training import parse_args
from internvl.arguments.validate import validate_arguments
from internvl.command_line import exit_on_user_error
from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.internvl_chat.configuration_internvl_chat import count_image_tokens
from internvl.planning.epoch_plan import SAMPLE_LENGTHS, plan_epoch
from internvl.planning.plan_report import format_epoch_plan
from internvl.planning.sample_cost import count_forward_flops, scale_to_training
from internvl.train.build_data import TrainingData, build_plan_layout, measure_data
from internvl.train.build_model import build_tokenizer

NUM_HISTOGRAM_LINES = 12
NUM_EXTREMES = 5  # samples listed at each extreme
NUM_LISTED_SKIPPED = 10


@exit_on_user_error
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meta", metavar="META", help="JSON file that lists the datasets")
    parser.add_argument("--report", default="check_data", help="output folder (default: check_data)")
    parser.add_argument("--ranks", type=int, default=1, help="number of GPUs to plan for (default: 1)")
    args, flags = parser.parse_known_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    report_dir = Path(args.report)
    model_args, data_args, training_args = parse_args(
        ["--meta_path", args.meta, "--output_dir", str(report_dir), *flags]
    )
    validate_arguments(model_args, data_args, training_args)
    config = InternVLChatConfig.from_pretrained(model_args.model_name_or_path or "")
    config.force_image_size = data_args.force_image_size
    tokenizer = build_tokenizer(model_args, data_args)
    data = measure_data(data_args, training_args, tokenizer, count_image_tokens(config))

    report_dir.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(sample._asdict(), ensure_ascii=False) + "\n" for sample in data.skipped_samples]
    (report_dir / "skipped_samples.jsonl").write_text("".join(lines), encoding="utf-8")
    sections = [format_datasets(data), *format_extremes(data), *format_skipped(data)]
    if data.is_usable.any():
        # As with LoRA in vision encoder and LLM and gradient checkpointing: 3 passes are forward, recomputation and
        # gradients of inputs.
        sample_cost = scale_to_training(count_forward_flops(config), vision_passes=3, llm_passes=3)
        layout = build_plan_layout(data_args, training_args, args.ranks, sample_cost)
        plan = plan_epoch(data.lengths, layout, epoch=0, weights=data.weights)
        table = format_epoch_plan(data.lengths, plan, layout, len(data.skipped_samples))
        sections.append(f"Epoch plan:\n{table}")
        sections += [format_histogram(name, data.lengths[name][data.is_usable]) for name in SAMPLE_LENGTHS.names or ()]
        draw_histograms(data, report_dir / "lengths.png")
    text = "\n\n".join(sections)
    (report_dir / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(f"\nSaved in {report_dir}: " + ", ".join(sorted(file.name for file in report_dir.iterdir())))
    sys.exit(1 if data.skipped_samples else 0)


def format_datasets(data: TrainingData) -> str:
    """Format a table with one line per dataset."""
    lines = [
        f"{'dataset':24}{'samples':>10}{'skipped':>9}{'tokens':>14}{'loss tokens':>13}{'tiles':>10}{'text only':>11}"
    ]
    dataset_of_sample = np.searchsorted(data.dataset.ends, data.dataset.get_source_samples(), side="right")
    for number, dataset in enumerate(data.dataset.datasets):
        lengths = data.lengths[dataset_of_sample == number]
        is_usable = lengths["tokens"] > 0
        is_text_only = is_usable & (lengths["tiles"] == 0)
        num_skipped = sum(sample.dataset == dataset.ds_name for sample in data.skipped_samples)
        num_tokens = lengths["tokens"].sum()
        lines.append(
            f"{dataset.ds_name:24}{len(dataset):10,}{num_skipped:9,}{num_tokens:14,}"
            f"{lengths['loss_tokens'].sum() / max(1, num_tokens):13.1%}{lengths['tiles'].sum():10,}"
            f"{is_text_only.sum() / max(1, is_usable.sum()):11.1%}"
        )
    return "\n".join(lines)


def format_extremes(data: TrainingData) -> list[str]:
    """List the samples with most tokens, most tiles and fewest loss tokens."""
    usable = np.flatnonzero(data.is_usable)
    lengths = data.lengths[usable]
    loss_share = lengths["loss_tokens"] / np.maximum(lengths["tokens"], 1)
    sections = []
    for title, values, sort_key in (
        ("Most tokens", lengths["tokens"], -lengths["tokens"]),
        ("Most tiles", lengths["tiles"], -lengths["tiles"]),
        ("Smallest share of loss tokens", loss_share, loss_share),
    ):
        lines = [f"{title}:"]
        for i in np.argsort(sort_key, kind="stable")[:NUM_EXTREMES]:
            dataset, index = data.dataset.locate(int(usable[i]))
            lines.append(f"  {values[i]:10.4g}  {dataset.describe(index)}")
        sections.append("\n".join(lines))
    return sections


def format_skipped(data: TrainingData) -> list[str]:
    """List the first skipped samples; nothing if there is none."""
    if not data.skipped_samples:
        return []
    lines = [f"Skipped samples: {len(data.skipped_samples)}"]
    lines += [f"  {sample}" for sample in data.skipped_samples[:NUM_LISTED_SKIPPED]]
    if (num_more := len(data.skipped_samples) - NUM_LISTED_SKIPPED) > 0:
        lines.append(f"  ... and {num_more} more")
    return ["\n".join(lines)]


def format_histogram(name: str, values: np.ndarray) -> str:
    """Format a histogram of values of samples as text."""
    first = values.min()
    bin_width = -(-int(values.max() - first + 1) // NUM_HISTOGRAM_LINES)
    counts = np.bincount((values - first) // bin_width)
    title = f"{name.capitalize().replace('_', ' ')} per sample"
    lines = [f"{title}: mean {values.mean():.1f}, median {np.median(values):.0f}"]
    for number, count in enumerate(counts):
        low = first + number * bin_width
        bar = "#" * round(40 * count / counts.max())
        lines.append(f"  {low:8} - {low + bin_width - 1:<8}{count:10,}  {bar}".rstrip())
    return "\n".join(lines)


def draw_histograms(data: TrainingData, path: Path) -> None:
    """Draw a histogram of tokens, loss tokens and tiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    for axis, name in zip(axes, SAMPLE_LENGTHS.names or (), strict=True):
        axis.hist(data.lengths[name][data.is_usable], bins=60)
        axis.set(title=f"{name.replace('_', ' ')} per sample", ylabel="samples")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
