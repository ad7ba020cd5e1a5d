"""Values of `--report_to` and the packages that they require."""

from transformers.integrations import (
    get_available_reporting_integrations,
    is_azureml_available,
    is_flytekit_available,
)

# value of --report_to, as of transformers 5.24 -> what it requires
REQUIREMENTS = {
    "azure_ml": "the package azureml-sdk",
    "clearml": "the package clearml",
    "codecarbon": "the package codecarbon",
    "comet_ml": "the package comet-ml",
    "dagshub": "the packages dagshub and mlflow",
    "dvclive": "the package dvclive",
    "flyte": "the package flytekit",
    "kubeflow": "the variable KUBEFLOW_TRAINER_SERVER_URL, which a Kubeflow TrainJob sets",
    "mlflow": "the package mlflow",
    "neptune": "the package neptune",
    "swanlab": "the package swanlab",
    "tensorboard": "the package tensorboard",
    "trackio": "the package trackio",
    "wandb": "the package wandb",
}


def validate_reporters(names: list[str] | None) -> None:
    """Raise a ValueError if a value of --report_to is unknown or its package missing."""
    names = names or []
    for name in names:
        if name in ("all", "none") and len(names) == 1:
            continue
        if name not in REQUIREMENTS:
            raise ValueError(
                f"--report_to {name[:80] or repr(name)} is invalid: expected all, none, or {', '.join(REQUIREMENTS)}."
            )
        if not is_reporter_available(name):
            raise ValueError(f"--report_to {name} is not available: it requires {REQUIREMENTS[name]}.")


def is_reporter_available(name: str) -> bool:
    """Check that what a reporter requires is installed."""
    unlisted = {"azure_ml": is_azureml_available, "flyte": is_flytekit_available}  # at all, or beside mlflow
    return unlisted[name]() if name in unlisted else name in get_available_reporting_integrations()
