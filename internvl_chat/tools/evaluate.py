"""Evaluate a chat model on evaluation sets, and compare it with another one.

    internvl evaluate FOLDER META [--output DIR] [--compare OTHER]
    torchrun --nproc_per_node=8 -m internvl evaluate FOLDER META

FOLDER is a base checkpoint, the output or a checkpoint of a run, or a merged checkpoint. META lists datasets as in
training: those with another split than `train` are evaluated, or all if there are none. With --eval_share, META is the
--meta_path of the run, and its held-out records are evaluated, too. Samples, rows and answers are those of the run that
wrote FOLDER, so the numbers are the same as during training.

The output folder gets `predictions.jsonl` and `metrics.json`. OTHER is a checkpoint, or such a folder of an evaluation
on the same META. Then `comparison.json` and `changed.jsonl`, with the samples whose answers differ, are written too.
"""

if __name__ == "__main__":  # before the imports below, which take seconds: a signal may come at any time
    from internvl.runtime.process import prepare_rank

    prepare_rank()

import argparse
import logging
import os
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import string_to_bool

from internvl import progress
from internvl.arguments.data import DataTrainingArguments
from internvl.arguments.evaluation import EvaluationArguments
from internvl.arguments.flags import option
from internvl.arguments.number_ranges import validate_numbers
from internvl.checkpoint.trainer_state import parse_checkpoint_step
from internvl.command_line import log_to_console
from internvl.data.schema import is_trained, load_meta
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.dist_utils import count_cores_per_rank, gather_objects, get_rank, get_world_size, run_on_rank_0
from internvl.evaluation.checkpoint_settings import (
    build_data_arguments,
    find_chat_checkpoint,
    load_chat_model,
    read_run_flags,
    restore_run_precision,
)
from internvl.evaluation.comparison import (
    compare_results,
    format_comparison,
    require_equal_settings,
    write_comparison,
)
from internvl.evaluation.evaluation_data import EvaluationData, build_evaluation_data, make_skipped_report
from internvl.evaluation.evaluator import describe_settings, evaluate
from internvl.evaluation.results import (
    EVALUATION_DIR,
    EVALUATION_METRICS_FILE,
    PREDICTIONS_FILE,
    format_metrics,
    read_metrics,
    read_predictions,
)
from internvl.evaluation.settings import EvaluationSettings
from internvl.model.auxiliary_files import read_normalization
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.varlen_attention import use_varlen_attention
from internvl.planning.measured_data import hold_out, measure_datasets
from internvl.planning.sample_lengths import RankGroup
from internvl.runtime.shutdown import abort_all_ranks_on_error, exit_process_group, join_process_group
from internvl.tool_parser import ToolParser

OTHER_DIR = "other"  # in the output folder: the results of --compare


@dataclass
class EvaluationFlags(EvaluationArguments):
    """Flags of an evaluation."""

    per_device_eval_batch_size: int = option(8, "questions per batch, on each rank")
    dataloader_num_workers: int = option(0, "processes that load images, on each rank")
    seed: int = option(42, "seed of the run, which chooses the records of a repeat_time below 1")


# Flags whose default is the value of the run that wrote the checkpoint.
FLAGS_OF_RUN = ("eval_max_new_tokens", *EvaluationFlags.__annotations__)
DATA_FLAGS_OF_RUN = {"max_bad_samples": float, "allow_outside_root": string_to_bool}


