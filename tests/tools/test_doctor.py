"""The page about a machine: facts, known problems, missing and broken libraries, nothing secret."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest requires it

import packaging
import pytest
from helpers.paths import PACKAGE_DIR, REPO_ROOT

from internvl.model.internvl_chat.decoder import FLASH_VERSIONS
from internvl.tools import doctor
from internvl.tools.machine_check import libraries
from internvl.tools.machine_check.gpus import count_links, describe_driver
from internvl.tools.machine_check.host import (
    FOLDERS,
    OUTPUT_FOLDER,
    SHOWN_VARIABLES,
    describe_compilers,
    describe_environment,
    describe_folder,
    describe_launcher,
)
from internvl.tools.machine_check.known_problems import KNOWN_PROBLEMS, Facts, find_problems
from internvl.tools.machine_check.libraries import PACKAGES, import_libraries, list_conflicts
from internvl.versions import OLDEST_VERSIONS, OPTIONAL_PACKAGES

REQUIRED = [name for name, package in PACKAGES.items() if package.extra == "required"]
SECTIONS = ("Versions", "GPUs", "Host", "Folders", "Extras", "Known problems")
SECRET = "hunter2"
SECRET_VARIABLES = (
    "HF_TOKEN",
    "WANDB_API_KEY",
    "OPENAI_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "HTTPS_PROXY",
    "MY_PASSWORD",
)


def write_metadata(folder: Path, name: str, number: str, *lines: str) -> None:
    """Write the metadata of a distribution, which those of installed ones come after."""
    info = folder / f"{name}-{number}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {number}", *lines]))


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
def test_page_of_this_machine(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--json", str(tmp_path)])
    report = json.loads(capsys.readouterr().out)
    assert report.pop("schema") == 1 and report.pop("internvl") == doctor.internvl.__version__
    assert report.pop("status") == "passed" and stopped.value.code == 0
    problems = report.pop("problems")
    facts = Facts(**report)
    assert [problem._asdict() for problem in find_problems(facts)] == problems
    assert {name: facts.versions[name] for name in REQUIRED} == {name: version(name) for name in REQUIRED}
    assert facts.imports.keys() == {name for name, found in facts.versions.items() if found and PACKAGES[name].module}
    assert not [result for result in facts.imports.values() if "error" in result]
    assert facts.imports["deepspeed"].keys() == {"built_ops"}
    assert facts.torch["gpus"] == [] and facts.torch["version"].startswith(version("torch"))
    assert not facts.torch["cuda"] or re.fullmatch(r"\d+\.\d+\.\d+", facts.torch["nccl"])
    assert facts.folders[f"output {tmp_path}"]["obstacle"] == "" and facts.folders.keys() > FOLDERS.keys()

    page = doctor.format_page(facts, find_problems(facts))
    assert [line for line in page.splitlines() if line and not line.startswith(" ")] == list(SECTIONS)
    assert len(page.splitlines()) < 80
    assert all(f"{name} {version(name)}" in " ".join(page.split()) for name in REQUIRED)


@pytest.mark.multiprocess
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_without_any_library_the_page_says_so_and_shows_no_secret(flags, tmp_path):
    """`-S`: Python without its site-packages. Home, here with a name, is `~`."""
    env = {
        "PYTHONPATH": str(PACKAGE_DIR),
        "HOME": f"{tmp_path}/jane",
        "PATH": "/usr/bin:/bin",
        "HF_HOME": f"{tmp_path}/jane/hf",
    }
    env |= dict.fromkeys(SECRET_VARIABLES, SECRET)
    command = [sys.executable, "-S", str(PACKAGE_DIR / "tools/doctor.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 1 and not done.stderr
    assert SECRET not in done.stdout and "jane" not in done.stdout and "~/hf/hub" in done.stdout
    if flags:
        report = json.loads(done.stdout)
        assert report["status"] == "failed" and report["torch"] == {} and set(report["versions"].values()) == {None}
        (error,) = [problem["found"] for problem in report["problems"] if problem["level"] == "error"]
        assert error == f"{', '.join(REQUIRED)} not installed"
    else:
        assert "missing av: data sets with videos are errors" in done.stdout


@pytest.mark.multiprocess
def test_a_library_that_is_too_old_does_not_end_the_doctor(tmp_path):
    write_metadata(tmp_path, "transformers", "4.57.6")
    write_metadata(tmp_path, "packaging", packaging.__version__)
    (tmp_path / "packaging").symlink_to(Path(packaging.__file__).parent)
    program = tmp_path / "internvl"  # as pip writes it for an entry point
    program.write_text(
        "import sys\nfrom internvl.__main__ import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
    )
    env = {"PYTHONPATH": f"{PACKAGE_DIR}:{tmp_path}", "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-S", program, "doctor"], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and not done.stderr
    page = " ".join(done.stdout.split())
    assert "error transformers 4.57.6 is too old, required: >= 5.8 cost no program starts remedy" in page
    assert "error transformers 4.57.6 cannot be imported: ModuleNotFoundError: No module named 'transformers'" in page


# -- libraries ---------------------------------------------------------------------------------------------------------


def get_name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0]


def test_every_library_of_pyproject_has_a_cost():
    project = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())["project"]
    groups = {extra: set(map(get_name, lines)) for extra, lines in project["optional-dependencies"].items()}
    groups["required"] = set(map(get_name, project["dependencies"]))
    for extra, names in groups.items():
        listed = {name for name, package in PACKAGES.items() if package.extra == extra}
        if extra in ("docs", "notebook", "dev"):  # a sign of each is enough
            assert listed and listed <= names
        elif extra != "all":
            assert listed == names, extra
    assert {package.extra for package in PACKAGES.values()} == groups.keys() - {"all"} | {"other"}
    assert all(package.cost for package in PACKAGES.values())


def test_the_table_agrees_with_those_of_the_package():
    assert set(OLDEST_VERSIONS) <= set(REQUIRED) and set(OPTIONAL_PACKAGES) <= set(PACKAGES)
    assert {flash.package: flash.module for flash in FLASH_VERSIONS.values()} == {
        name: package.module for name, package in PACKAGES.items() if name.startswith("flash-attn")
    }


@pytest.mark.multiprocess
def test_an_import_that_fails_crashes_or_hangs_ends_no_other(tmp_path, monkeypatch):
    (tmp_path / "liger_kernel.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    (tmp_path / "flash_attn.py").write_text("import os; os.abort()")
    (tmp_path / "pillow_heif.py").write_text("import time; time.sleep(600)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(libraries, "IMPORT_TIMEOUT", 20)
    results = import_libraries(["liger-kernel", "flash-attn", "safetensors", "pillow-heif"])
    assert results["liger-kernel"]["error"].startswith("OSError: libcuda.so.1: cannot open shared object file (liger_")
    assert results["flash-attn"] == {"error": "ended the process with status -6"}
    assert results["safetensors"] == {}
    assert results["pillow-heif"] == {"error": "did not return within 20 s"}


def test_conflicting_versions_are_found_by_metadata(tmp_path, monkeypatch):
    assert list_conflicts() == []
    write_metadata(tmp_path, "timm", "1.0.9", "Requires-Dist: numpy<1", "Requires-Dist: pillow<1; extra == 'old'")
    monkeypatch.syspath_prepend(tmp_path)
    assert list_conflicts() == [f"timm 1.0.9 requires numpy <1, got {version('numpy')}"]


# -- GPUs, host and folders --------------------------------------------------------------------------------------------

# As nvidia-smi prints them for two GPUs.
NVIDIA_SMI = r"""#!/bin/sh
case "$*" in
  --query-gpu*) printf '580.95.05, NVIDIA H200, 143771 MiB, %s\n' '143131 MiB' '120 MiB' ;;
  topo*) printf '\033[4m\tGPU0\tGPU1\tNIC0\tCPU Affinity\033[0m\n'
         printf 'GPU0\t X \tNV18\tPIX\t0-15\nGPU1\tNV18\t X \tSYS\t0-15\nNIC0\tPIX\tSYS\t X \n' ;;
  *) printf '| NVIDIA-SMI 580.95.05   Driver Version: 580.95.05   CUDA Version: 13.0  |\n' ;;
