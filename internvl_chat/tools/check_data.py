"""Check the data of a run: unusable samples, lengths, epoch plan.

    internvl check-data META --model_name_or_path DIR [flags of training]

With the flags of training the samples are the same as in training, and training reuses the measurements. Of images only
the headers are read; --decode loads every sample as training does, with --dataloader_num_workers processes. With
evaluation sets, their plan is estimated for H100 GPUs, and records that are also trained are counted. Writes
`lengths.png`, `summary.txt` and `skipped_samples.jsonl` into --report. Exit status: 1 if a sample is unusable, else 0.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from internvl.arguments.data import DataTrainingArguments
from internvl.arguments.model import ModelArguments
from internvl.arguments.preference import PREFERENCE_ARGUMENTS
from internvl.arguments.training import FINETUNE_ARGUMENTS, TrainingArguments, parse_args
from internvl.arguments.validate import validate_arguments, validate_preference_arguments
from internvl.command_line import exit_on_user_error, log_to_console
from internvl.constants import SPECIAL_TOKENS
from internvl.data.images import NORMALIZATION_STATS
from internvl.data.preference_dataset import PreferenceDataset
from internvl.data.skipped_samples import SkippedSample, count_max_skipped_samples, describe_skipped
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.evaluation.evaluation_cost import (
    H100_SPEED,
    count_evaluations,
    describe_model_cost,
    estimate_evaluation,
    estimate_step_seconds,
    format_evaluation_plan,
)
from internvl.evaluation.evaluation_data import EvaluationData, build_evaluation_data
from internvl.evaluation.settings import EvaluationSettings
from internvl.evaluation.shared_records import find_shared_records
from internvl.model.internvl_chat import InternVisionConfig, InternVLChatConfig
from internvl.model.internvl_chat.configuration_internvl_chat import count_image_tokens
from internvl.model.new_tokens import find_new_tokens
from internvl.model.safetensors_io import abbreviate_names
from internvl.planning.epoch_plan import SAMPLE_LENGTHS, EpochPlan, PlanLayout, plan_epoch
from internvl.planning.plan_report import format_epoch_plan, summarize_truncation
from internvl.planning.sample_cost import (
    build_model_without_weights,
    compute_forward_cost,
    count_forward_flops,
    scale_to_training,
)
from internvl.planning.sample_inspection import Inspection, inspect_samples
from internvl.tool_parser import ToolParser
from internvl.train.build_data import TrainingData, build_plan_layout, measure_data
from internvl.train.build_model import build_tokenizer, chat_config_fields, load_config
from internvl.train.trainable_parameters import find_untrained_tokens
from internvl.versions import require_package

NUM_HISTOGRAM_LINES = 12
NUM_EXTREMES = 5  # samples listed at each extreme
NUM_LISTED_SKIPPED = 10
MAX_RANKS = 65_536
# Of each program: its dataclasses of flags, their validation, its dataset.
FINETUNE_PARTS = FINETUNE_ARGUMENTS, validate_arguments, LazySupervisedDataset
PREFERENCE_PARTS = PREFERENCE_ARGUMENTS, validate_preference_arguments, PreferenceDataset
Data = TypeVar("Data", TrainingData, EvaluationData)
MAX_DECODED_EPOCHS = 10  # each reads other frames of a video


@exit_on_user_error
def main(argv=None):
    args, flags = parse_tool_args(argv)
    require_package("matplotlib", "the report's histogram")
    log_to_console()
    classes, validate_fn, dataset_class = PREFERENCE_PARTS if args.preference else FINETUNE_PARTS
    argv = [*flags, "--meta_path", args.meta, "--output_dir", args.report]  # the last value of a flag counts
    model_args, data_args, training_args = parse_args(argv, classes)
    validate_fn(model_args, data_args, training_args)
    config = load_chat_config(model_args, data_args)
    config.force_image_size = data_args.force_image_size
    tokenizer = build_tokenizer(model_args, data_args)
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)  # as training adds them with the model
    untrained_tokens = find_untrained_tokens(model_args, tokenizer)
    num_image_token = count_image_tokens(config)
    data = measure_data(data_args, training_args, tokenizer, num_image_token, dataset_class, untrained_tokens)
    evaluation = build_evaluation_data(
        *(data_args, training_args, tokenizer, num_image_token, data.held_out, dataset_class, untrained_tokens),
        is_checked=False,
    )

    # As with LoRA in vision encoder and LLM and gradient checkpointing: 3 passes are forward, recomputation and
    # gradients of inputs.
    sample_cost = scale_to_training(count_forward_flops(config), vision_passes=3, llm_passes=3)
    layout = build_plan_layout(data_args, training_args, args.ranks, sample_cost)
    plan = plan_epoch(data.lengths, layout, epoch=0, weights=data.weights) if data.is_usable.any() else None
    num_epochs = count_decoded_epochs(training_args, len(plan)) if args.decode and plan else 0
    samples = data.list_trained_samples()
    inspection = inspect_samples(data.dataset, samples, num_epochs, training_args.dataloader_num_workers)
    data = exclude_samples(data, inspection.unusable)
    if evaluation and args.decode:
        evaluated = np.flatnonzero(evaluation.lengths["tokens"]).tolist()
        unusable = inspect_samples(evaluation.dataset, evaluated, 1, training_args.dataloader_num_workers).unusable
        evaluation = exclude_samples(evaluation, unusable)

    sections = [format_datasets(data), *format_new_tokens(config, tokenizer, untrained_tokens), *format_extremes(data)]
    sections += [format_decoding(len(samples), inspection, num_epochs)]
    sections += [*format_skipped(data, count_max_skipped_samples(data_args, len(data.lengths)))]
    sections += [*format_warnings(data, inspection)]
    if plan and data.is_usable.any():
        # The plan is that of training, which knows only what was measured: a row is shorter without damaged samples.
        table = format_epoch_plan(data.lengths, plan, layout, len(data.skipped_samples), data.lost_loss_tokens)
        sections.append(f"Epoch plan:\n{table}")
        sections += [format_histogram(name, data.lengths[name][data.is_usable]) for name in SAMPLE_LENGTHS.names or ()]
        if evaluation:
            sections += [format_evaluation(evaluation, plan, data, layout, config, data_args, training_args)]
    skipped_samples = [*data.skipped_samples, *(evaluation.skipped_samples if evaluation else ())]
    write_report(Path(args.report), "\n\n".join(sections), data, skipped_samples)
    sys.exit(1 if skipped_samples else 0)


def parse_tool_args(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the flags of this tool; return the flags of training as they are."""
    parser = ToolParser(__doc__)
    parser.add_argument("meta", metavar="META", help="JSON file that lists the datasets")
    parser.add_argument("--report", default="check_data", help="output folder (default: check_data)")
    parser.add_argument("--ranks", type=int, default=1, help="number of GPUs to plan for (default: 1)")
    parser.add_argument("--decode", action="store_true", help="also decode all images and the video frames of training")
    parser.add_argument("--preference", action="store_true", help="the records are preference pairs")
    args, flags = parser.parse_known_args(argv)
    if not 1 <= args.ranks <= MAX_RANKS:
        raise ValueError(f"--ranks {args.ranks} is invalid: expected an integer from 1 to {MAX_RANKS:,}.")
    return args, flags


