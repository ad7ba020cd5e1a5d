"""Report versions, GPUs and the kernels that a model gets on this machine."""

import importlib
import os
import platform
import re
import warnings
from collections import Counter
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from internvl.constants import HOW_TO_ENLARGE, SHARED_MEMORY_DIR
from internvl.metrics.device_peak import get_device_peak, is_tf32_enabled
from internvl.model.internvl_chat.decoder import FLASH_VERSIONS
from internvl.model.liger_kernels import use_liger_kernels
from internvl.model.lora import unwrap_peft
from internvl.tools.benchmark.sizes import MODEL_SIZES, ModelSize
from internvl.versions import describe_untested_versions

from .checks import Checks, SkippedCheck
from .host import GIB, MIN_SHM_GIB, describe_compilers, describe_host, run_command
from .models import build_adapted_model, build_row, move_batch

REQUIRED_PACKAGES = ("torch", "transformers", "peft", "accelerate")
# Distribution -> module. Compiled for one version of torch and CUDA, these may be installed and yet fail to import.
OPTIONAL_PACKAGES = {
    "deepspeed": "deepspeed",
    "triton": "triton",
    "liger-kernel": "liger_kernel",
    "bitsandbytes": "bitsandbytes",
    **{version.package: version.module for version in reversed(FLASH_VERSIONS.values())},
}


# -- versions ----------------------------------------------------------------------------------------------------------


def list_version_checks(device: torch.device) -> Checks:
    """List the checks of libraries, GPUs and the host."""
    yield "libraries", report_libraries
    yield "optional packages", report_optional_packages
    yield "GPUs", report_gpus
    yield "host", report_host
    yield "compilers", report_compilers


def report_libraries() -> dict:
    """Return the versions of the required libraries, and a warning if some are untested."""
    found = {"python": platform.python_version()} | {name: version(name) for name in REQUIRED_PACKAGES}
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    warning = describe_untested_versions()
    return found | ({"warning": warning} if warning else {})


def report_optional_packages() -> dict:
    """Return the versions of optional packages, None for those not installed.

    Raises:
        ValueError: a package is installed and cannot be imported.
    """
    found: dict[str, str | None] = {}
    for name, module in OPTIONAL_PACKAGES.items():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # also of its compiled code
            raise ValueError(f"{name} {found[name]} cannot be imported: {error}") from error
    return found