esac
"""


def test_driver_and_links(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    driver = describe_driver()
    assert driver["version"] == "580.95.05" and driver["cuda"] == "13.0" and driver["links"] == {"NV18": 1}
    lines = doctor.list_gpu_lines(Facts(driver=driver))  # where torch is missing
    assert lines["GPU 1"] == "NVIDIA H200, 143771 MiB, 120 MiB" and lines["driver"] == "580.95.05, up to CUDA 13.0"
    gpu = {"name": "NVIDIA H200", "capability": [9, 0], "free_gib": 139.0, "total_gib": 139.8}
    torch = {
        "version": "2.14.1",
        "cuda": "13.0",
        "gpus": [gpu, gpu],
        "gpu_pairs": 1,
        "peer_access_pairs": 1,
        "nccl": "2.30.7",
    }
    lines = doctor.list_gpu_lines(Facts(driver=driver, torch=torch))
    assert lines["torch"] == "CUDA 13.0, NCCL 2.30.7"
    assert lines["GPU 0"] == "NVIDIA H200, compute capability 9.0, 139.0 of 139.8 GiB free"
    assert lines["links"] == "peer access between 1 of 1 pairs; links: NV18 x 1"


@pytest.mark.parametrize("script", ["exit 9", "echo No devices were found", "echo '[N/A]'"])
def test_a_driver_that_fails_is_none(script, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert describe_driver() == {} and count_links("") == {}


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    found = describe_folder(OUTPUT_FOLDER._replace(find=lambda env: tmp_path / "file/run"))
    assert found["obstacle"] == f"{tmp_path}/file cannot be written (Not a directory)"
    found = describe_folder(OUTPUT_FOLDER._replace(find=lambda env: tmp_path / "new/run"))
    assert found["obstacle"] == "" and 0 < found["free_gib"] < found["total_gib"] and not (tmp_path / "new").exists()
    monkeypatch.setenv("INTERNVL_CACHE", f"{tmp_path}/cache")
    assert describe_folder(FOLDERS["sample lengths"])["path"] == f"{tmp_path}/cache"
    for name in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/xdg")
    assert describe_folder(FOLDERS["hub models"])["path"] == f"{tmp_path}/xdg/huggingface/hub"


def test_compilers_and_variables(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert describe_compilers()["c++"] == ""
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("OMP_NUM_THREADS", "all")
    assert describe_launcher()["SLURM"].endswith(", in job 123")
    assert describe_launcher()["invalid"].startswith("OMP_NUM_THREADS='all' is invalid")
    assert describe_environment()["OMP_NUM_THREADS"] == "all"
    assert not {"TOKEN", "KEY", "PASSWORD", "SECRET", "PROXY", "ADDR"} & set("_".join(SHOWN_VARIABLES).split("_"))


# -- known problems ----------------------------------------------------------------------------------------------------

H200 = {"name": "NVIDIA H200", "capability": [9, 0], "free_gib": 139.0, "total_gib": 139.8}
TORCH = {"version": "2.14.1+cu130", "cuda": "13.0", "gpus": [H200]}
TORCH_WITHOUT_GPU = TORCH | {"gpus": []}
VERSIONS = {"torch": "2.14.1", "transformers": "5.24.0", "deepspeed": "0.19.8"}
COMPILERS = {"c++": "g++ 12", "cc": "gcc 12", "Python.h": "/usr/include/Python.h", "nvcc": ""}
FOLDER = {"path": "/disk", "obstacle": "", "free_gib": 100.0, "total_gib": 200.0}
HEALTHY = {
    "versions": VERSIONS,
    "torch": TORCH,
    "driver": {"version": "580.95.05", "cuda": "13.0", "gpus": [{}]},
    "host": {"dev_shm_gib": 64.0},
    "compilers": COMPILERS,
    "folders": dict.fromkeys((*FOLDERS, "output ."), FOLDER),
}
OLD_DRIVER = {"version": "535.1", "cuda": "12.2", "gpus": [{}]}
# What differs from a healthy machine, and the beginnings of what is found and of its cost.
PROBLEM_CASES = [
    ({"versions": VERSIONS | {"torch": None, "timm": None}}, "error", "torch, timm not installed", "no program"),
    (
        {"versions": VERSIONS | {"transformers": "5.7.9"}},
        "error",
        "transformers 5.7.9 is too old, required: >= 5.8",
        "no",
    ),
    (
        {"imports": {"torch": {"error": "OSError: x"}}},
        "error",
        "torch 2.14.1 cannot be imported: OSError: x",
        "no program",
    ),
    (
        {"driver": OLD_DRIVER, "torch": TORCH_WITHOUT_GPU},
        "error",
        "driver 535.1 is too old for CUDA 13.0",
        "training ends",
    ),
    (
        {"torch": TORCH_WITHOUT_GPU | {"hidden_gpus": "CUDA finds no GPU."}},
        "error",
        "CUDA finds no GPU",
        "training ends",
    ),
    (
        {"torch": TORCH | {"gpus": [H200 | {"error": "no kernel image"}]}},
        "error",
        "GPU 0 (NVIDIA H200) cannot",
        "training",
    ),
    (
        {"folders": {"temporary": FOLDER | {"obstacle": "/tmp is full"}}},
        "error",
        "folder for temporary: /tmp is",
        "dataloader",
    ),
    (
        {"folders": {"output x": FOLDER | {"obstacle": "x is"}}},
        "error",
        "folder for output x: x is",
        "checkpoints cannot",
    ),
    (
        {"launcher": {"invalid": "OMP_NUM_THREADS='all' is invalid."}},
        "error",
        "OMP_NUM_THREADS='all' is inv",
        "training",
    ),
    ({"compilers": COMPILERS | {"cc": ""}}, "error", "cc missing, for Triton, which torch 2.14.1", "training ends"),
    (
        {"torch": {"version": "2.14.1+cpu", "cuda": None, "gpus": []}},
        "warning",
        "torch 2.14.1+cpu was built",
        "training runs",
    ),
    ({"versions": VERSIONS | {"av": "17.0.0"}}, "warning", "av 17.0.0 is too old, required: >= 17.1", "17.0.0 crashes"),
    (
        {"versions": VERSIONS | {"matplotlib": "3.7"}},
        "warning",
        "matplotlib 3.7 is too old",
        "what uses it is an error",
    ),
    (
        {"versions": VERSIONS | {"flash-attn": "2.8"}, "imports": {"flash-attn": {"error": "undefined symbol"}}},
        *("warning", "flash-attn 2.8 cannot be imported: undefined symbol", "torch's own kernels are used"),
    ),
    (
        {"conflicts": ["torchvision 0.20 requires torch ==2.5, got 2.14"]},
        "warning",
        "torchvision 0.20 requires",
        "it may fail",
    ),
    (
        {"versions": VERSIONS | {"transformers": "6.0"}},
        "warning",
        "transformers 6.0 is newer than the tests",
        "numbers may",
    ),
    (
        {"versions": VERSIONS | {"bitsandbytes": "0.48"}, "torch": TORCH_WITHOUT_GPU},
        *("warning", "bitsandbytes 0.48 without a GPU", "--quantize_llm is an error"),
    ),
    (
        {"torch": TORCH | {"gpus": [H200 | {"capability": [7, 5]}]}},
        "warning",
        "GPU 0 (NVIDIA H200) has comp",
        "the recipes'",
    ),
    (
        {"versions": VERSIONS | {"torch": "2.9.1"}, "torch": TORCH | {"version": "2.9.1"}},
        *("warning", "torch 2.9.1 has no attention kernel for packed rows", "attention takes"),
    ),
    ({"host": {"dev_shm_gib": 0.06}}, "warning", "/dev/shm has 0.06 GiB, expected >= 1", "fewer dataloader workers"),
    (
        {"compilers": COMPILERS | {"c++": ""}},
        "warning",
        "c++ missing, for the ops of DeepSpeed",
        "--deepspeed with offload",
    ),
    (
        {"compilers": COMPILERS | {"c++": "", "Python.h": ""}, "torch": TORCH_WITHOUT_GPU},
        *("warning", "c++ and Python.h missing, for the ops of DeepSpeed", "--deepspeed is an error"),
    ),
    (
        {"compilers": COMPILERS | {"cc": ""}, "versions": VERSIONS | {"torch": "2.11"}},
        *("warning", "cc missing, for Triton", "--use_liger True and --compile True fail"),
    ),
    ({"folders": {"hub models": FOLDER | {"obstacle": "x"}}}, "warning", "folder for hub models: x", "models cannot"),
    (
        {"folders": {"output .": FOLDER | {"free_gib": 0.5}}},
        "warning",
        "folder for output ., /disk: 0.5 of 200.0 GiB",
        "it may",
    ),
]


@pytest.mark.parametrize(("changes", "level", "found", "cost"), PROBLEM_CASES, ids=[case[2] for case in PROBLEM_CASES])
def test_known_problem(changes, level, found, cost):
    (problem,) = find_problems(Facts(**HEALTHY | changes))
    assert problem.level == level and problem.found.startswith(found) and problem.cost.startswith(cost)
    assert problem.remedy and "{" not in "".join(problem)


def test_pre_releases_count_as_their_release():
    """As where training starts: NVIDIA's containers have such versions of torch."""
    facts = Facts(**HEALTHY | {"versions": VERSIONS | {"torch": "2.6.0a0+df5bbc09d1.nv24.12"}})
    assert facts.is_older("torch", "2.6") is False and facts.is_older("torch", "2.7") is True