def load_chat_config(model_args: ModelArguments, data_args: DataTrainingArguments) -> InternVLChatConfig:
    """Load the configuration of a chat checkpoint, or of a model that is composed of its parts."""
    if model_args.model_name_or_path:
        return load_config(model_args, data_args)
    assert model_args.vision_path and model_args.llm_path  # validated
    vision_config = InternVisionConfig.from_pretrained(model_args.vision_path)
    llm_fields, _ = PretrainedConfig.get_config_dict(model_args.llm_path)
    fields = chat_config_fields(model_args, data_args) | {"downsample_ratio": data_args.down_sample_ratio}
    return InternVLChatConfig(vision_config.to_dict(), llm_fields, **fields)


def count_decoded_epochs(args: TrainingArguments, steps_per_epoch: int) -> int:
    """Return the number of epochs of the training, at most MAX_DECODED_EPOCHS."""
    num_epochs = args.max_steps / steps_per_epoch if args.max_steps > 0 else args.num_train_epochs
    return min(max(1, math.ceil(num_epochs)), MAX_DECODED_EPOCHS)


def exclude_samples(data: Data, unusable: Mapping[int, str]) -> Data:
    """Return the data with further skipped samples, and lengths of 0 for them and their pieces.

    Args:
        unusable: sample -> reason.
    """
    is_excluded = np.isin(data.dataset.get_source_samples(), [*unusable])
    skipped = [describe_skipped(*data.dataset.locate(sample), reason) for sample, reason in unusable.items()]
    lengths = data.lengths.copy()
    lengths[is_excluded] = 0
    return data._replace(
        lengths=lengths,
        lost_loss_tokens=np.where(is_excluded, 0, data.lost_loss_tokens),
        skipped_samples=[*data.skipped_samples, *skipped],
    )