def main(argv: list[str] | None = None) -> None:
    """Join the process group, evaluate and exit."""
    os.environ.pop("LAUNCHER", None)  # of training, which upstream's recipes export: a tool may run alone
    with abort_all_ranks_on_error():
        join_process_group(argv)
        set_up_logging()
        evaluate_folders(parse_args(argv))
    exit_process_group(0)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="chat checkpoint: a folder, or ORG/NAME on the hub")
    parser.add_argument("meta", metavar="META", help="JSON file that lists the datasets")
    parser.add_argument("--output", type=Path, help="folder of the results (default: FOLDER/evaluation/NAME of META)")
    parser.add_argument("--compare", metavar="OTHER", help="another checkpoint, or results of this tool")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: the run's)"
    )
    helps = {field.name: field.metadata["help"] for field in (*fields(EvaluationFlags), *fields(DataTrainingArguments))}
    parser.add_argument("--eval_share", type=float, default=0.0, help=helps["eval_share"])
    parser.add_argument("--eval_num_samples", type=int, help=helps["eval_num_samples"])
    for name, value_type in (dict.fromkeys(FLAGS_OF_RUN, int) | DATA_FLAGS_OF_RUN).items():
        parser.add_argument(f"--{name}", type=value_type, help=f"{helps[name].partition(';')[0]} (default: the run's)")
    return parser.parse_args(argv)


