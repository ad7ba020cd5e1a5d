"""Arguments -> what preference optimisation has beyond fine-tuning: more checks, and the reference.

Beside `build.py`, which makes everything else.
"""

import logging

from internvl.model.internvl_chat import InternVLChatConfig
from internvl.model.lora import RANKS
from internvl.train.arguments import DPOConfig, ModelArguments, PreferenceDataArguments
from internvl.train.build import build_tokenizer, load_model
from internvl.train.check import check
from internvl.train.preference_loss import InternVLChatModel

logger = logging.getLogger(__name__)


def check_preference(model_args: ModelArguments, data_args: PreferenceDataArguments, args: DPOConfig) -> None:
    """Refuse what can be seen to be wrong from the command line and the environment alone."""
    check(model_args, data_args, args)
    for name, value in {"use_packed_ds": False, "loss_reduction": "token", "loss_reduction_all_gather": False}.items():
        if getattr(data_args, name) != value:
            raise ValueError(f"--{name} {getattr(data_args, name)} does not act on pairs of answers: leave it out.")
    for name in {"sigmoid", "bco_pair"} - set(args.loss_type.split(",")):
        if (weight := getattr(data_args, f"{name}_loss_weight")) != 1:
            raise ValueError(f"--{name}_loss_weight {weight} does not act on --loss_type {args.loss_type}.")


def build_reference(
    model: InternVLChatModel, model_args: ModelArguments, data_args: PreferenceDataArguments, args: DPOConfig
) -> InternVLChatModel | None:
    """The model as training finds it, frozen; None if it needs no copy: it is `model` with its adapters switched off.

    The copy is loaded by the same steps, with a tokenizer of its own, so that it gets the same new tokens and tiles.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    pissa = any(settings["variant"] == "pissa" for settings in (model.config.lora_settings or {}).values())
    apart = all("lora_" in name for name in trained) and not pissa  # PiSSA takes its beginning out of the weights
    if args.reference_free or (apart and not had_adapters(model_args)):
        return None
    logger.info("loading a second copy of the model: the reference")
    tokenizer = build_tokenizer(model_args, data_args)
    return load_model(model_args, data_args, args, tokenizer, InternVLChatModel).requires_grad_(False).eval()


def had_adapters(model_args: ModelArguments) -> bool:
    """Whether the run starts from a checkpoint that holds adapters already: then these belong to the reference."""
    if not model_args.model_name_or_path:
        return False
    config = InternVLChatConfig.from_pretrained(model_args.model_name_or_path)
    return any(getattr(config, rank) for rank in RANKS.values())