def report_gpus() -> dict:
    """Return the driver and a line for each GPU, after computing something on it."""
    if not torch.cuda.is_available():
        raise SkippedCheck(f"torch {torch.__version__} finds no CUDA device")
    driver = run_command(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    found = {"driver": driver.splitlines()[0] if driver else "unknown"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        torch.ones(1, device=f"cuda:{index}").add(1).item()  # fails if torch has no kernels for this GPU
        free, total = torch.cuda.mem_get_info(index)
        found[f"GPU {index}"] = (
            f"{properties.name}{' (a MIG slice)' if 'MIG' in properties.name else ''}, compute capability "
            f"{properties.major}.{properties.minor}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        )
    return found


def report_host() -> dict:
    """Return cores, memory, /dev/shm and limits, with a warning for a small /dev/shm."""
    found = describe_host()
    required = MIN_SHM_GIB * max(1, torch.cuda.device_count())
    if found.get("dev_shm_gib", required) < required:
        found["warning"] = (
            f"{SHARED_MEMORY_DIR} has less than {required:g} GiB: fewer dataloader workers will start; "
            f"enlarge it ({HOW_TO_ENLARGE})"
        )
    return found


def report_compilers() -> dict:
    """Return the versions of the compilers.

    Raises:
        ValueError: no C++ compiler, which DeepSpeed requires.
    """
    found = describe_compilers()
    if not found["c++"]:
        raise ValueError(f"no C++ compiler ({os.environ.get('CXX', 'c++')}), which DeepSpeed requires: install g++")
    return {"compiler": found["c++"], "nvcc": found["nvcc"] or "none, not required"}


# -- kernels -----------------------------------------------------------------------------------------------------------


def list_kernel_checks(device: torch.device) -> Checks:
    """List the checks of which kernels are used and which are usable."""
    yield "operators of a step", lambda: report_operators(device)
    yield "attention of a tile", lambda: report_sdpa_backends(device)
    yield "Liger", lambda: report_liger(device)
    yield "fused AdamW", lambda: try_fused_adamw(device)
    yield "precision", lambda: report_precision(device)


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that run inside the context, by name."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def list_matching(self, pattern: str, default: str = "none") -> str:
        """List the operators whose names match, with their counts; without one: `default`."""
        found = [f"{name} x {n}" for name, n in sorted(self.counts.items()) if re.search(pattern, name)]
        return ", ".join(found) or default


def get_kernel_size(device: torch.device) -> tuple[ModelSize, list[tuple[int, int]]]:
    """Return a model size with one layer per part, and (text tokens, tiles) of documents.

    The shapes are those of the 8B model: kernels are chosen by shape.
    """
    size = MODEL_SIZES["8b" if device.type == "cuda" else "test"]
    vision, llm = size.vision | {"num_hidden_layers": 1}, size.llm | {"num_hidden_layers": 1, "vocab_size": 1024}
    return size._replace(vision=vision, llm=llm, dtype=torch.bfloat16), [(300, 1), (777, 0), (150, 2)]


def report_operators(device: torch.device, has_liger: bool = False) -> dict:
    """Run forward and backward pass of a packed row, and return the operators used."""
    size, documents = get_kernel_size(device)
    with device:
        model = build_adapted_model(size)
    if has_liger:
        use_liger_kernels(model)
    batch = move_batch(build_row(size, documents), device, size.dtype)
    with OperatorCounter() as vision:
        model.extract_feature(batch["pixel_values"])
    with OperatorCounter() as forward:
        loss = model(**batch).loss
    with OperatorCounter() as backward:
        loss.backward()
    forward.counts -= vision.counts  # leaves the LLM's
    attention = {"pattern": r"attention|attn|flash", "default": "products and softmax"}
    return {
        "vision_encoder": vision.list_matching(**attention),
        "llm": forward.list_matching(**attention),
        "llm_implementation": unwrap_peft(model.language_model).config._attn_implementation,
        "documents": len(documents),
        "rms_norm": forward.list_matching("rms_norm"),
        "operators": describe_counts(vision, forward, backward),
    }


def describe_counts(vision: OperatorCounter, llm: OperatorCounter, backward: OperatorCounter) -> str:
    """Describe how many operators one layer of each part takes, ends of the model included."""
    return f"{vision.counts.total()} vision encoder, {llm.counts.total()} LLM, {backward.counts.total()} backward pass"


def report_sdpa_backends(device: torch.device) -> dict:
    """Return the backends that can run forward and backward pass of the ViT's attention."""
    usable = []
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        states = torch.randn(1, 16, 1025, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        with warnings.catch_warnings(), sdpa_kernel(getattr(SDPBackend, name)):
            warnings.simplefilter("ignore")  # reasons why a backend is not usable
            try:
                scaled_dot_product_attention(states, states, states).sum().backward()
            except RuntimeError:
                continue
        usable.append(name.removesuffix("_ATTENTION").lower())
    return {"usable": ", ".join(usable)}


def report_liger(device: torch.device) -> dict:
    """Return the operators of a step with Liger's kernels."""
    try:
        return {"operators": report_operators(device, has_liger=True)["operators"]}
    except ValueError as error:
        raise SkippedCheck(str(error)) from None


def try_fused_adamw(device: torch.device) -> dict:
    """Make a step of the fused AdamW."""
    parameter = torch.nn.Parameter(torch.ones(64, 64, device=device))
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=0.5, weight_decay=0.0, fused=True).step()
    if not torch.allclose(parameter, torch.full_like(parameter, 0.5), atol=1e-3):
        raise ValueError(f"the fused AdamW moved a weight from 1 to {parameter[0, 0].item():.3g}, expected 0.5")
    return {}


def report_precision(device: torch.device) -> dict:
    """Return whether fp32 products use TF32, and the peak that MFU refers to."""
    return {"tf32": is_tf32_enabled(), "peak": get_device_peak(device, torch.bfloat16)[1]}