def test_every_row_of_the_table_has_a_case_and_a_healthy_machine_none():
    assert not find_problems(Facts(**HEALTHY))
    for row in KNOWN_PROBLEMS:
        assert any(any(row.find_fn(Facts(**HEALTHY | changes))) for changes, *_ in PROBLEM_CASES), row.found


def test_ops_that_were_built_need_no_compiler():
    imports = {"deepspeed": {"built_ops": ["cpu_adam", "deepspeed_shm_comm"]}}
    for torch in (TORCH, TORCH_WITHOUT_GPU):
        changes = {"compilers": COMPILERS | {"c++": ""}, "imports": imports, "torch": torch}
        assert not find_problems(Facts(**HEALTHY | changes))


def test_a_version_that_cannot_be_compared_is_no_problem():
    assert not find_problems(Facts(**HEALTHY | {"versions": VERSIONS | {"av": "unknown", "peft": "main"}}))


def test_errors_come_first_and_are_counted():
    unusable = dict.fromkeys(FOLDERS, FOLDER | {"obstacle": "read-only"})
    problems = find_problems(Facts(**HEALTHY | {"folders": unusable}))
    assert [problem.level for problem in problems] == ["error"] * 2 + ["warning"] * 3
    assert {problem.found for problem in problems} == {f"folder for {name}: read-only" for name in FOLDERS}
    facts = Facts(**HEALTHY | {"host": {"dev_shm_gib": 0.06}, "launcher": {"invalid": "X is invalid."}})
    facts.versions = dict.fromkeys(PACKAGES) | VERSIONS
    page = doctor.format_page(facts, find_problems(facts)).splitlines()
    assert page[-1] == "  Errors: 2, warnings: 1."
    levels = [
        line.split()[0] for line in page[page.index("Known problems") :] if line.startswith(("  error", "  warn"))
    ]
    assert levels == ["error", "error", "warning"]


def test_a_part_that_fails_is_one_line():
    assert doctor.collect(lambda: {}["x"])["error"].startswith("KeyError: 'x' (test_doctor.py:")


def test_help_names_the_command(capsys):
    with pytest.raises(SystemExit):
        doctor.main(["--help"])
    assert "internvl doctor [--json] [FOLDER ...]" in capsys.readouterr().out
