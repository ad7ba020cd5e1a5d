"""Model folders of unknown origin: a model, or an error of one line before memory is taken.

Each configuration is changed by one value at a time. The model then computes what the unchanged one does, or the error
names the file.
"""

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.paths import PACKAGE_DIR
from safetensors.torch import load_file, save_file

from internvl.model.adapter_io import load_lora_config
from internvl.model.compose import compose_chat_model, load_projector
from internvl.model.internvl_chat import InternVisionConfig, InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import (
    describe_base_checkpoint,
    gather_trained_tensors,
    save_adapter_checkpoint,
)
from internvl.model.internvl_chat.safe_loading import one_line_checkpoint_errors, refuse_unsafe_values
from internvl.model.tokenizers.loading import load_tokenizer


def nest(depth: int):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


VALUES = [None, True, -1, 0, 0.5, 10**6, 2**31 - 1, 2**70, float("nan"), float("inf"), "a", "x" * 9999, [], {}, [1]]
VALUES += [nest(200), "org/kernel", {"": "org/kernel"}]
# Values that are valid and that the weights cannot contradict: another model, as large as the first.
OTHER_MODELS = {
    ("llm_config", "rope_theta"): (0.5, 10**6, 2**31 - 1),
    ("vision_config", "layer_norm_eps"): (0,),
    ("select_layer",): (0,),
}


@pytest.fixture
def folder(tiny_inputs, tmp_path) -> Path:
    """Copy a chat model and its tokenizer; the test may change it."""
    return Path(shutil.copytree(tiny_inputs / "model", tmp_path / "model"))


def iterate_paths(value, path=()) -> Iterator[tuple]:
    """Yield the path of keys to each value in a JSON object."""
    if path:
        yield path
    for key, child in value.items() if isinstance(value, dict) else ():
        yield from iterate_paths(child, (*path, key))


def replace_value(content: dict, path: tuple, value) -> dict:
    changed = json.loads(json.dumps(content))
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return changed


def edit_json(file: Path, path: str, value) -> None:
    file.write_text(json.dumps(replace_value(json.loads(file.read_text()), tuple(path.split(".")), value)))