def set_up_logging() -> None:
    """Log warnings and progress on rank 0, and errors on all ranks."""
    log_to_console(logging.WARNING if get_rank() == 0 else logging.ERROR)
    logging.getLogger(progress.__name__).setLevel(logging.INFO if get_rank() == 0 else logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of libraries about one another


def evaluate_folders(args: argparse.Namespace) -> None:
    """Evaluate FOLDER, and compare it with OTHER. A collective.

    What is wrong with the inputs is reported before the first model is loaded.
    """
    load_meta(args.meta)
    folder = find_checkpoint(args.folder, args)
    flags = collect_flags(args, folder)
    other, other_results = None, args.compare and Path(args.compare)
    if args.compare and (other_results / PREDICTIONS_FILE).is_file():
        settings = describe_settings(flags.eval_max_new_tokens, flags.eval_num_samples)
        require_equal_settings(settings, read_metrics(other_results).get("settings"), other_results)
        run_on_rank_0(lambda: bool(read_predictions(other_results)))
    elif args.compare:
        other = find_checkpoint(args.compare, args)
    output = run_on_rank_0(lambda: make_output_dir(args))
    evaluate_folder(folder, args, flags, output)
    if other:
        other_results = output / OTHER_DIR
        evaluate_folder(other, args, flags, other_results)
    if other_results:
        run_on_rank_0(lambda: compare(output, other_results, names=(args.folder, args.compare)))


def find_checkpoint(path: str, args: argparse.Namespace) -> Path:
    """Return the folder of a checkpoint whose settings are valid. A collective."""
    run_on_rank_0(lambda: find_chat_checkpoint(path))
    folder = find_chat_checkpoint(path)
    collect_data_flags(args, folder)
    return folder


def collect_data_flags(args: argparse.Namespace, folder: Path) -> DataTrainingArguments:
    """Collect the data flags of the run, replaced by those that are given.

    Raises:
        ValueError: a value is not valid.
    """
    given = {name: getattr(args, name) for name in DATA_FLAGS_OF_RUN if getattr(args, name) is not None}
    data_args = replace(build_data_arguments(folder, args.meta), **given)
    validate_numbers(data_args)
    return data_args


def collect_flags(args: argparse.Namespace, folder: Path) -> EvaluationFlags:
    """Collect the flags that are given, then those of the run, then the defaults.

    Raises:
        ValueError: a value is not valid.
    """
    values = {name: value for name, value in read_run_flags(folder).items() if name in FLAGS_OF_RUN}
    values |= {name: getattr(args, name) for name in FLAGS_OF_RUN if getattr(args, name) is not None}
    flags = EvaluationFlags(eval_share=args.eval_share, eval_num_samples=args.eval_num_samples, **values)
    validate_numbers(flags)
    return flags


def make_output_dir(args: argparse.Namespace) -> Path:
    """Create the folder of the results.

    That of checkpoint-N is beside it: a file in a checkpoint would have no entry in its manifest.

    Raises:
        ValueError: it has results already, or cannot be written.
    """
    folder, name = Path(args.folder).resolve(), Path(args.meta).stem
    if args.output is None and not folder.is_dir():
        raise ValueError(f"--output is required: {args.folder} is on the hub.")
    if parse_checkpoint_step(folder) is not None:
        folder, name = folder.parent, f"{folder.name}-{name}"
    output = args.output or folder / EVALUATION_DIR / name
    if (output / EVALUATION_METRICS_FILE).exists() or (output / PREDICTIONS_FILE).exists():
        raise ValueError(f"{output} has the results of another evaluation: choose another folder by --output.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / PREDICTIONS_FILE).touch()
    except OSError as error:
        raise ValueError(
            f"{output} cannot be written ({error.strerror}): choose another folder by --output."
        ) from error
    (output / PREDICTIONS_FILE).unlink()
    return output


# -- one checkpoint ----------------------------------------------------------------------------------------------------


def evaluate_folder(folder: Path, args: argparse.Namespace, flags: EvaluationFlags, output: Path) -> None:
    """Evaluate a checkpoint, write the results and print them. A collective."""
    data_args = collect_data_flags(args, folder)
    model, tokenizer = load_chat_model(folder, args.dtype and getattr(torch, args.dtype))
    tokenizer.model_max_length = data_args.max_seq_length
    use_varlen_attention(model.language_model, data_args.use_packed_ds)  # as training
    data = open_data(args.meta, data_args, flags, model, tokenizer)
    settings = build_settings(folder, data_args, flags, data)
    if args.dtype is None:
        settings = replace(settings, autocast_fn=restore_run_precision(model, folder))
    evaluate(model, tokenizer, data, settings, output, model_name=str(folder))
    if get_rank() == 0:
        print(f"{folder}:\n{format_metrics(read_metrics(output))}\nResults: {output}", flush=True)


def open_data(
    meta_path: str,
    data_args: DataTrainingArguments,
    flags: EvaluationFlags,
    model: InternVLChatModel,
    tokenizer: PreTrainedTokenizerBase,
) -> EvaluationData:
    """Open the evaluation sets of META, and the held-out records of its training data."""
    meta = load_meta(meta_path)
    training = {name: entry for name, entry in meta.items() if is_trained(entry)}
    untrained_ids = getattr(model.config, "untrained_token_ids", None) or []
    untrained_tokens = dict(zip(untrained_ids, tokenizer.convert_ids_to_tokens(untrained_ids), strict=True))
    held_out = []
    if flags.eval_share:
        datasets = [
            LazySupervisedDataset(
                name, entry, tokenizer, model.num_image_token, data_args, flags.seed, untrained_tokens
            )
            for name, entry in training.items()
        ]
        rank_group = RankGroup(get_rank(), get_world_size(), gather_objects)
        _, held_out = hold_out(measure_datasets(datasets, count_cores_per_rank(), rank_group), flags.eval_share)
    elif len(training) == len(meta):  # no dataset says that it is for evaluation: all of them are
        data_args, flags = replace(data_args, meta_path=None), replace(flags, eval_meta_path=meta_path)
    data = build_evaluation_data(
        *(data_args, flags, tokenizer, model.num_image_token, held_out), untrained_tokens=untrained_tokens
    )
    assert data is not None  # META has a dataset
    return data


def build_settings(
    folder: Path, data_args: DataTrainingArguments, flags: EvaluationFlags, data: EvaluationData
) -> EvaluationSettings:
    """Build the settings that a run with these flags has."""
    return EvaluationSettings.from_flags(
        *(data_args, flags, flags.per_device_eval_batch_size, read_normalization(folder)),
        report_skipped_fn=make_skipped_report(data, data_args).add,
        num_workers=flags.dataloader_num_workers,
    )


# -- two checkpoints ---------------------------------------------------------------------------------------------------


def compare(output: Path, other: Path, names: tuple[str, str]) -> None:
    """Compare two folders of results; write and print the differences."""
    comparison = compare_results(output, other)
    write_comparison(output, comparison, names)
    print(format_comparison(comparison, names), flush=True)


if __name__ == "__main__":
    main()
