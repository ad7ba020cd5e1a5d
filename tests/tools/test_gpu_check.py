"""Self-check of a machine: each part on the CPU, failing checks, JSON, time limits."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
from helpers.paths import PACKAGE_DIR
from transformers.modeling_layers import GradientCheckpointingLayer

from internvl.tools.benchmark.sizes import MODEL_SIZES
from internvl.tools.gpu_check import PARTS, build_report, format_result, get_exit_status, main, run_part
from internvl.tools.machine_check.checks import SkippedCheck, run_checks
from internvl.tools.machine_check.machine import OperatorCounter, list_kernel_checks, list_version_checks
from internvl.tools.machine_check.models import build_row
from internvl.tools.machine_check.parity import (
    DOCUMENTS,
    ERROR_LIMITS,
    OBSERVED_DOCUMENT,
    PRECISIONS,
    build_sensitive_model,
    check_documents_apart,
    compare_with_reference,
    compute_outcome,
    list_parity_checks,
)
from internvl.tools.machine_check.speed import TILES, list_speed_checks
from internvl.tools.machine_check.training import LOSS_TOLERANCES, NUM_STEPS, list_training_checks

CPU = torch.device("cpu")
SIZE = MODEL_SIZES["test"]
LIGER_REASON = "--use_liger True requires a CUDA device"


def run(part: str, checks) -> dict:
    return {result.name: result for result in run_checks(part, checks)}


def read_statuses(results: dict) -> dict[str, str]:
    return {name: result.status for name, result in results.items()}


@pytest.fixture(scope="module")
def sensitive_model():
    model, row = build_sensitive_model(SIZE), build_row(SIZE, DOCUMENTS)
    return model, row, compute_outcome(model, row, CPU, "fp32")


# -- parts -------------------------------------------------------------------------------------------------------------


def test_versions():
    results = run("versions", list_version_checks(CPU))
    libraries = results["libraries"].values
    assert libraries["torch"] == torch.__version__ and libraries["python"] == sys.version.split()[0]
    assert {"transformers", "peft", "accelerate", "cuda"} <= libraries.keys()
    assert {"deepspeed", "triton", "flash-attn", "bitsandbytes"} <= results["optional packages"].values.keys()
    assert results["host"].values["cpu_cores"] == len(os.sched_getaffinity(0))
    assert results["GPUs"].status == "skipped" and "finds no CUDA device" in results["GPUs"].reason


def test_missing_compiler_is_a_failed_check(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = run("versions", list_version_checks(CPU))["compilers"]
    assert result.status == "failed" and result.reason.startswith("no C++ compiler (no-such-compiler)")


def test_kernels():
    results = run("kernels", list_kernel_checks(CPU))
    operators = results["operators of a step"].values
    assert operators["llm_implementation"] == "varlen_torch" and operators["documents"] == 3
    assert "attention" in operators["vision_encoder"] and "attention" in operators["llm"]
    assert "math" in results["attention of a tile"].values["usable"]
    assert "on this CPU" in results["precision"].values["peak"]
    assert results["fused AdamW"].status == "passed"
    assert results["Liger"].status == "skipped" and results["Liger"].reason.startswith(LIGER_REASON)


def test_operator_counter():
    with OperatorCounter() as counter:
        torch.ones(2, 2) @ torch.ones(2, 2) @ torch.ones(2, 2)
    assert counter.list_matching("^mm$") == "mm x 2" and counter.list_matching("attention") == "none"


def read_fp32_precision():
    if hasattr(torch.backends, "fp32_precision"):
        return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def test_parity():
    before = read_fp32_precision()
    results = run("parity", list_parity_checks(CPU))
    assert read_fp32_precision() == before, "TF32 is disabled only while results are compared"
    liger = [name for name in results if "Liger" in name]
    assert len(liger) == 2 and all(results[name].reason.startswith(LIGER_REASON) for name in liger)
    assert set(read_statuses({n: r for n, r in results.items() if n not in liger}).values()) == {"passed"}
    for llm in ("Qwen2", "InternLM2"):
        assert results[f"{llm}, fp32"].values == {"loss_error": 0.0, "gradient_error": 0.0}  # the reference itself
        for precision in ("autocast", "bf16"):
            errors = results[f"{llm}, {precision}"].values
            # The limit is three times what a CPU has, or more.
            assert 1e-3 < errors["gradient_error"] < ERROR_LIMITS[precision][1] / 3
            assert errors["loss_error"] < ERROR_LIMITS[precision][0] / 4


def test_speed():
    results = run("speed", list_speed_checks(CPU))
    assert [result.status for result in results.values()] == ["passed", "passed", "skipped"]
    for result in list(results.values())[:2]:
        values = result.values
        # 19 tiles of 4 tokens and 52 tokens of text
        assert values["tokens_per_second"] * values["step_seconds"] == pytest.approx(4 * sum(TILES) + 52, rel=0.01)
        low, high = map(float, values["range"].split(" - "))
        assert 0.99 * low <= values["step_seconds"] <= 1.01 * high
        assert 0 < values["mfu_percent"] < 100 and values["peak_memory_gib"] > 0


@pytest.mark.multiprocess
def test_training(tmp_path):
    results = run("training", list_training_checks(CPU, tmp_path, 200, ["without DeepSpeed", "ZeRO-3"]))
    assert set(read_statuses(results).values()) == {"passed"}, results
    assert len(results["without DeepSpeed"].values["losses"]) == NUM_STEPS
    assert results["ZeRO-3"].values["difference"] < LOSS_TOLERANCES["fp32"]
    # Vision encoder: 3 layers with 4 adapters; LLM: 2 layers with 7.
    assert results["adapters reopened"].values["ZeRO-3, vision_model"] == 12
    assert results["adapters reopened"].values["ZeRO-3, language_model"] == 14


# -- failing checks ----------------------------------------------------------------------------------------------------


def test_exceeded_limit_fails():
    limits = ERROR_LIMITS | {"bf16": (1e-7, 1e-7)}
    results = run("parity", list_parity_checks(CPU, limits))
    failed = [name for name, status in read_statuses(results).items() if status == "failed"]
    assert failed == ["Qwen2, bf16", "InternLM2, bf16"]
    line = format_result(results["Qwen2, bf16"])
    assert line.startswith("failed") and "exceeds the limit 1e-07" in line and "\n" not in line
    assert get_exit_status(list(results.values())) == 1
    assert build_report(list(results.values()))["status"] == "failed"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_limits_reveal_wrong_attention(sensitive_model, precision):
    """Scores that are 25 % too large are an error, rounding is none."""
    model, row, reference = sensitive_model

    def scale_scores(model):
        for layer in model.language_model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.self_attn.scaling *= 1.25

    compare_with_reference(reference, ERROR_LIMITS, model, row, CPU, precision)
    with pytest.raises(ValueError, match="exceeds the limit"):
        compare_with_reference(reference, ERROR_LIMITS, model, row, CPU, precision, scale_scores)


def test_leak_between_documents_is_found(sensitive_model):
    """A row whose second and third document are one in truth."""
    model, row, _ = sensitive_model
    start, middle, end = row["cu_seqlens"][OBSERVED_DOCUMENT - 1 : OBSERVED_DOCUMENT + 2]
    positions = row["position_ids"].clone()
    positions[0, start:end] = torch.arange(end - start)
    assert check_documents_apart(model, row, CPU)["documents"] == len(DOCUMENTS)
    with pytest.raises(ValueError, match=f"depends on {middle - start} tokens of other documents"):
        check_documents_apart(model, row | {"position_ids": positions}, CPU)


def test_error_of_a_check_does_not_end_the_others():
    def fail():
        raise RuntimeError("CUDA error: no kernel image\nCompile with TORCH_USE_CUDA_DSA")

    def skip():
        raise SkippedCheck("bitsandbytes is not installed")

    def list_checks():
        yield "first", fail
        yield "second", skip
        yield "third", lambda: {"x": 1}
        raise MemoryError

    results = run("parity", list_checks())
    assert read_statuses(results) == {"first": "failed", "second": "skipped", "third": "passed", "parity": "failed"}
    assert results["first"].reason.startswith("RuntimeError: CUDA error: no kernel image (test_gpu_check.py:")
    assert results["parity"].reason.startswith("MemoryError: no message")


@pytest.mark.multiprocess
def test_failed_training_has_the_last_line_of_its_output(tmp_path):
    checks = list_training_checks(CPU, tmp_path, 200, ["without DeepSpeed"])
    name, check_fn = next(checks)
    (tmp_path / "meta.json").write_text("{}")
    results = run("training", iter([(name, check_fn), next(checks)]))
    assert results[name].status == "failed" and "the run ended with status 1: error: " in results[name].reason
    assert results["adapters reopened"].reason == "no run has finished"


@pytest.mark.multiprocess
def test_training_that_hangs_is_killed(tmp_path):
    [result, _] = run("training", list_training_checks(CPU, tmp_path, 0.5, ["without DeepSpeed"])).values()
    assert result.status == "failed" and result.reason == "the run has not ended within 0.5 s" and result.seconds < 10


@pytest.mark.multiprocess
def test_interrupted_training_ends(tmp_path):
    folder = tmp_path / "tmp"
    folder.mkdir()
    program = [sys.executable, PACKAGE_DIR / "tools/gpu_check.py", "--only", "training"]
    env = os.environ | {"PYTHONPATH": str(PACKAGE_DIR), "TMPDIR": str(folder)}
    check = subprocess.Popen(program, env=env, stdout=subprocess.DEVNULL)
    runs = wait_for(lambda: [run for run in psutil.process_iter() if is_training_below(run, folder)])
    check.terminate()
    assert check.wait(timeout=60) == 128 + signal.SIGTERM
    psutil.wait_procs(runs, timeout=20)
    assert not any(run.is_running() for run in runs) and not list(folder.iterdir())


def is_training_below(process: psutil.Process, folder: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return any("finetune.py" in word for word in words) and any(str(folder) in word for word in words)
    return False


def wait_for(find, seconds: float = 120):
    """Call `find` until it returns something."""
    end = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


# -- program -----------------------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
def test_program(tmp_path):
    """Table, JSON, exit status; no temporary files are left."""
    output, folder = tmp_path / "results.json", tmp_path / "tmp"
    folder.mkdir()
    program = [sys.executable, PACKAGE_DIR / "tools/gpu_check.py", "--only", "versions, parity", "--output", output]
    env = os.environ | {"PYTHONPATH": str(PACKAGE_DIR), "TMPDIR": str(folder)}
    done = subprocess.run(program, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *lines, summary = done.stdout.splitlines()
    assert first == "No CUDA device: tiny checks on the CPU."
    report = json.loads(output.read_text())
    assert report.keys() == {"schema", "device", "status", "seconds", "checks"}
    assert report["schema"] == 1 and report["device"] == "cpu" and report["status"] == "passed"
    assert len(report["checks"]) == len(lines)
    for check, line in zip(report["checks"], lines, strict=True):
        assert check.keys() == {"part", "name", "status", "values", "reason", "seconds"}
        assert line.startswith(check["status"]) and check["name"] in line and check["reason"] in line
    counts = [
        sum(check["status"] == status for check in report["checks"]) for status in ("passed", "failed", "skipped")
    ]
    assert summary == "{} passed, {} failed, {} skipped".format(*counts)
    assert not done.stderr and not list(folder.iterdir())


@pytest.mark.multiprocess
def test_time_limit_is_a_failed_check(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        main(["--only", "speed", "--timeout", "0.5"])
    assert stopped.value.code == 1 and "no further result within 0.5 s" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.multiprocess
def test_process_that_ends_early_is_a_failed_check(tmp_path):
    """The folder for its log is missing."""
    [result] = run_part("versions", tmp_path / "missing", 60)
    assert result.status == "failed" and result.reason.startswith("the process ended with status 1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "speed,fast"], "--only fast is invalid: expected some of versions, kernels, parity"),
        (["--only", ","], r"--only \(nothing\) is invalid"),
        (["--timeout", "0"], "--timeout 0 is invalid"),
        (["--timeout", "nan"], "--timeout nan is invalid"),
        (["--timeout", "inf"], "--timeout inf is invalid"),
        (["--output", "/no/such/folder/x.json"], "--output /no/such/folder/x.json is invalid"),
        (["--output", __file__], "is invalid: expected a new file"),
    ],
)
def test_invalid_flags(flags, message):
    with pytest.raises(SystemExit, match=message):
        main(flags)


def test_every_part_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"    {part} " in printed for part in PARTS)
