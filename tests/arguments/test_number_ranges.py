"""Every numeric flag refuses what is not a number, infinite, negative or huge."""

import json

import pytest

from internvl.arguments.number_ranges import RANGES, Range, describe_range, find_numeric_flags, is_in_range
from internvl.arguments.preference import PREFERENCE_ARGUMENTS
from internvl.arguments.training import parse_args

NUMERIC_FLAGS = {flag: kind for cls in PREFERENCE_ARGUMENTS for flag, kind in find_numeric_flags(cls).items()}
# -1 has a meaning
MAY_BE_NEGATIVE = {"max_steps", "local_rank", "unfreeze_vit_layers", "vision_select_layer"}


def test_flags_of_every_type_are_found():
    assert {"learning_rate": float, "seed": int, "data_seed": int, "rpo_alpha": float}.items() <= NUMERIC_FLAGS.items()
    assert {"use_llm_lora": int, "max_seq_length": int, "llm_lora_alpha": float}.items() <= NUMERIC_FLAGS.items()
    assert "bf16" not in NUMERIC_FLAGS and "lr_scheduler_kwargs" not in NUMERIC_FLAGS
    assert RANGES.keys() <= NUMERIC_FLAGS.keys() and RANGES.keys() >= MAY_BE_NEGATIVE


@pytest.mark.parametrize("flag", NUMERIC_FLAGS)
def test_invalid_numbers_are_refused(flag, tmp_path):
    for value in ["nan", "inf", "-inf", "1e30", str(10**30), "x", ""]:
        refuse(tmp_path, flag, value)
    if not flag.endswith("_lora"):  # ranks: see validate.py
        refuse(tmp_path, flag, "-1000000" if flag in MAY_BE_NEGATIVE else "-1")


def refuse(tmp_path, flag: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"--{flag}\\b") as error:
        parse_args(["--output_dir", str(tmp_path), f"--{flag}={value}"], PREFERENCE_ARGUMENTS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("max_steps", "4"), ("learning_rate", True), ("seed", 1.5), ("max_seq_length", [1]), ("llm_lora_alpha", "8")],
)
def test_json_values_of_other_types_are_refused(flag, value, tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"output_dir": str(tmp_path), flag: value}))
    with pytest.raises(ValueError, match=f"^--{flag} .* is invalid: expected an? (integer|number) "):
        parse_args([str(tmp_path / "args.json")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--learning_rate -1", "--learning_rate -1.0 is invalid: expected a number from 0 to 1,000."),
        ("--adam_beta2 1", r"--adam_beta2 1.0 is invalid: expected a number in \[0, 1\)."),
        ("--seed 4294967296", "--seed 4294967296 is invalid: expected an integer from 0 to 4,294,967,295."),
        ("--save_steps 0", "--save_steps 0.0 is invalid: expected a number > 0 and <= 1e"),
        ("--save_steps 1.5", "--save_steps must be an integer if bigger than 1: 1.5"),
        ("--llm_lr nan", "--llm_lr nan is invalid: expected a number from 0 to 1,000."),
    ],
)
def test_message_names_the_range(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse_args(["--output_dir", str(tmp_path), *flags.split()])


def test_ends_of_a_range():
    assert is_in_range(0, int, Range()) and is_in_range(0.0, float, Range()) and not is_in_range(0.0, int, Range())
    assert not is_in_range(0, float, Range(excludes_low=True)) and is_in_range(1, float, Range(0, 1))
    assert not is_in_range(1, float, Range(0, 1, excludes_high=True))
    assert describe_range(int, Range(1, 1024)) == "an integer from 1 to 1,024"
