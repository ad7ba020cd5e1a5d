"""DeepSpeed configurations: what is read, and what is refused before a model is loaded."""

import json
import os

import pytest
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.git_version_info import installed_ops

from internvl.arguments.deepspeed_config import MAX_CONFIG_BYTES, ZERO_CONFIG_DIR, limit_reduce_bucket
from internvl.arguments.training import parse_args
from internvl.arguments.validate import list_ops_to_compile

ZERO_2 = json.loads((ZERO_CONFIG_DIR / "zero_stage2_config.json").read_text())


def parse(tmp_path, source: str, *flags: str):
    return parse_args(["--output_dir", str(tmp_path), "--bf16", "True", "--deepspeed", source, *flags])[2]


def refuse(tmp_path, source: str, *flags: str) -> str:
    """Check that a configuration is refused in one line; return it."""
    with pytest.raises(ValueError) as error:
        parse(tmp_path, source, *flags)
    assert "\n" not in str(error.value) and str(error.value).endswith(".") and len(str(error.value)) < 1000
    return str(error.value)


def adamw(**params) -> dict:
    return {"optimizer": {"type": "AdamW", "params": params}}


def zero(stage, **settings) -> dict:
    return {"zero_optimization": {"stage": stage, **settings}}


# What differs from a valid configuration -> message after the name of the file
INVALID_VALUES = {
    "stage 4": (zero(4), "zero_optimization.stage 4 is invalid: expected 0, 1, 2 or 3."),
    "stage as text": (zero("2"), "zero_optimization.stage '2' is invalid: expected 0, 1, 2 or 3."),
    "stage as boolean": (zero(True), "zero_optimization.stage True is invalid"),
    "no object": ({"zero_optimization": [2]}, "zero_optimization [2] is invalid: expected a JSON object."),
    "unknown key": ({"zero_optimisation": {}}, "'zero_optimisation' is not supported: expected keys among"),
    "unknown key of a block": (zero(2, foo=1), "zero_optimization.foo 1 is invalid: Extra inputs are not permitted."),
    "unknown key of fp16": ({"fp16": {"loss_scal": 0}}, "fp16.loss_scal 0 is invalid: Extra inputs"),
    "negative bucket": (zero(2, reduce_bucket_size=-1), "zero_optimization.reduce_bucket_size -1 is invalid"),
    "fp16": ({"fp16": {"enabled": True}}, 'fp16.enabled true contradicts --fp16 False: set it to "auto".'),
    "bf16": ({"bf16": {"enabled": False}}, 'bf16.enabled false contradicts --bf16 True: set it to "auto".'),
    "batch size": (
        {"train_batch_size": 64},
        "train_batch_size 64 contradicts --per_device_train_batch_size 8 x --gradient_accumulation_steps 1 x 1 ranks",
    ),
    "micro-batch": ({"train_micro_batch_size_per_gpu": 3}, "train_micro_batch_size_per_gpu 3 contradicts --per_device"),
    "accumulation": (
        {"gradient_accumulation_steps": "2"},
        'gradient_accumulation_steps "2" contradicts --gradient_acc',
    ),
    "clipping": ({"gradient_clipping": 0.3}, "gradient_clipping 0.3 contradicts --max_grad_norm 1.0"),
    "scheduler": ({"scheduler": {"type": "WarmupLR"}}, "scheduler is not supported: use --lr_scheduler_type"),
    "apex": ({"amp": {"enabled": True}}, "amp is not supported: use --bf16 True."),
    "profiler": ({"flops_profiler": {"enabled": True}}, "flops_profiler is not supported: the log has tflops"),
    "autocast": ({"torch_autocast": {"enabled": True}}, "torch_autocast is not supported: use --bf16 True --lora_fp32"),
    "elasticity": ({"elasticity": {}}, "elasticity is not supported: the flags set the batch size."),
    "other optimizer": ({"optimizer": {"type": "Lamb"}}, "optimizer Lamb is not supported: expected AdamW."),
    "other rate": (adamw(lr=0.5), "optimizer lr 0.5 contradicts the command line, which has 5e-05."),
    "unknown parameter": (adamw(foo=1), "optimizer 'foo' is not supported: expected lr, betas"),
    "wandb": ({"wandb": {"enabled": True}}, "wandb requires the package wandb: install it, or remove the block."),
    "comet": ({"comet": {"enabled": True}}, "comet requires the package comet_ml: install it, or remove the block."),
    "monitor as text": ({"wandb": "x"}, "wandb 'x' is invalid: expected a JSON object."),
    "nvme without folder": (
        zero(3, offload_optimizer={"device": "nvme"}),
        "zero_optimization.offload_optimizer.nvme_path None is invalid: expected a folder.",
    ),
    "nvme below stage 3": (
        zero(2, offload_optimizer={"device": "nvme", "nvme_path": "/"}),
        "zero_optimization.offload_optimizer to nvme requires stage >= 3, got 2.",
    ),
    "offloaded weights below stage 3": (
        zero(2, offload_param={"device": "cpu"}),
        "zero_optimization.offload_param to cpu requires stage >= 3, got 2.",
    ),
    "unknown device": (zero(3, offload_param={"device": "disk"}), "zero_optimization.offload_param.device 'disk' is"),
    "number as text": ({"steps_per_print": "x"}, "steps_per_print 'x' is invalid: expected a number."),
    "switch as text": ({"wall_clock_breakdown": "x"}, "wall_clock_breakdown 'x' is invalid: expected true or false."),
    "invalid tag check": ({"checkpoint": {"tag_validation": "X"}}, "is invalid: Checkpoint config contains invalid"),
}


