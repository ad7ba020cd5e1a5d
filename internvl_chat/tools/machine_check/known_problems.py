"""Known problems of a machine: what is found, what it costs, what helps.

`KNOWN_PROBLEMS` is the table. A row applies as often as its function finds something in the facts.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from internvl.constants import HOW_TO_ENLARGE, SHARED_MEMORY_DIR
from internvl.versions import OLDEST_VERSIONS, OPTIONAL_PACKAGES, UNTESTED_VERSIONS, parse_release

from .host import FOLDERS, MIN_SHM_GIB, OUTPUT_FOLDER
from .libraries import PACKAGES

# First number of CUDA's version -> the oldest driver that runs it, from NVIDIA's table of CUDA compatibility.
OLDEST_DRIVERS = {"11": 450, "12": 525, "13": 580}
# Why OPTIONAL_PACKAGES has a lower bound.
COSTS_OF_OLD_PACKAGES = {
    "av": "17.0.0 crashes when it opens some videos",
    "deepspeed": "0.19.4 gives non-finite gradients with several ranks on CPUs",
    "pyarrow": "21.0.0 aborts the process at a memory limit",
}
MIN_BITSANDBYTES_ON_CPU = "0.49"
MIN_TORCH_VARLEN = "2.10"  # the first with `torch.nn.attention.varlen`
# It runs `bmm` of outer products, as in every rotary embedding, by Triton on a GPU, which compiles a C module first.
MIN_TORCH_TRITON = "2.14"
FLASH_PACKAGES = ("flash-attn", "flash-attn-3", "flash-attn-4")


@dataclass
class Facts:
    """What was found on a machine.

    Attributes:
        versions: distribution -> version, None if it is missing.
        imports: distribution -> {} or {"error": reason}.
        torch: of `describe_torch`, {} if torch cannot be imported.
        folders: a key of FOLDERS, or "output" and a number -> what `describe_folder` returns.
    """

    system: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    conflicts: list[str] = field(default_factory=list)
    imports: dict[str, dict] = field(default_factory=dict)
    torch: dict[str, Any] = field(default_factory=dict)
    driver: dict[str, Any] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    compilers: dict[str, Any] = field(default_factory=dict)
    folders: dict[str, dict] = field(default_factory=dict)
    launcher: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def is_usable(self, name: str) -> bool:
        """Return whether a library is installed and its import did not fail."""
        return bool(self.versions.get(name)) and "error" not in self.imports.get(name, {})

    def is_older(self, name: str, bound: str) -> bool | None:
        """Return whether a library has a version before `bound`; None if it is missing or its version is unknown."""
        from packaging.version import InvalidVersion  # here: it may be missing

        try:
            return parse_release(self.versions.get(name) or "") < parse_release(bound)
        except InvalidVersion:
            return None

    @property
    def gpus(self) -> list[dict]:
        """GPUs that torch finds."""
        return self.torch.get("gpus", [])


class Problem(NamedTuple):
    """A problem of this machine; its level is "error" if training could not work, else "warning"."""

    level: str
    found: str
    cost: str
    remedy: str


Values = Iterable[Mapping[str, Any]]


class KnownProblem(NamedTuple):
    """A row of the table.

    Attributes:
        find_fn: yields values for the texts, once for each place where the problem is found.
        found: format of what is found; so are the other texts.
    """

    level: str
    find_fn: Callable[[Facts], Values]
    found: str
    cost: str
    remedy: str


def find_problems(facts: Facts) -> list[Problem]:
    """Find the known problems of a machine, errors first."""
    problems = []
    for row in KNOWN_PROBLEMS:
        try:
            for values in row.find_fn(facts):
                problems.append(Problem(row.level, *(text.format(**values) for text in row[2:])))
        except ModuleNotFoundError:  # packaging, to compare versions; a row names it
            continue
    return sorted(problems, key=lambda problem: problem.level)


# -- libraries ---------------------------------------------------------------------------------------------------------


def find_missing_libraries(facts: Facts) -> Values:
    names = [name for name, found in facts.versions.items() if found is None and PACKAGES[name].extra == "required"]
    if names:
        yield {"names": ", ".join(names)}


def find_old_libraries(facts: Facts) -> Values:
    for name, oldest in OLDEST_VERSIONS.items():
        if facts.is_older(name, oldest):
            yield {"name": name, "found": facts.versions[name], "oldest": oldest}


def find_old_packages(facts: Facts) -> Values:
    for name, (_, oldest) in OPTIONAL_PACKAGES.items():
        if facts.is_older(name, oldest):
            cost = COSTS_OF_OLD_PACKAGES.get(name, "what uses it is an error")
            yield {"name": name, "found": facts.versions[name], "oldest": oldest, "cost": cost}


def find_untested_libraries(facts: Facts) -> Values:
    for name, bound in UNTESTED_VERSIONS.items():
        if facts.is_older(name, bound) is False:
            yield {"name": name, "found": facts.versions[name], "bound": bound}


def find_failed_imports(is_required: bool) -> Callable[[Facts], Values]:
    def find(facts: Facts) -> Values:
        for name, result in facts.imports.items():
            package = PACKAGES[name]
            if "error" in result and (package.extra == "required") == is_required:
                yield {"name": name, "found": facts.versions[name], "reason": result["error"], "cost": package.cost}

    return find


def find_small_bitsandbytes(facts: Facts) -> Values:
    if not facts.gpus and facts.is_older("bitsandbytes", MIN_BITSANDBYTES_ON_CPU):
        yield {"found": facts.versions["bitsandbytes"], "oldest": MIN_BITSANDBYTES_ON_CPU}


# -- GPUs --------------------------------------------------------------------------------------------------------------


def find_old_driver(facts: Facts) -> Values:
    oldest = OLDEST_DRIVERS.get((facts.torch.get("cuda") or "").split(".")[0], 0)
    driver = facts.driver.get("version", "")
    major = driver.split(".")[0]
    if major.isdecimal() and int(major) < oldest and not facts.gpus:  # a compatibility package makes up for it
        yield {"driver": driver, "cuda": facts.torch["cuda"], "oldest": oldest, "supported": facts.driver["cuda"]}


def find_hidden_gpus(facts: Facts) -> Values:
    if facts.torch.get("hidden_gpus") and not any(find_old_driver(facts)):
        yield {"reason": facts.torch["hidden_gpus"].rstrip(".")}


def find_cpu_build(facts: Facts) -> Values:
    if facts.driver.get("gpus") and facts.torch and not facts.torch["cuda"]:
        yield {"version": facts.torch["version"], "number": len(facts.driver["gpus"])}


def find_failing_gpus(facts: Facts) -> Values:
    for index, gpu in enumerate(facts.gpus):
        if "error" in gpu:
            yield {"index": index, "name": gpu["name"], "error": gpu["error"], "version": facts.torch["version"]}


def find_gpus_without_bf16(facts: Facts) -> Values:
    for index, gpu in enumerate(facts.gpus):
        if gpu["capability"] < [8, 0]:
            yield {"index": index, "name": gpu["name"], "capability": ".".join(map(str, gpu["capability"]))}


def find_slow_attention(facts: Facts) -> Values:
    if facts.gpus and facts.is_older("torch", MIN_TORCH_VARLEN) and not any(map(facts.is_usable, FLASH_PACKAGES)):
        yield {"version": facts.torch["version"], "oldest": MIN_TORCH_VARLEN}


# -- host and folders --------------------------------------------------------------------------------------------------


def find_small_shared_memory(facts: Facts) -> Values:
    required = MIN_SHM_GIB * max(1, len(facts.gpus))
    if (size := facts.host.get("dev_shm_gib", required)) < required:
        yield {"folder": SHARED_MEMORY_DIR, "size": size, "required": required, "remedy": HOW_TO_ENLARGE}


def list_missing(facts: Facts, *names: str) -> str:
    return " and ".join(name for name in names if facts.compilers.get(name) == "")


def find_missing_cpp_compiler(facts: Facts) -> Values:
    missing = list_missing(facts, "c++", "Python.h")
    op, cost = ("cpu_adam", "--deepspeed with offload") if facts.gpus else ("deepspeed_shm_comm", "--deepspeed")
    if missing and facts.is_usable("deepspeed") and op not in facts.imports.get("deepspeed", {}).get("built_ops", ()):
        yield {"missing": missing, "cost": cost}


def find_missing_c_compiler(is_called_by_torch: bool) -> Callable[[Facts], Values]:
    def find(facts: Facts) -> Values:
        missing = list_missing(facts, "cc", "Python.h")
        if missing and facts.gpus and (facts.is_older("torch", MIN_TORCH_TRITON) is False) == is_called_by_torch:
            yield {"missing": missing, "version": facts.torch["version"]}

    return find


def find_unusable_folders(is_required: bool) -> Callable[[Facts], Values]:
    def find(facts: Facts) -> Values:
        for purpose, found in facts.folders.items():
            folder = FOLDERS.get(purpose, OUTPUT_FOLDER)
            if found.get("obstacle") and folder.is_required == is_required:
                yield {"purpose": purpose, "reason": found["obstacle"], "cost": folder.cost, "remedy": folder.remedy}

    return find


def find_full_folders(facts: Facts) -> Values:
    for purpose, found in facts.folders.items():
        folder = FOLDERS.get(purpose, OUTPUT_FOLDER)
        if found.get("free_gib", folder.min_free_gib) < folder.min_free_gib:
            yield {"purpose": purpose, "remedy": folder.remedy, **found}


def find_invalid_variables(facts: Facts) -> Values:
    if facts.launcher.get("invalid"):
        yield {"reason": facts.launcher["invalid"].rstrip(".")}


KNOWN_PROBLEMS = (
    KnownProblem(
        "error",
        find_missing_libraries,
        "{names} not installed",
        "no program starts",
        "python3 -m pip install internvl_chat, or in a checkout: source shell/setup.sh",
    ),
    KnownProblem(
        "error",
        find_old_libraries,
        "{name} {found} is too old, required: >= {oldest}",
        "no program starts",
        "python3 -m pip install '{name}>={oldest}'",
    ),
    KnownProblem(
        "error",
        find_failed_imports(is_required=True),
        "{name} {found} cannot be imported: {reason}",
        "no program starts",
        "install it again, in a version for this torch and Python",
    ),
    KnownProblem(
        "error",
        find_old_driver,
        "driver {driver} is too old for CUDA {cuda} of torch",
        "training ends before its first step, since torch finds no GPU",
        "update the driver to >= {oldest}, or install a torch that was built for CUDA <= {supported}",
    ),
    KnownProblem(
        "error",
        find_hidden_gpus,
        "{reason}",
        "training ends before its first step",
        "start the container with its GPUs (docker run --gpus all, apptainer --nv); fit torch's CUDA to the driver",
    ),
    KnownProblem(
        "error",
        find_failing_gpus,
        "GPU {index} ({name}) cannot compute with torch {version}: {error}",
        "training ends at its first step",
        "free it, or install a torch that was built for this GPU; CUDA_VISIBLE_DEVICES leaves it out",
    ),
    KnownProblem(
        "error",
        find_unusable_folders(is_required=True),
        "folder for {purpose}: {reason}",
        "{cost}",
        "{remedy} to a writable folder",
    ),
    KnownProblem(
        "error",
        find_missing_c_compiler(is_called_by_torch=True),
        "{missing} missing, for Triton, which torch {version} calls on a GPU",
        "training ends at its first step: Failed to find C compiler",
        "apt-get install gcc python3-dev, or set TORCH_DISABLE_NATIVE_JIT=1",
    ),
    KnownProblem("error", find_invalid_variables, "{reason}", "training ends before its first step", "correct it"),
    KnownProblem(
        "warning",
        find_cpu_build,
        "torch {version} was built without CUDA, and this machine has {number} GPUs",
        "training runs on the CPU",
        "install a build with CUDA, see https://pytorch.org/get-started/locally",
    ),
    KnownProblem(
        "warning",
        find_old_packages,
        "{name} {found} is too old, required: >= {oldest}",
        "{cost}",
        "python3 -m pip install '{name}>={oldest}'",
    ),
    KnownProblem(
        "warning",
        find_failed_imports(is_required=False),
        "{name} {found} cannot be imported: {reason}",
        "{cost}",
        "install it again, in a version for this torch and CUDA, or uninstall it",
    ),
    KnownProblem(
        "warning",
        lambda facts: [{"conflict": conflict} for conflict in facts.conflicts],
        "{conflict}",
        "it may fail, or compute something else",
        "install versions that fit together",
    ),
    KnownProblem(
        "warning",
        find_untested_libraries,
        "{name} {found} is newer than the tests (< {bound})",
        "numbers may differ without an error",
        "compare losses and answers before relying on them",
    ),
    KnownProblem(
        "warning",
        find_small_bitsandbytes,
        "bitsandbytes {found} without a GPU",
        "--quantize_llm is an error",
        "python3 -m pip install 'bitsandbytes>={oldest}'",
    ),
    KnownProblem(
        "warning",
        find_gpus_without_bf16,
        "GPU {index} ({name}) has compute capability {capability}, and bf16 requires 8.0",
        "the recipes' --bf16 True is emulated and slow, and attention takes the documents of a row one by one",
        "measure it before a long run: gpu_check.py --only kernels,speed",
    ),
    KnownProblem(
        "warning",
        find_slow_attention,
        "torch {version} has no attention kernel for packed rows, and flash-attn is not usable",
        "attention takes the documents of a row one by one, slowly on Hopper GPUs",
        "python3 -m pip install 'torch>={oldest}'",
    ),
    KnownProblem(
        "warning",
        find_small_shared_memory,
        "{folder} has {size} GiB, expected >= {required:g}",
        "fewer dataloader workers start",
        "enlarge it ({remedy})",
    ),
    KnownProblem(
        "warning",
        find_missing_cpp_compiler,
        "{missing} missing, for the ops of DeepSpeed",
        "{cost} is an error",
        "apt-get install g++ python3-dev, or train without it (ZERO_CONFIG=none)",
    ),
    KnownProblem(
        "warning",
        find_missing_c_compiler(is_called_by_torch=False),
        "{missing} missing, for Triton",
        "--use_liger True and --compile True fail",
        "apt-get install gcc python3-dev",
    ),
    KnownProblem(
        "warning",
        find_unusable_folders(is_required=False),
        "folder for {purpose}: {reason}",
        "{cost}",
        "{remedy} to a writable folder",
    ),
    KnownProblem(
        "warning",
        find_full_folders,
        "folder for {purpose}, {path}: {free_gib} of {total_gib} GiB free",
        "it may be full before the end of a run",
        "free some space, or {remedy} to a folder on another disk",
    ),
)
