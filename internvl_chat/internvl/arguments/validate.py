"""What can be seen to be wrong before anything is loaded: first station after the command line.

`arguments.py` has looked at each flag by itself; here flags meet one another and the output folder.
"""

import json
import logging
import os
import tempfile

from internvl.arguments.preference import DPOConfig, PreferenceDataArguments
from internvl.arguments.training import DataTrainingArguments, ModelArguments, TrainingArguments
from internvl.conversation import conv_templates

logger = logging.getLogger(__name__)
WORKER_SOCKET = "/pymp-12345678/listener-12345678"  # in TMPDIR, by which a dataloader worker hands over tensors
MAX_SOCKET_PATH_BYTES = (
    107  # bytes of the path of a socket (unix(7)); behind a longer one, what a worker read would never arrive
)


def validate_arguments(
    model_args: ModelArguments, data_args: DataTrainingArguments, training_args: TrainingArguments
) -> None:
    """Refuse what can be seen to be wrong from the command line and the environment alone.

    Raises:
        ValueError: one sentence with the flag and its value.
    """
    validate_model_source(model_args)
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
    if (
        training_args.dataloader_num_workers
        and (excess := len(os.fsencode(temporary + WORKER_SOCKET)) - MAX_SOCKET_PATH_BYTES) > 0
    ):
        raise ValueError(
            f"TMPDIR {temporary} is {excess} bytes too long for the sockets of --dataloader_num_workers "
            f"{training_args.dataloader_num_workers}: set TMPDIR to a shorter folder, such as /tmp."
        )


def validate_model_source(args: ModelArguments) -> None:
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


def validate_gradient_checkpointing(args: ModelArguments, training_args: TrainingArguments) -> None:
    """Refuses, before anything is loaded, flags of the towers that exclude each other.

    Raises:
        ValueError: one sentence with the flags and their values.
    """
    if args.checkpoint_every < 1:
        raise ValueError(f"--checkpoint_every {args.checkpoint_every:g}: every n-th layer, n at least 1.")
    chosen = [] if args.checkpoint_every == 1 else [f"--checkpoint_every {args.checkpoint_every:g}"]
    chosen += [] if args.checkpoint_keep == "none" else [f"--checkpoint_keep {args.checkpoint_keep}"]
    if chosen and not (args.grad_checkpoint or args.vit_grad_checkpoint):
        raise ValueError(f"{' '.join(chosen)} does not act with --grad_checkpoint False.")
    if args.vit_grad_checkpoint is False:
        chosen.append("--vit_grad_checkpoint False")
    if training_args.activation_checkpointing and chosen:
        raise ValueError(
            f"{' '.join(chosen)} and --gradient_checkpointing True: the latter recomputes all layers of both towers; "
            "leave it out, --grad_checkpoint True is enough."
        )
    kwargs = training_args.activation_checkpointing_kwargs or {}
    if (json.loads(kwargs) if isinstance(kwargs, str) else kwargs).get("use_reentrant"):
        raise ValueError(f"--gradient_checkpointing_kwargs {kwargs}: reentrant checkpoints lose gradients of adapters.")
    if args.compile and args.checkpoint_keep != "none":
        raise ValueError(
            f"--compile True and --checkpoint_keep {args.checkpoint_keep}: the kernels of compiled layers cannot be "
            "told apart from outside; --checkpoint_every goes with both."
        )
    if args.compile and args.drop_path_rate:
        raise ValueError(
            f"--compile True and --drop_path_rate {args.drop_path_rate}: every vision layer drops at a rate of its own "
            "and would be compiled anew."
        )
    if args.compile and (training_args.deepspeed or {}).get("zero_optimization", {}).get("stage") == 3:
        raise ValueError(
            "--compile True under ZeRO-3: compiled code breaks where DeepSpeed gathers weights, before every linear "
            "layer, so that there is nothing to gain; use ZeRO-2, or leave it out."
        )


def validate_preference_arguments(
    model_args: ModelArguments, data_args: PreferenceDataArguments, args: DPOConfig
) -> None:
    """Refuse what can be seen to be wrong from the command line and the environment alone."""
    validate_arguments(model_args, data_args, args)
    for name, value in {"use_packed_ds": False, "loss_reduction": "token", "loss_reduction_all_gather": False}.items():
        if getattr(data_args, name) != value:
            raise ValueError(f"--{name} {getattr(data_args, name)} does not act on pairs of answers: leave it out.")
    for name in {"sigmoid", "bco_pair"} - set(args.loss_type.split(",")):
        if (weight := getattr(data_args, f"{name}_loss_weight")) != 1:
            raise ValueError(f"--{name}_loss_weight {weight} does not act on --loss_type {args.loss_type}.")