@pytest.mark.parametrize(("change", "message"), INVALID_VALUES.values(), ids=INVALID_VALUES)
def test_invalid_value_is_refused_with_file_and_key(change, message, tmp_path):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(ZERO_2 | change))
    assert message in refuse(tmp_path, str(file))
    assert refuse(tmp_path, str(file)).startswith(f"--deepspeed {file}")
    assert message in refuse(tmp_path, json.dumps(ZERO_2 | change)), "inline"


INVALID_FILES = {
    "list": (b"[1]", "is invalid: expected a JSON object, got [1]."),
    "comment": (b'{// c\n "bf16": {}}', "is not valid JSON: Expecting property name"),
    "empty": (b"", "is not valid JSON: Expecting value"),
    "NaN": (b'{"gradient_clipping": NaN}', "is not valid JSON: NaN is not a number."),
    "infinity": (b'{"gradient_clipping": -Infinity}', "is not valid JSON: -Infinity is not a number."),
    "nested deeply": (b'{"a":' * 100_000, "is not valid JSON: it is nested too deeply."),
    "key twice": (b'{"bf16": {}, "bf16": {}}', "is not valid JSON: the key 'bf16' occurs twice."),
    "not UTF-8": (b'{"a": "\xff"}', "cannot be read: 'utf-8' codec can't decode"),
    "too large": (b"{" + b" " * MAX_CONFIG_BYTES + b"}", "is invalid: expected at most 1,048,576 bytes, got"),
}


@pytest.mark.parametrize(("content", "message"), INVALID_FILES.values(), ids=INVALID_FILES)
def test_invalid_file_is_refused(content, message, tmp_path):
    (tmp_path / "zero.json").write_bytes(content)
    assert refuse(tmp_path, str(tmp_path / "zero.json")).startswith(f"--deepspeed {tmp_path / 'zero.json'} {message}")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, tmp_path / "none", "/dev/zero", "x" * 5000):
        assert ": no such file; expected a path, or one of zero_stage1_config.json" in refuse(tmp_path, str(path))


def test_values_of_the_flags_act(tmp_path):
    """Also where the file has no such key: DeepSpeed would not clip gradients, and train in fp32."""
    flags = "--max_grad_norm 0.3 --per_device_train_batch_size 2 --gradient_accumulation_steps 3".split()
    for content in ({}, ZERO_2, ZERO_2 | {"gradient_clipping": 0.3, "train_batch_size": 6, "bf16": {"enabled": True}}):
        config = parse(tmp_path, json.dumps(content), *flags).hf_deepspeed_config.config
        assert (config["gradient_clipping"], config["train_batch_size"]) == (0.3, 6)
        assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (True, False)
        assert config["zero_optimization"]["stage"] == (2 if content else 0)


