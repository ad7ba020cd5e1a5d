"""Flags of preference optimization, for `internvl_chat_mpo.py`."""

from dataclasses import dataclass
from typing import Literal

from internvl.arguments.data import DataTrainingArguments
from internvl.arguments.flags import option
from internvl.arguments.model import ModelArguments
from internvl.arguments.training import TrainingArguments

# Losses of upstream's command line that are not implemented here; no recipe uses them.
UNSUPPORTED_LOSSES = ("sppo_hard", "nca_pair", "robust", "aot", "aot_pair", "exo_pair")


@dataclass
class PreferenceDataArguments(DataTrainingArguments):
    """Data flags plus the weights of a combined loss."""

    sigmoid_loss_weight: float = option(1.0, "weight of the loss `sigmoid`")
    bco_pair_loss_weight: float = option(1.0, "weight of the loss `bco_pair`")


@dataclass
class DPOConfig(TrainingArguments):
    """Training flags plus those of preference optimization, named as in trl.

    Upstream's recipes train with `sigmoid,bco_pair`.
    """

    loss_type: Literal[
        "sigmoid", "hinge", "ipo", "bco_pair", "sppo_hard", "nca_pair", "robust", "aot", "aot_pair", "exo_pair",
        "sigmoid,bco_pair",
    ] = option("sigmoid", "loss of a pair, or a weighted sum of two losses")  # fmt: skip
    beta: float = option(0.1, "scale of the log-ratio between policy and reference; higher: stays closer to it")
    label_smoothing: float = option(0.0, "probability that a preference label is wrong (loss sigmoid only)")
    rpo_alpha: float | None = option(None, "weight of the chosen answer's cross entropy in the loss; default: none")
    reference_free: bool = option(False, "use no reference model: all answers are equally likely under it")

    def __post_init__(self):
        if self.loss_type in UNSUPPORTED_LOSSES:
            raise ValueError(
                f"--loss_type {self.loss_type} is not supported: choose sigmoid (DPO), hinge, ipo, bco_pair or "
                "sigmoid,bco_pair (MPO)."
            )
        if self.label_smoothing and "sigmoid" not in self.loss_type.split(","):
            raise ValueError(
                f"--label_smoothing {self.label_smoothing} is not supported with --loss_type {self.loss_type}: it has "
                "no effect there."
            )
        super().__post_init__()


PREFERENCE_ARGUMENTS = (ModelArguments, PreferenceDataArguments, DPOConfig)
