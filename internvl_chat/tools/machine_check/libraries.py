"""Report which libraries are installed, fit together and can be imported.

Libraries are imported in a process of their own: one that crashes or hangs ends only that process.
"""

import importlib
import multiprocessing
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from multiprocessing.connection import Connection
from typing import NamedTuple

from .checks import describe_error
from .gpus import describe_torch

IMPORT_TIMEOUT = 180.0  # seconds for one library; the first import from a network file system takes a minute
PROJECT = "internvl_chat"  # the distribution of this package


class Package(NamedTuple):
    """A library that this package can use.

    Attributes:
        extra: of pyproject.toml; "required" for those that every training needs, "other" for no extra.
        cost: what does not work without it.
        module: to import, for those with compiled code, which may be installed and yet fail to import.
    """

    extra: str
    cost: str = ""
    module: str = ""


PACKAGES = {
    "torch": Package("required", "no program starts", module="torch"),
    "torchvision": Package("required", "no program starts", module="torchvision"),
    "transformers": Package("required", "no program starts", module="transformers"),
    "peft": Package("required", "no program starts", module="peft"),
    "accelerate": Package("required", "no program starts", module="accelerate"),
    "timm": Package("required", "no program starts", module="timm"),
    "safetensors": Package("required", "no program starts", module="safetensors"),
    "sentencepiece": Package("required", "no program starts", module="sentencepiece"),
    "protobuf": Package("required", "no program starts"),
    "numpy": Package("required", "no program starts", module="numpy"),
    "pillow": Package("required", "no program starts", module="PIL.Image"),
    "packaging": Package("required", "no program starts"),
    "psutil": Package("required", "no program starts"),
    "tqdm": Package("required", "no program starts"),
    "pyyaml": Package("required", "no program starts"),
    "deepspeed": Package("deepspeed", "--deepspeed is an error, and the recipes need ZERO_CONFIG=none", "deepspeed"),
    "ninja": Package("deepspeed", "DeepSpeed cannot compile its op"),
    "pyarrow": Package("data", "Parquet and Arrow annotations are errors", "pyarrow"),
    "s3fs": Package("data", "s3:// paths are errors"),
    "pillow-heif": Package("data", "HEIC images are unusable samples", "pillow_heif"),
    "av": Package("video", "data sets with videos are errors", "av"),
    "tensorboard": Package("logging", "the recipes need --report_to none"),
    "matplotlib": Package("report", "no charts of check_data.py --report and the benchmarks"),
    "sacrebleu": Package("eval", "no metric bleu"),
    "rouge-score": Package("eval", "no metric rouge_l"),
    "jiwer": Package("eval", "no metrics cer and wer"),
    "scikit-learn": Package("quickstart", "shell/quickstart.sh is an error"),
    "liger-kernel": Package("liger", "--use_liger True is an error", "liger_kernel"),
    "bitsandbytes": Package("quantize", "--quantize_llm, 8-bit optimizers and int8 are errors", "bitsandbytes"),
    "argcomplete": Package("completion", "no completion of `internvl` in the shell"),
    "vllm": Package("serve", "no serving by vLLM; an environment of its own is better"),
    "jupyterlab": Package("notebook", "the notebook of examples/ cannot be opened"),
    "mkdocs-material": Package("docs", "the site cannot be built"),
    "pytest": Package("dev", "the tests cannot run"),
    "triton": Package("other", "--use_liger True and --compile True fail on a GPU", "triton"),
    # The distributions of flash-attn, as in FLASH_VERSIONS.
    "flash-attn": Package("other", "torch's own kernels are used", "flash_attn"),
    "flash-attn-3": Package("other", "torch's own kernels are used", "flash_attn_interface"),
    "flash-attn-4": Package("other", "torch's own kernels are used", "flash_attn.cute"),
}


# -- versions ----------------------------------------------------------------------------------------------------------


def find_version(name: str) -> str | None:
    """Return the version of an installed distribution, "unknown" if its metadata is damaged, None if it is missing."""
    try:
        return version(name) or "unknown"
    except PackageNotFoundError:
        return None
    except (KeyError, OSError, ValueError):  # KeyError: no version in METADATA, from Python 3.14 on
        return "unknown"


def list_versions() -> dict[str, str | None]:
    """Return the version of each of PACKAGES, None for those not installed."""
    return {name: find_version(name) for name in PACKAGES}


def list_conflicts() -> list[str]:
    """List installed libraries that another one requires in another version, as `pip check` does."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.version import InvalidVersion

    conflicts = []
    for name in filter(find_version, (PROJECT, *PACKAGES)):
        # All extras of this project; of a library only what it always requires.
        extras = {package.extra for package in PACKAGES.values()} if name == PROJECT else {""}
        for line in requires(name) or ():
            try:
                requirement = Requirement(line)
                marker = requirement.marker
                applies = marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)
                found = find_version(requirement.name) if applies else None
                if found and not requirement.specifier.contains(found, prereleases=True):
                    required = f"{requirement.name} {requirement.specifier}"
                    conflicts.append(f"{name} {find_version(name)} requires {required}, got {found}")
            except (InvalidRequirement, InvalidVersion):  # of a library that pip would not install today
                continue
    return conflicts


# -- imports -----------------------------------------------------------------------------------------------------------


def describe_deepspeed() -> dict[str, list[str]]:
    """Return the ops that were compiled when DeepSpeed was installed. The others are compiled by runs."""
    from deepspeed.git_version_info import installed_ops

    return {"built_ops": [name for name, is_built in installed_ops.items() if is_built]}


DESCRIBE_FNS = {"torch": describe_torch, "deepspeed": describe_deepspeed}


def import_libraries(names: list[str]) -> dict[str, dict]:
    """Import libraries in a process apart, and describe some of them.

    Returns:
        Name -> {"error": reason}, or what its function in DESCRIBE_FNS returns, without one {}.
    """
    results: list[dict] = []
    while len(results) < len(names):  # after a library that ends the process, in another one
        results += run_in_process(names[len(results) :])
    return dict(zip(names, results, strict=True))


def run_in_process(names: list[str]) -> Iterator[dict]:
    """Import libraries one after the other in a new process, and yield the results as they come.

    The last result is that of a library which ends the process or does not return.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_imports, args=(names, sender), daemon=True)
    process.start()
    sender.close()
    try:
        for _ in names:
            if not receiver.poll(IMPORT_TIMEOUT):
                yield {"error": f"did not return within {IMPORT_TIMEOUT:g} s"}
                return
            yield receiver.recv()
    except EOFError:
        process.join()
        yield {"error": f"ended the process with status {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def send_imports(names: list[str], sender: Connection) -> None:
    """Import libraries and send the results; the target of the process."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for name in names:
        try:
            importlib.import_module(PACKAGES[name].module)
            sender.send(DESCRIBE_FNS.get(name, dict)())
        except Exception as error:
            sender.send({"error": describe_error(error)})