def test_forms_of_a_configuration(tmp_path):
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(ZERO_2).encode())
    (tmp_path / "args.json").write_text(json.dumps({"output_dir": str(tmp_path), "bf16": True, "deepspeed": ZERO_2}))
    from_arguments = parse_args([str(tmp_path / "args.json")])[2]
    forms = [parse(tmp_path, source) for source in (str(tmp_path / "bom.json"), json.dumps(ZERO_2))]
    for args in (*forms, from_arguments):
        assert args.deepspeed == parse(tmp_path, "zero_stage2_config.json").deepspeed


def test_parameters_of_adamw(tmp_path):
    parse(tmp_path, json.dumps(ZERO_2 | adamw(lr="auto", betas=[0.9, 0.999], torch_adam=True, adam_w_mode=True)))
    betas = ZERO_2 | adamw(betas=[0.9, 0.5])
    assert "optimizer betas [0.9, 0.5] contradicts" in refuse(tmp_path, json.dumps(betas))
    parse(tmp_path, json.dumps(betas), "--optim", "sgd")  # the block is not used


def test_disabled_blocks_are_dropped(tmp_path):
    blocks = {key: {"enabled": False} for key in ("amp", "elasticity", "flops_profiler", "curriculum_learning")}
    assert parse(tmp_path, json.dumps(ZERO_2 | blocks)).deepspeed == parse(tmp_path, json.dumps(ZERO_2)).deepspeed


def test_fp16_without_support_of_the_device(tmp_path):
    if get_accelerator().is_fp16_supported():
        pytest.skip("the device supports fp16")
    message = refuse(tmp_path, "zero_stage2_config.json", "--bf16", "False", "--fp16", "True")
    assert message == "--fp16 True is not supported with --deepspeed on this device: use --bf16 True."


@pytest.mark.parametrize("name", ["tensorboard", "csv_monitor"])
def test_monitors_without_missing_packages(name, tmp_path):
    config = json.dumps(ZERO_2 | {name: {"enabled": True, "output_path": str(tmp_path)}})
    assert parse(tmp_path, config).deepspeed[name]["enabled"]


@pytest.mark.parametrize(
    ("size", "limited"), [(1e9, 1000), (1000, 1000), (10, 10), ("auto", "auto"), (None, 1000)], ids=str
)
def test_a_bucket_of_gradients_is_not_larger_than_all_gradients(size, limited):
    config = zero(2) if size is None else zero(2, reduce_bucket_size=size)
    limit_reduce_bucket(config, 1000)
    assert config["zero_optimization"]["reduce_bucket_size"] == limited


def test_accelerate_passes_the_limited_bucket_on(tmp_path):
    args = parse(tmp_path, json.dumps(zero(2, reduce_bucket_size=1e9)))
    limit_reduce_bucket(args.hf_deepspeed_config.config, 1000)
    assert args.deepspeed_plugin.deepspeed_config["zero_optimization"]["reduce_bucket_size"] == 1000


@pytest.fixture
def installed_accelerator():
    """Restore the accelerator that a test replaces."""
    before = get_accelerator()
    yield
    set_accelerator(before)


@pytest.mark.parametrize(
    ("accelerator", "zero", "built_in", "expected"),
    [
        (CPU_Accelerator, {"stage": 2}, (), ["deepspeed_shm_comm"]),
        (CPU_Accelerator, {"stage": 2}, ("deepspeed_shm_comm",), []),
        (CUDA_Accelerator, {"stage": 3}, (), []),
        (CUDA_Accelerator, {"stage": 2, "offload_optimizer": {"device": "none"}}, (), []),
        (CUDA_Accelerator, {"stage": 2, "offload_optimizer": {"device": "cpu"}}, (), ["cpu_adam"]),
        (CUDA_Accelerator, {"stage": 3, "offload_param": {"device": "cpu"}}, (), []),
        (CUDA_Accelerator, {"stage": 3, "offload_param": {"device": "nvme"}}, (), ["async_io"]),
    ],
)
def test_which_ops_are_compiled(installed_accelerator, monkeypatch, accelerator, zero, built_in, expected):
    """On a GPU none without offload, so that an image needs no compiler."""
    set_accelerator(accelerator())
    for name in built_in:
        monkeypatch.setitem(installed_ops, name, True)
    assert list_ops_to_compile({"zero_optimization": zero}) == expected
