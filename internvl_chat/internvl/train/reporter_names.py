"""The same names of metrics in all reporters: `eval/docvqa/anls`, `train/loss`.

transformers' callbacks for TensorBoard, W&B, trackio, SwanLab, Comet and Neptune rename `eval_docvqa/anls` and `loss`;
those for MLflow, DagsHub and Azure ML (5.24) do not.
"""

from transformers import Trainer, TrainerCallback
from transformers.integrations import AzureMLCallback, DagsHubCallback, MLflowCallback, rewrite_logs


class CommonNames(TrainerCallback):
    """Mixin that renames metrics before a reporter logs them."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        return super().on_log(args, state, control, logs=rewrite_logs(logs or {}), **kwargs)


# The callbacks are called with keywords only, in whatever order they declare them.
class NamedMLflowCallback(CommonNames, MLflowCallback):  # pyrefly: ignore[inconsistent-inheritance]
    """MLflow with the names of other reporters."""


class NamedDagsHubCallback(CommonNames, DagsHubCallback):
    """DagsHub with the names of other reporters."""


class NamedAzureMLCallback(CommonNames, AzureMLCallback):
    """Azure ML with the names of other reporters."""


REPLACEMENTS = {
    MLflowCallback: NamedMLflowCallback,
    DagsHubCallback: NamedDagsHubCallback,
    AzureMLCallback: NamedAzureMLCallback,
}


def use_common_names(trainer: Trainer) -> None:
    """Replace the reporters that log metrics under other names."""
    for callback in list(trainer.callback_handler.callbacks):
        if replacement := REPLACEMENTS.get(type(callback)):
            trainer.remove_callback(callback)
            trainer.add_callback(replacement)
