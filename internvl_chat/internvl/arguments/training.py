"""The command line: three dataclasses with upstream's names, flags and defaults, and `parse_args`.

First station of a run; `build.py` turns what is parsed here into objects. Flags that transformers 5 dropped and
upstream's recipes still pass are declared here, so that every recipe parses unchanged.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import torch
import transformers
from transformers import HfArgumentParser

from internvl.arguments.deepspeed_config import load_deepspeed_config
from internvl.arguments.fault_tolerance import FaultToleranceArguments, option
from internvl.arguments.per_part import LoraArguments, RateArguments
from internvl.arguments.unsupported_flags import REMOVED_FLAGS, refuse_unsupported_flags


@dataclass
class ModelArguments(LoraArguments):
    """Which weights to start from and which of them train."""

    model_name_or_path: str | None = option(None, "chat checkpoint to start from; wins over the three paths below")
    vision_path: str | None = option(None, "vision encoder checkpoint, when there is no chat checkpoint yet")
    llm_path: str | None = option(None, "language model checkpoint, when there is no chat checkpoint yet")
    mlp_path: str | None = option(None, "projector state dict, loaded on top of either")
    allow_pickle: bool = option(False, "open weights that are no safetensors, too (*.bin); only tensors are read there")
    freeze_llm: bool = option(False, "freeze the language model")
    freeze_backbone: bool = option(False, "freeze the vision encoder")
    freeze_mlp: bool = option(False, "freeze the projector")
    unfreeze_vit_layers: int = option(0, "train vision layers [n:] of a frozen encoder; -8 trains the last eight")
    vision_select_layer: int = option(-1, "which hidden state of the vision encoder the projector reads")
    use_backbone_lora: int = option(0, "LoRA rank in the vision encoder")
    use_llm_lora: int = option(0, "LoRA rank in the language model")
    use_mlp_lora: int = option(0, "LoRA rank in the projector")
    quantize_backbone: bool = option(False, "QLoRA: 4-bit weights (NF4) under the vision encoder's adapters (CUDA)")
    quantize_llm: bool = option(False, "QLoRA: 4-bit weights (NF4) under the language model's adapters (CUDA)")
    merge_before_training: bool = option(False, "merge the checkpoint's adapters before new ones are added")
    unfreeze_lm_head: bool = option(False, "train the output head of a frozen language model")
    grad_checkpoint: bool = option(True, "recompute activations of both towers in the backward pass")
    vit_grad_checkpoint: bool | None = option(None, "the same for the vision encoder alone; default --grad_checkpoint")
    checkpoint_every: float = option(1, "recompute every n-th layer of a tower; 1: all, 1.25: four of five, 2: half")
    checkpoint_keep: Literal["none", "attention", "matmul"] = option(
        "none", "of a recomputed layer, keep what attention gives, or that and what linear layers give"
    )
    compile: bool = option(False, "compile the layers of both towers with torch.compile")
    drop_path_rate: float = option(0.0, "stochastic depth of the vision encoder")
    ps_version: Literal["v1", "v2"] = option("v2", "pixel shuffle version")
    use_fast_tokenizer: bool = option(False, "accepted for upstream's recipes; every tokenizer here is a fast one")
    use_liger: bool = option(False, "Liger kernels in the language model and its loss (CUDA)")
    use_custom_flash_attn: bool = option(
        False, "accepted for InternVL 3.5's recipes; attention is transformers' fastest with either value"
    )


@dataclass
class DataTrainingArguments:
    """How records become samples and rows."""

    max_seq_length: int = option(8192, "tokens after which a sample is cut")
    force_image_size: int = option(448, "side of a tile in pixels")
    down_sample_ratio: float = option(0.5, "pixel shuffle factor; must equal the checkpoint's")
    pad2square: bool = option(False, "pad images to a square instead of stretching them (evaluation transform only)")
    conv_style: str = option("internlm2-chat", "conversation template")
    meta_path: str | None = option(None, "JSON file that lists the data sets")
    use_data_resampling: bool = option(False, "weigh data sets by the square root of their size")
    dynamic_image_size: bool = option(False, "cut images into tiles by their aspect ratio")
    use_thumbnail: bool = option(False, "add the whole image as one more tile")
    min_dynamic_patch: int = option(1, "fewest tiles of an image")
    max_dynamic_patch: int = option(12, "most tiles of an image, the thumbnail not counted")
    min_num_frame: int = option(8, "fewest frames of a video")
    max_num_frame: int = option(32, "most frames of a video")
    normalize_type: Literal["imagenet", "clip", "siglip"] = option("imagenet", "mean and deviation of pixels")
    use_packed_ds: bool = option(False, "pack several samples into one row")
    num_images_expected: int = option(40, "most tiles of a packed row")
    max_packed_tokens: int = option(8192, "most tokens of a packed row")
    max_buffer_size: int = option(20, "accepted for upstream's recipes; rows are planned from the whole epoch")
    log_freq: int = option(1000, "accepted for upstream's recipes; what packing does is printed before the first step")
    strict_mode: bool = option(
        True, "packing: pad every row to --max_packed_tokens, so that all steps are of one shape"
    )
    replacement: bool = option(False, "accepted for upstream's recipes; epochs follow each other until --max_steps")
    allow_overflow: bool = option(
        False, "packing: split a sample that is larger than a row, instead of leaving it out as a bad one"
    )
    loss_reduction: Literal["token", "sample", "square"] = option(
        "token", "weight of a token by the number n of its sample's trained tokens: 1, 1 / n or 1 / sqrt(n)"
    )
    loss_reduction_all_gather: bool = option(
        False,
        "a step's loss is the mean over the tokens of all its ranks and micro-batches, not the mean of their means",
    )
    allow_outside_root: bool = option(False, "open what records name outside the root of their data set, too")
    accept_changed_data: bool = option(False, "go on from a checkpoint although the data is not what it was")
    split_annotations: bool = option(
        False, "accepted for InternVL 3.5's recipes; no rank holds annotations in memory, each reads lines it needs"
    )
    max_bad_samples: float = option(
        0.01, "unusable samples that are left out before the run stops: a share of the data below 1, else a count"
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments, RateArguments, FaultToleranceArguments):
    """transformers' own, with the four flags that version 5 dropped and defaults that fit this data path."""

    evaluation_strategy: str | None = option(None, "earlier name of --eval_strategy")
    overwrite_output_dir: bool = option(False, "start afresh although --output_dir holds checkpoints")
    group_by_length: bool = option(False, "make steps of samples of similar length")
    warmup_ratio: float | None = option(None, "share of the steps that warm up")
    remove_unused_columns: bool = option(False, "batches are made for the model; nothing is removed")
    ddp_find_unused_parameters: bool | None = option(False, "every trainable parameter takes part in every step")
    ddp_timeout: int = option(3600, "seconds that ranks wait for one another before the run ends")
    log_level: str = option("error", "of transformers; a run tells what matters itself")
    log_level_replica: str = option("error", "the same, on ranks other than the first")
    logging_nan_inf_filter: bool = option(False, "report a loss that is not finite as what it is")
    use_cpu: bool = option(not torch.cuda.is_available(), "train without an accelerator")
    backbone_layer_decay: float | None = option(
        None, "learning rate of an unfrozen vision layer, over that of the layer above it"
    )
    lora_fp32: bool = option(False, "keep and optimise what trains in fp32 while the rest of the model is bf16")
    save_full_model: bool = option(False, "LoRA runs save the whole model in upstream's layout, not what was trained")
    no_smoke_save: bool = option(False, "do not write and read a checkpoint before the first step")
    do_train: bool = option(True, "False: set everything up, tell what would train, and stop there")

    def __post_init__(self):
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        refuse_unsupported_flags(self)
        self.validate_fault_tolerance()
        if self.warmup_ratio is not None and not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"--warmup_ratio is a share of the steps in [0, 1), not {self.warmup_ratio}.")
        if self.warmup_ratio and not self.warmup_steps:
            self.warmup_steps = self.warmup_ratio  # transformers 5 reads a value below 1 as a share
        if self.output_dir is None:
            raise ValueError("--output_dir is missing: where shall checkpoints and logs go?")
        if isinstance(self.deepspeed, str):
            self.deepspeed = load_deepspeed_config(self.deepspeed, self)
        if self.lora_fp32:
            self.keep_trainable_in_fp32()
        super().__post_init__()

    def keep_trainable_in_fp32(self):
        """Without DeepSpeed it is so anyway. DeepSpeed casts all to bf16 unless autocast does it, layer by layer."""
        if not self.bf16:
            raise ValueError("--lora_fp32 True is about the weights that train in a bf16 model: it needs --bf16 True.")
        if not self.deepspeed:
            return
        if self.deepspeed.get("zero_optimization", {}).get("stage") == 3:
            raise ValueError(
                "--lora_fp32 True does not run under ZeRO-3, which loads all weights in one type; its optimizer keeps "
                "fp32 master weights of what trains: leave the flag out, or use ZeRO-2."
            )
        self.bf16 = False
        self.deepspeed |= {"bf16": {"enabled": False}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


class OneLineErrorParser(HfArgumentParser):
    """Raises what argparse would print below a page of usage."""

    def error(self, message: str):
        raise ValueError(f"{message}.")


FINETUNE_ARGUMENTS = (ModelArguments, DataTrainingArguments, TrainingArguments)


def parse_args(argv: list[str] | None = None, classes: tuple[type, ...] = FINETUNE_ARGUMENTS) -> tuple:
    """Parse a command line (default: this program's), or one `.json` file of arguments, into one object a class.

    Raises:
        ValueError: an unknown flag, or a value that cannot be used, in one sentence.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = OneLineErrorParser(classes)
    if len(argv) == 1 and argv[0].endswith(".json"):
        return parser.parse_json_file(argv[0])
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        flags = [word.lstrip("-").split("=")[0] for word in unknown]
        hints = "".join(f"; {REMOVED_FLAGS[flag]}" for flag in flags if flag in REMOVED_FLAGS)
        raise ValueError(f"not a flag of this program: {' '.join(unknown)}{hints or '; --help lists all'}.")
    return tuple(parsed)
