"""Flags of preference optimisation (`internvl_chat_mpo.py`)."""

from dataclasses import dataclass
from typing import Literal

from internvl.arguments.fault_tolerance import option
from internvl.arguments.training import DataTrainingArguments, ModelArguments, TrainingArguments


@dataclass
class PreferenceDataArguments(DataTrainingArguments):
    """How records become pairs, and what each loss of a sum of losses weighs."""

    sigmoid_loss_weight: float = option(1.0, "weight of the loss `sigmoid`")
    bco_pair_loss_weight: float = option(1.0, "weight of the loss `bco_pair`")


@dataclass
class DPOConfig(TrainingArguments):
    """What preference optimisation adds, under trl's names; upstream's recipes train `sigmoid,bco_pair`."""

    loss_type: Literal[
        "sigmoid", "hinge", "ipo", "bco_pair", "sppo_hard", "nca_pair", "robust", "aot", "aot_pair", "exo_pair",
        "sigmoid,bco_pair",
    ] = option("sigmoid", "loss of a pair, or a weighted sum of two")  # fmt: skip
    beta: float = option(0.1, "reward of an answer for each nat that it is likelier than under the reference")
    label_smoothing: float = option(0.0, "probability that a pair is the wrong way round (sigmoid, robust, exo_pair)")
    rpo_alpha: float | None = option(None, "weight of the mean cross entropy of the chosen answer; default none")
    reference_free: bool = option(False, "take every answer to be equally likely under the reference")

    def __post_init__(self):
        names = self.loss_type.split(",")
        if self.loss_type in ("aot", "aot_pair"):
            raise ValueError(
                f"--loss_type {self.loss_type} is not supported: it sorts log-ratios of a whole batch, of which a "
                "micro-batch holds one or two."
            )
        if self.beta <= 0:
            raise ValueError(f"--beta {self.beta} must be positive.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"--label_smoothing {self.label_smoothing} is a probability in [0, 0.5).")
        if self.label_smoothing and not {"sigmoid", "robust", "exo_pair"} & set(names):
            raise ValueError(f"--label_smoothing {self.label_smoothing} does not act on --loss_type {self.loss_type}.")
        super().__post_init__()


PREFERENCE_ARGUMENTS = (ModelArguments, PreferenceDataArguments, DPOConfig)