def write_report(report_dir: Path, summary: str, data: TrainingData, skipped_samples: Sequence[SkippedSample]) -> None:
    """Print the summary, and write it with the skipped samples and histograms."""
    report_dir.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(sample._asdict(), ensure_ascii=False) + "\n" for sample in skipped_samples]
    # Names of files that are not UTF-8 have lone surrogates; escaped by \\udcXX, the line is still JSON.
    texts = {"skipped_samples.jsonl": "".join(lines), "summary.txt": summary + "\n"}
    for name, text in texts.items():
        (report_dir / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    if data.is_usable.any():
        draw_histograms(data, report_dir / "lengths.png")
    print(summary)
    print(f"\nSaved in {report_dir}: " + ", ".join(sorted(file.name for file in report_dir.iterdir())))


def format_datasets(data: TrainingData) -> str:
    """Format a table with one line per dataset."""
    lines = [
        f"{'dataset':24}{'samples':>10}{'skipped':>9}{'tokens':>14}{'loss tokens':>13}{'tiles':>10}{'text only':>11}"
    ]
    dataset_of_sample = np.searchsorted(data.dataset.ends, data.dataset.get_source_samples(), side="right")
    is_usable = data.is_usable
    columns = {name: data.lengths[name] for name in SAMPLE_LENGTHS.names or ()}
    columns |= {"usable": is_usable, "text only": is_usable & (data.lengths["tiles"] == 0)}
    # name -> sum of each dataset
    sums = {name: np.bincount(dataset_of_sample, values).astype(int) for name, values in columns.items()}
    num_skipped = Counter(sample.dataset for sample in data.skipped_samples)
    for number, dataset in enumerate(data.dataset.datasets):
        num_tokens, num_loss_tokens, num_tiles, num_usable, num_text_only = (sums[name][number] for name in sums)
        lines.append(
            f"{dataset.ds_name:24}{len(dataset):10,}{num_skipped[dataset.ds_name]:9,}{num_tokens:14,}"
            f"{num_loss_tokens / max(1, num_tokens):13.1%}{num_tiles:10,}{num_text_only / max(1, num_usable):11.1%}"
        )
    return "\n".join(lines)


def format_extremes(data: TrainingData) -> list[str]:
    """List the samples at the extremes, and those that lose most loss tokens."""
    usable = np.flatnonzero(data.is_usable)
    lengths = data.lengths[usable]
    loss_share = lengths["loss_tokens"] / np.maximum(lengths["tokens"], 1)
    tables = [
        ("Most tokens", usable, lengths["tokens"], -lengths["tokens"]),
        ("Most tiles", usable, lengths["tiles"], -lengths["tiles"]),
        ("Smallest share of loss tokens", usable, loss_share, loss_share),
    ]
    if len(truncated := np.flatnonzero(data.lost_loss_tokens)):
        summary = summarize_truncation(data.lengths, data.lost_loss_tokens)
        lost = data.lost_loss_tokens[truncated]
        tables.append((f"Truncated answers: {summary}. Most lost loss tokens", truncated, lost, -lost))
    sections = []
    for title, samples, values, sort_key in tables:
        lines = [f"{title}:"]
        for i in np.argsort(sort_key, kind="stable")[:NUM_EXTREMES]:
            dataset, index = data.dataset.locate(int(samples[i]))
            lines.append(f"  {values[i]:10.4g}  {dataset.describe(index)}")
        sections.append("\n".join(lines))
    return sections


def format_decoding(num_samples: int, inspection: Inspection, num_epochs: int) -> str:
    """Say what was decoded."""
    if not num_epochs:
        return "Images and videos: only headers were read. --decode also finds damage of pixels and frames."
    epochs = "1 epoch" if num_epochs == 1 else f"{num_epochs} epochs"
    return (
        f"Images and videos: {num_samples:,} samples decoded, with the video frames of {epochs}; "
        f"{len(inspection.unusable):,} of them unusable."
    )


def format_warnings(data: TrainingData, inspection: Inspection) -> list[str]:
    """Count what is suspicious in usable samples, each with its first sample."""
    lines = []
    for name, samples in inspection.warnings.items():
        dataset, index = data.dataset.locate(samples[0])
        lines.append(f"  {len(samples):10,}  {name}, first {dataset.describe(index)}")
    return ["\n".join(["Suspicious samples (used as they are):", *lines])] if lines else []


def format_new_tokens(
    config: InternVLChatConfig, tokenizer: PreTrainedTokenizerBase, untrained_tokens: Mapping[int, str]
) -> list[str]:
    """Name the tokens without a trained row; nothing if there is none."""
    untrained_ids = getattr(config, "untrained_token_ids", None)
    tokens = [*find_new_tokens(tokenizer, config.llm_config.vocab_size, untrained_ids).values()]
    if not tokens:
        return []
    effect = "and train them; with a frozen LLM or LoRA only --train_new_tokens True does"
    if untrained_tokens:
        effect = "and do not train them: answers that use them are unusable, see --train_new_tokens"
    return [f"New tokens of the tokenizer: {abbreviate_names(tokens)}. These flags add rows for them, {effect}."]


def format_evaluation(
    evaluation: EvaluationData,
    plan: EpochPlan,
    data: TrainingData,
    layout: PlanLayout,
    config: InternVLChatConfig,
    data_args: DataTrainingArguments,
    args: TrainingArguments,
) -> str:
    """Format the unusable samples of the evaluation sets, records that are also trained, and the plan."""
    shared = find_shared_records(evaluation, data.dataset, data.content_hashes, data.list_trained_samples())
    max_skipped = count_max_skipped_samples(data_args, len(evaluation.lengths))
    warnings = format_skipped(evaluation, max_skipped, "Skipped evaluation samples:")
    warnings += [f"Evaluation data in the training data: {records}." for records in shared]
    if not evaluation.lengths["tokens"].any():
        return "\n\n".join(warnings)
    model = build_model_without_weights(config)
    bytes_per_weight = 2 if args.bf16 or args.fp16 else 4
    cost = describe_model_cost(model, layout.sample_cost, compute_forward_cost(model), bytes_per_weight)
    normalization = NORMALIZATION_STATS[data_args.normalize_type]
    settings = EvaluationSettings.from_flags(data_args, args, args.per_device_eval_batch_size, normalization)
    estimate = estimate_evaluation(evaluation, settings, layout.world_size, cost, H100_SPEED)
    num_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(plan))
    step_seconds = estimate_step_seconds(plan, data.lengths, cost, H100_SPEED)
    num_evaluations = count_evaluations(args, num_steps, len(plan))
    table = format_evaluation_plan(evaluation, estimate, num_evaluations, num_steps, step_seconds, "H100 GPUs")
    return "\n\n".join([*warnings, f"Evaluation plan:\n{table}"])


def format_skipped(data: TrainingData | EvaluationData, max_skipped: int, title: str = "Skipped samples:") -> list[str]:
    """List the first skipped samples; nothing if there is none."""
    if not data.skipped_samples:
        return []
    lines = [f"{title} {len(data.skipped_samples)}"]
    if len(data.skipped_samples) > max_skipped:
        lines = [f"{lines[0]}; --max_bad_samples allows {max_skipped}, so training would end"]
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
    pyplot.close(figure)


if __name__ == "__main__":
    main()