@torch.no_grad()
def compute_outputs(model: InternVLChatModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and visual tokens of fixed inputs."""
    model.eval().img_context_token_id = -1
    size = model.config.force_image_size
    pixels = torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size)
    return model(input_ids=torch.arange(1, 9)[None]).logits, model.extract_feature(pixels)


def get_one_line_error(load_fn, source: Path) -> str:
    """Return the message of the error that `load_fn` raises."""
    with pytest.raises((ValueError, OSError)) as error:
        load_fn()
    message = str(error.value)
    assert "\n" not in message and str(source) in message and len(message) < 4000, message
    return message


# -- config.json -------------------------------------------------------------------------------------------------------


def list_changes(folder: Path) -> list[tuple[tuple, object]]:
    config = json.loads((folder / "config.json").read_text())
    return [(path, value) for path in iterate_paths(config) for value in VALUES]


def test_any_value_gives_the_same_model_or_one_line(folder):
    """Of about 3,300 changes 300 are tried, the same in each run; all were when this was written."""
    config, expected = (
        json.loads((folder / "config.json").read_text()),
        compute_outputs(InternVLChatModel.from_pretrained(folder)),
    )
    num_refused = 0
    for path, value in random.Random(0).sample(list_changes(folder), 300):
        (folder / "config.json").write_text(json.dumps(replace_value(config, path, value)))
        try:
            outputs = compute_outputs(InternVLChatModel.from_pretrained(folder))
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and "config.json" in str(error), (path, value, error)
            num_refused += 1
            continue
        is_other = value in OTHER_MODELS.get(path, ())
        assert is_other or all(map(torch.equal, outputs, expected)), (path, value)
    assert 100 < num_refused < 200


CONTRADICTIONS = {
    "vision_config.hidden_size": (120, r"vision_config.hidden_size 120\).*mismatched: .*\(24, 96\) for \(24, 480\)"),
    "vision_config.num_hidden_layers": (1000, "num_hidden_layers 1000 does not match the weights, which have 2 layers"),
    "vision_config.intermediate_size": (10**8, "vision_config.intermediate_size 100000000"),
    "vision_config.image_size": (4088, r"position_embedding \(1, \d+, 24\) for \(1, 85265, 24\)"),
    "llm_config.num_hidden_layers": (3, "llm_config.num_hidden_layers 3 does not match the weights, which have 2"),
    "llm_config.hidden_size": (10**6, "llm_config.hidden_size 1000000"),
    "llm_config.vocab_size": (10**9, r"llm_config.vocab_size 1000000000\).*\(1009, 24\) for \(1000000000, 24\)"),
    "llm_config.pad_token_id": (10**9, "pad_token_id 1000000000 is invalid: expected an id below vocab_size 1009"),
    "llm_config.num_labels": (10**8, "llm_config.num_labels 100000000 is invalid: expected an integer from 0 to"),
    "llm_config.num_key_value_heads": (3, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    "llm_config.dtype": ("load", "llm_config.dtype 'load' is invalid: expected one of float32"),
    "llm_config.to_dict": (1, "llm_config.to_dict is the name of a method"),
    "llm_config.architectures": (["NoneLM"], "Unsupported architecture: 'NoneLM'"),
    "use_llm_lora": (4, "do not match the model"),
    "max_dynamic_patch": (10**6, "max_dynamic_patch 1000000 is invalid: expected an integer from 1 to 1,024"),
    "downsample_ratio": (0.3, "downsample_ratio 0.3 is invalid: expected 1 / n"),
    "force_image_size": (50, "force_image_size 50 is not a multiple of 28 pixels"),
    "template": ("none", "template 'none' is not supported"),
    "llm_config": ([], r"expected an object llm_config, got \[\]"),
    "model_type": ("internvl", "tools/internvl_hf2custom.py"),
}


@pytest.mark.parametrize("path", CONTRADICTIONS)
def test_contradiction_to_the_weights_is_named(folder, path):
    value, message = CONTRADICTIONS[path]
    edit_json(folder / "config.json", path, value)
    error = get_one_line_error(lambda: InternVLChatModel.from_pretrained(folder), folder)
    assert re.search(message, error), error


BOMBS = {
    "vision_config.num_hidden_layers": 1000,
    "llm_config.num_labels": 10**8,
    "llm_config.hidden_size": 10**6,
    "llm_config.vocab_size": 10**9,
    "max_dynamic_patch": 10**6,
}
LOAD = """
import resource, sys
from internvl.model.internvl_chat import InternVLChatModel
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for folder in sys.argv[2:]:
    try:
        InternVLChatModel.from_pretrained(folder)
    except (ValueError, OSError) as error:
        print("refused:", error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
"""


def load_with_limit(num_bytes: int, *folders: Path) -> subprocess.CompletedProcess:
    """Load models in a process that may take `num_bytes` more than its libraries."""
    command = [sys.executable, "-c", LOAD, str(num_bytes), *map(str, folders)]
    return subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE_DIR, timeout=300)


@pytest.mark.multiprocess
def test_bombs_are_refused_before_memory_is_taken(folder, tmp_path):
    folders = []
    for number, (path, value) in enumerate(BOMBS.items()):
        folders.append(Path(shutil.copytree(folder, tmp_path / str(number))))
        edit_json(folders[-1] / "config.json", path, value)
    done = load_with_limit(2**30, *folders)
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == ["refused"] * len(BOMBS), done.stdout + done.stderr
    assert float(lines[-1]) < 60


# -- values that name code ---------------------------------------------------------------------------------------------

UNSAFE_VALUES = {
    "attn_implementation": {"": "org/kernel"},
    "vision_config.attn_implementation": {"": "org/kernel"},
    "llm_config._attn_implementation": ["sdpa", "org/kernel"],
    "llm_config._attn_implementation_internal": "org/kernel",
    "llm_config.rope_scaling": {"attn_implementation": {"text_config": {"a": "paged|org/kernel:name@main"}}},
    "llm_config._experts_implementation": {"org/kernel": 1},
    "kernel_config": {"RMSNorm": "org/kernel"},
    "use_kernels": True,
    "quantization_config": {"quant_method": "mxfp4"},
    "llm_config.quantization_config": "gptq",
    "fusion_config": {"a": True},
    "configuration_files": ["config.4.0.json"],
    "transformers_weights": "../x.safetensors",
}


@pytest.mark.parametrize("path", UNSAFE_VALUES)
def test_unsafe_values_are_refused_at_any_depth(folder, path):
    edit_json(folder / "config.json", path, UNSAFE_VALUES[path])
    message = get_one_line_error(lambda: InternVLChatModel.from_pretrained(folder), folder / "config.json")
    assert "config.json is unsafe" in message


@pytest.mark.parametrize("name", ["generation_config.json", "preprocessor_config.json", "processor_config.json"])
def test_unsafe_values_are_refused_in_every_file(folder, name):
    (folder / name).write_text(json.dumps({"nested": [{"attn_implementation": {"": "org/kernel"}}]}))
    message = rf"{name} is unsafe: nested.0.attn_implementation .*org/kernel.* is code on the hub"
    for load_fn in (InternVLChatModel.from_pretrained, load_tokenizer):
        with pytest.raises(ValueError, match=message):
            load_fn(folder)


def test_harmless_values_pass():
    refuse_unsafe_values(
        {"attn_implementation": "flash_attention_2", "_name_or_path": "./a/b", "auto_map": {"AutoModel": "a.B"}}, "x"
    )
    refuse_unsafe_values({"quantization_config": {"quant_method": "bitsandbytes"}, "kernel_size": 3}, "x")


# -- files -------------------------------------------------------------------------------------------------------------


def make_fifo(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def make_socket(file: Path) -> None:
    file.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(file))


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
FILE_CHANGES = {
    "FIFO": (make_fifo, "is a FIFO"),
    "socket": (make_socket, "is a socket"),
    "LFS pointer": (lambda file: file.write_text(LFS_POINTER), "pointer of Git LFS.*git lfs pull"),
    "empty": (lambda file: file.write_bytes(b""), "not JSON|not a complete safetensors file"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:999]), "not JSON|not a complete safetensors file"),
    "not UTF-8": (lambda file: file.write_bytes(b'{"a": "\xff"}'), "not JSON|not a complete safetensors file"),
    "list": (lambda file: file.write_text("[]"), "got a JSON list|not a complete safetensors file"),
    "deep": (lambda file: file.write_text("[" * 10**5), "nested too deeply|not a complete safetensors file"),
}
FILE_NAMES = ("config.json", "model.safetensors", "tokenizer_config.json", "tokenizer.json")


@pytest.mark.parametrize("change", FILE_CHANGES)
@pytest.mark.parametrize("name", FILE_NAMES)
def test_unusable_file_is_named(folder, tmp_path, monkeypatch, name, change):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    change_fn, message = FILE_CHANGES[change]
    change_fn(Path("model") / name)
    load_fn = load_tokenizer if "token" in name else InternVLChatModel.from_pretrained
    assert re.search(message, get_one_line_error(lambda: load_fn(folder), folder / name))


def test_folder_in_place_of_a_file(folder):
    make_folder(folder / "config.json")
    with pytest.raises(OSError, match="config.json"):
        InternVLChatModel.from_pretrained(folder)


def test_missing_files_are_named(folder):
    names = load_file(folder / "model.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="index.json names model-00001-of-00002.safetensors, which is missing"):
        InternVLChatModel.from_pretrained(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "config.json").unlink()
    for load_fn in (InternVLChatModel.from_pretrained, InternVLChatConfig.from_pretrained):
        with pytest.raises(ValueError, match="config.json is missing"):
            load_fn(folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="tokenizer_config.json is missing"):
        load_tokenizer(folder)
    with pytest.raises(ValueError, match="the checkpoint folder '/absent/model' does not exist"):
        InternVLChatModel.from_pretrained("/absent/model")


def test_another_model_is_refused_before_a_default_one_is_built(model_parts, folder):
    for load_fn in (InternVLChatModel.from_pretrained, InternVLChatConfig.from_pretrained):
        with pytest.raises(ValueError, match="llm/config.json has model_type 'qwen2', expected 'internvl_chat'"):
            load_fn(model_parts / "llm")
    with pytest.raises(ValueError, match="llm/config.json has model_type 'qwen2', expected 'intern_vit_6b'"):
        InternVisionConfig.from_pretrained(model_parts / "llm")
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="expected an object vision_config and llm_config, got None"):
        InternVLChatModel.from_pretrained(folder)


def test_weights_of_another_model_are_refused(folder, model_parts):
    shutil.copy(model_parts / "llm/model.safetensors", folder)
    message = get_one_line_error(lambda: InternVLChatModel.from_pretrained(folder), folder)
    assert "does not match the weights, which have 0 layers" in message


def test_size_of_pickled_and_quantized_weights_is_compared(folder):
    edit_json(folder / "config.json", "llm_config.vocab_size", 10**9)
    edit_json(folder / "config.json", "quantization_config", {"quant_method": "bitsandbytes"})
    message = r"config.json describes 48,\d+,\d+,\d+ parameters, more than the weights hold"
    with pytest.raises(ValueError, match=message):
        InternVLChatModel.from_pretrained(folder)
    edit_json(folder / "config.json", "quantization_config", None)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        InternVLChatModel.from_pretrained(folder, use_safetensors=None)


@pytest.mark.parametrize("part", ["vit", "llm"])
def test_parts_are_checked_as_chat_models_are(model_parts, tmp_path, part):
    shutil.copytree(model_parts, tmp_path / "parts")
    edit_json(tmp_path / "parts" / part / "config.json", "intermediate_size", 10**8)
    with pytest.raises(ValueError, match=r"intermediate_size 100000000\) do not match the model"):
        compose_chat_model(tmp_path / "parts/vit", tmp_path / "parts/llm")
    edit_json(tmp_path / "parts" / part / "config.json", "attn_implementation", {"": "org/kernel"})
    with pytest.raises(ValueError, match="org/kernel.* is code on the hub"):
        compose_chat_model(tmp_path / "parts/vit", tmp_path / "parts/llm")
    make_fifo(tmp_path / "parts" / part / "model.safetensors")
    with pytest.raises(OSError, match="is a FIFO"):
        compose_chat_model(tmp_path / "parts/vit", tmp_path / "parts/llm")


@pytest.mark.parametrize("name", ["mlp.pth", "mlp.safetensors"])
def test_projector_files_are_regular(tiny_inputs, tmp_path, name):
    model = InternVLChatModel.from_pretrained(tiny_inputs / "model")
    make_fifo(tmp_path / name)
    with pytest.raises(ValueError, match="is a FIFO"):
        load_projector(model, tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).write_text(LFS_POINTER)
    with pytest.raises(ValueError, match="git lfs pull"):
        load_projector(model, tmp_path / name)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_lack_of_memory_is_one_line():
    message = "the checkpoint x cannot be loaded: MemoryError: not enough memory"
    with pytest.raises(ValueError, match=message), one_line_checkpoint_errors("the checkpoint x"):
        bytearray(2**62)


@pytest.mark.multiprocess
def test_weights_larger_than_the_memory_limit(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    rows = 2 * 10**6  # 192 MB in each of two weights
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        weights[name] = torch.zeros(1, 24).expand(rows, 24).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", "llm_config.vocab_size", rows)
    done = load_with_limit(2**28, folder)
    assert done.stdout.startswith("refused:") and "memory" in done.stdout, done.stdout + done.stderr


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(goldens, tmp_path) -> Path:
    """Save an adapter checkpoint of rank 2 on a copy of a tiny model."""
    base = Path(shutil.copytree(goldens / "models/qwen2", tmp_path / "base"))
    model = InternVLChatModel.from_pretrained(base)
    model.wrap_llm_lora(r=2, lora_alpha=4)
    model.base_checkpoint = describe_base_checkpoint(base)
    (tmp_path / "adapted").mkdir()
    save_adapter_checkpoint(model, tmp_path / "adapted", gather_trained_tensors(model))
    return tmp_path / "adapted"


ADAPTER_CONTRADICTIONS = {
    "use_llm_lora": (65536, "use_llm_lora 65536 is invalid: the adapters in .* have rank 2"),
    "llm_config.vocab_size": (10**9, "vocab_size 1000000000 is invalid: expected at most 65,536 tokens more than"),
    "base_model": ({"path": "x"}, "base_model.fingerprint None is invalid"),
    "base_model.path": (3, "base_model.path 3 is invalid: expected a path"),
}


@pytest.mark.parametrize("path", ADAPTER_CONTRADICTIONS)
def test_contradiction_to_the_adapters_is_named(adapted, path):
    InternVLChatModel.from_pretrained(adapted)
    value, message = ADAPTER_CONTRADICTIONS[path]
    edit_json(adapted / "config.json", path, value)
    assert re.search(message, get_one_line_error(lambda: InternVLChatModel.from_pretrained(adapted), adapted))


def test_slow_pattern_of_layer_names_is_refused(adapted):
    edit_json(adapted / "language_model/adapter_config.json", "target_modules", "(.+)+x")
    with pytest.raises(ValueError, match=r"adapter_config.json: the pattern '\(\.\+\)\+x' is not supported"):
        load_lora_config(adapted / "language_model")


def test_unsafe_value_beside_the_adapters_is_refused(adapted):
    edit_json(adapted / "language_model/adapter_config.json", "runtime_config", {"kernel": "org/kernel"})
    with pytest.raises(ValueError, match="adapter_config.json is unsafe: runtime_config.kernel 'org/kernel'"):
        InternVLChatModel.from_pretrained(adapted)
