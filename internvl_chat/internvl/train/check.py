"""What can be seen to be wrong before anything is loaded: first station after the command line.

`arguments.py` has looked at each flag by itself; here flags meet one another and the output folder.
"""

import logging
import os
import tempfile
from pathlib import Path

from internvl.conversation import conv_templates
from internvl.dist_utils import from_first_rank
from internvl.train.arguments import DataTrainingArguments, ModelArguments, TrainingArguments
from internvl.train.intact import STATE, faults, found_first, newest_whole

logger = logging.getLogger(__name__)
AUTO = "auto"  # --resume_from_checkpoint: what happens without the flag
SOCKET = "/pymp-12345678/listener-12345678"  # in TMPDIR, by which a dataloader worker hands over tensors
LONGEST = 107  # bytes of the path of a socket (unix(7)); behind a longer one, what a worker read would never arrive


def check(model_args: ModelArguments, data_args: DataTrainingArguments, training_args: TrainingArguments) -> None:
    """Refuse what can be seen to be wrong from the command line and the environment alone.

    Raises:
        ValueError: one sentence with the flag and its value.
    """
    check_source(model_args)
    if not data_args.meta_path:
        raise ValueError("--meta_path is missing: which JSON file lists the data sets?")
    if min(data_args.num_images_expected, data_args.max_packed_tokens) < 1:
        raise ValueError(
            f"--num_images_expected {data_args.num_images_expected} --max_packed_tokens {data_args.max_packed_tokens}: "
            "a row has room for at least one tile and one token."
        )
    if not 1 <= data_args.min_dynamic_patch <= data_args.max_dynamic_patch:
        raise ValueError(
            f"--min_dynamic_patch {data_args.min_dynamic_patch} --max_dynamic_patch {data_args.max_dynamic_patch}: "
            "fewest and most tiles of an image are at least 1, and the fewest not above the most."
        )
    if not 1 <= data_args.min_num_frame <= data_args.max_num_frame:
        raise ValueError(
            f"--min_num_frame {data_args.min_num_frame} --max_num_frame {data_args.max_num_frame}: fewest and most "
            "frames of a video are at least 1, and the fewest not above the most."
        )
    if data_args.conv_style not in conv_templates:
        raise ValueError(f"--conv_style {data_args.conv_style}: known templates are {', '.join(conv_templates)}.")
    if not 0 <= model_args.drop_path_rate < 1:
        raise ValueError(f"--drop_path_rate {model_args.drop_path_rate} is a probability in [0, 1).")
    ratio = data_args.down_sample_ratio
    if not 0 < ratio <= 1 or 1 / ratio != round(1 / ratio):
        raise ValueError(f"--down_sample_ratio {ratio}: 1 over it is the side of a token in patches, a whole number.")
    temporary = tempfile.gettempdir()
    if training_args.dataloader_num_workers and (excess := len(os.fsencode(temporary + SOCKET)) - LONGEST) > 0:
        raise ValueError(
            f"TMPDIR {temporary} is {excess} bytes too long for the sockets of --dataloader_num_workers "
            f"{training_args.dataloader_num_workers}: set TMPDIR to a shorter folder, such as /tmp."
        )


def check_source(args: ModelArguments) -> None:
    """A run starts from a chat checkpoint, or from a vision encoder and a language model."""
    parts = {"--vision_path": args.vision_path, "--llm_path": args.llm_path}
    given = [flag for flag, path in parts.items() if path]
    if args.model_name_or_path and given:
        logger.warning("%s not read: --model_name_or_path takes precedence", " and ".join(given))
    elif not args.model_name_or_path and not given:
        raise ValueError(
            "--model_name_or_path is missing, and so are --vision_path and --llm_path: which checkpoint shall the run "
            "start from?"
        )
    elif not args.model_name_or_path and len(given) == 1:
        (absent,) = parts.keys() - given
        raise ValueError(f"{given[0]} is given and {absent} is not: a chat model is composed of both.")


def resume_point(training_args: TrainingArguments) -> str | None:
    """The checkpoint to go on from: the one asked for, else the newest whole one in the output folder; a collective.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged; no checkpoint in the output folder is whole; or the
            folder holds a finished model and may not be overwritten.
    """
    if (asked := training_args.resume_from_checkpoint) not in (None, AUTO):
        if not from_first_rank((Path(asked) / STATE).is_file):
            raise ValueError(f"--resume_from_checkpoint {asked}: no checkpoint (no {STATE}) there.")
        if found := faults(Path(asked)):
            raise ValueError(f"--resume_from_checkpoint {asked} is damaged: {found_first(found)}.")
        return asked
    folder = Path(training_args.output_dir)
    if training_args.overwrite_output_dir or not training_args.do_train:
        return None
    last = newest_whole(folder, _pass_over)
    if last:
        logger.info("resuming from %s; --overwrite_output_dir starts afresh", last)
    elif (folder / "config.json").exists():
        raise ValueError(
            f"--output_dir {folder} holds a finished model and no checkpoint to resume from: choose another folder, "
            "or say --overwrite_output_dir True."
        )
    return str(last) if last else None


def _pass_over(checkpoint: Path, found: list[str]) -> None:
    logger.warning("%s is passed over: %s", checkpoint, found_first(found))
