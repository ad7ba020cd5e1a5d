"""Untrusted checkpoints run no code and open no other files.

The attacks are real: each would make a folder named `marker` if its code ran.
"""

import json
import os
import re
import shutil
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_tiny_checkpoint
from helpers.training_runs import (
    TRAIN_ADAPTERS,
    TRAIN_LLM_AND_PROJECTOR,
    build_run_flags,
    prepare_trainer,
    read_losses,
    run_training,
    train_in_process,
    write_meta_file,
)
from safetensors.torch import load_file, save_file
from stress.checkpoint_edits import edit_safetensors

from internvl.checkpoint.manifest import write_manifest
from internvl.checkpoint.optimizer_state import find_deepspeed_shards
from internvl.checkpoint.safe_load import refuse_unsafe_pickles, weights_only_loading
from internvl.model.adapter_io import load_lora_config
from internvl.model.compose import compose_chat_model, load_projector
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import (
    gather_trained_tensors,
    load_trained_tensors,
    save_adapter_checkpoint,
)
from internvl.model.safetensors_io import CheckpointTensors
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tools.pickle2safetensors import main as pickle2safetensors


class Attack:
    """Object whose pickle makes the folder `marker` when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """Return the path that an attack creates; fail if it exists."""
    marker = tmp_path / "marker"
    # The attack works where nothing prevents it: otherwise rmdir fails.
    torch.save(Attack(marker), tmp_path / "attack.pt")
    torch.load(tmp_path / "attack.pt", weights_only=False)
    marker.rmdir()
    (tmp_path / "attack.pt").unlink()
    yield marker
    assert not marker.exists()


@pytest.fixture
def checkpoint(tiny_inputs, tmp_path) -> Path:
    """Copy a chat checkpoint; the test may change it."""
    return Path(shutil.copytree(tiny_inputs / "model", tmp_path / "checkpoint"))


def edit_json(file: Path, **fields) -> None:
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(old | fields))


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_pickled_weights_do_not_run(tiny_inputs, model_parts, build_from_flags, tmp_path, marker, checkpoint, is_zip):
    (checkpoint / "model.safetensors").unlink()
    state = {"a": Attack(marker), "b": torch.zeros(100_000)}  # as large as config.json says
    torch.save(state, checkpoint / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    message = r"are pickled \(pytorch_model.bin\).*pickle2safetensors.py.*--allow_pickle True"
    for load_fn in (InternVLChatModel.from_pretrained, CheckpointTensors, load_lora_config):
        with pytest.raises(ValueError, match=message):
            load_fn(checkpoint)
    for paths in ((model_parts / "vit", checkpoint), (checkpoint, model_parts / "llm")):
        with pytest.raises(ValueError, match=message):
            compose_chat_model(*paths)
    with pytest.raises(ValueError, match=message):
        build_from_flags("--model_name_or_path", str(checkpoint))
    with pytest.raises(ValueError, match="Unsafe file in the checkpoint: it holds more than data"):
        build_from_flags("--model_name_or_path", str(checkpoint), "--allow_pickle", "True")
    with pytest.raises(ValueError, match="is not readable as a state dict"):
        load_projector(InternVLChatModel.from_pretrained(tiny_inputs / "model"), checkpoint / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="pytorch_model.bin is not readable as tensors"):
        pickle2safetensors([str(checkpoint), str(tmp_path / "out")])


def test_tensors_in_a_pickle_are_read_when_allowed(build_from_flags, tmp_path, checkpoint):
    expected = InternVLChatModel.from_pretrained(checkpoint).state_dict()
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    model = build_from_flags("--model_name_or_path", str(checkpoint), "--allow_pickle", "True", *TRAIN_ADAPTERS)
    assert model.base_checkpoint is None, "it is saved with all its weights"
    assert torch.equal(model.mlp1[1].weight, expected["mlp1.1.weight"])
    pickle2safetensors([str(checkpoint), str(tmp_path / "out")])
    converted = InternVLChatModel.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, converted[name]) for name, tensor in expected.items())
    # Safetensors are preferred to a pickle, here an empty one.
    torch.save({}, tmp_path / "out/pytorch_model.bin")
    build_from_flags("--model_name_or_path", str(tmp_path / "out"), "--allow_pickle", "True", *TRAIN_ADAPTERS)


# -- file and class names in JSON --------------------------------------------------------------------------------------


def index_shard(folder: Path, file_name: str) -> None:
    """Move the weights out of the folder and write their index."""
    names = load_file(folder / "model.safetensors")
    edit_json(folder / "model.safetensors.index.json", weight_map=dict.fromkeys(names, file_name))
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")


def add_pickle(folder: Path, name: str) -> None:
    torch.save(Attack(folder.parent / "marker"), folder / name)


def name_pickle_as_weights(folder: Path) -> None:
    edit_json(folder / "config.json", transformers_weights="adapter_model.bin")
    add_pickle(folder, "adapter_model.bin")


def add_adapter(folder: Path) -> None:
    edit_json(folder / "adapter_config.json", peft_type="LORA", r=2, target_modules=["q_proj"])
    add_pickle(folder, "adapter_model.bin")


def edit_llm_config(folder: Path, **fields) -> None:
    llm_config = json.loads((folder / "config.json").read_text())["llm_config"]
    edit_json(folder / "config.json", llm_config=llm_config | fields)


HUB_KERNEL = {"attn_implementation": "somebody/kernel"}
UNSAFE_NAMES = {
    "shard outside": (lambda f: index_shard(f, "../outside.safetensors"), "outside.safetensors.*beside it"),
    "shard with an absolute path": (lambda f: index_shard(f, "/etc/passwd"), "/etc/passwd.*beside it"),
    "pickled shard": (lambda f: (add_pickle(f, "x.bin"), index_shard(f, "x.bin")), "x.bin.*expected \\*.safetensors"),
    "pickle as weights": (name_pickle_as_weights, "adapter_model.bin.*expected \\*.safetensors"),
    "attention from a hub": (lambda f: edit_json(f / "config.json", **HUB_KERNEL), "somebody/kernel.*not run"),
    "attention from a hub, in the LLM": (lambda f: edit_llm_config(f, **HUB_KERNEL), "somebody/kernel.*not run"),
    "experts from a hub": (lambda f: edit_llm_config(f, _experts_implementation="a/b"), "a/b.*not run"),
    "adapter beside the model": (add_adapter, "adapter_config.json beside config.json"),
    "its own base checkpoint": (
        lambda f: edit_json(f / "config.json", base_model={"path": str(f), "fingerprint": "", "merged": False}),
        "names its own folder as the base checkpoint",
    ),
    "list as config": (lambda f: (f / "config.json").write_text("[1]"), "got a JSON list"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize(("change_fn", "message"), UNSAFE_NAMES.values(), ids=UNSAFE_NAMES)
def test_unsafe_names_in_json_are_an_error(checkpoint, marker, change_fn, message):
    change_fn(checkpoint)
    with pytest.raises(ValueError, match=message):
        InternVLChatModel.from_pretrained(checkpoint)


# peft_type -> fields with which PEFT would open another folder or import a module
UNSAFE_ADAPTERS = {
    "XLORA": {"adapters": {"1": "/etc"}},
    "LORA": {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
}


@pytest.mark.parametrize("peft_type", UNSAFE_ADAPTERS)
def test_only_plain_lora_is_loaded(tmp_path, peft_type):
    save_file({}, tmp_path / "adapter_model.safetensors")
    fields = {"r": 2, "target_modules": ["q_proj"], **UNSAFE_ADAPTERS[peft_type]}
    edit_json(tmp_path / "adapter_config.json", peft_type=peft_type, **fields)
    with pytest.raises(ValueError, match="only plain LoRA is supported"):
        load_lora_config(tmp_path)


# -- Python code in a checkpoint ---------------------------------------------------------------------------------------

CODE = """
import os
os.mkdir({marker!r})
from transformers import PreTrainedModel, PreTrainedConfig, PreTrainedTokenizerFast
class Custom(PreTrainedTokenizerFast): pass
"""
MODULES = "modeling_x configuration_x tokenization_x processing_x custom_generate/generate sitecustomize".split()


def test_code_in_a_checkpoint_does_not_run(checkpoint, marker, tiny_inputs, build_from_flags, monkeypatch):
    monkeypatch.chdir(checkpoint)
    (checkpoint / "custom_generate").mkdir()
    for module in MODULES:
        (checkpoint / f"{module}.py").write_text(CODE.format(marker=str(marker)))
    classes = {"AutoConfig": "configuration_x.Custom", "AutoModel": "modeling_x.Custom"}
    classes |= {"AutoModelForCausalLM": "modeling_x.Custom", "AutoTokenizer": ["tokenization_x.Custom", None]}
    edit_json(checkpoint / "config.json", auto_map=classes)
    edit_llm_config(checkpoint, auto_map=classes)
    edit_json(checkpoint / "tokenizer_config.json", auto_map=classes, trust_remote_code=True)
    edit_json(checkpoint / "generation_config.json", custom_generate=str(checkpoint), trust_remote_code=True)
    (checkpoint / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer("What?").input_ids == load_tokenizer(tiny_inputs / "model")("What?").input_ids
    model = build_from_flags("--model_name_or_path", str(checkpoint), *TRAIN_ADAPTERS)
    model.img_context_token_id = 0
    model.generate(input_ids=torch.ones(1, 3, dtype=torch.int64), max_new_tokens=2)
    edit_json(checkpoint / "tokenizer_config.json", tokenizer_class="Custom")
    with pytest.raises(ValueError, match="Custom in .*: only Python code of the checkpoint defines"):
        load_tokenizer(checkpoint)


def test_tokenizer_reads_its_own_folder_only(checkpoint, tiny_inputs):
    """File names in its configuration are ignored."""
    files = {
        f"{name}_file": str(tiny_inputs / f"model/{name}.json") for name in ("tokenizer", "vocab", "special_tokens_map")
    }
    edit_json(checkpoint / "tokenizer_config.json", **files, merges_file=str(tiny_inputs / "model/merges.txt"))
    for file in ("tokenizer.json", "vocab.json", "merges.txt"):
        (checkpoint / file).unlink(missing_ok=True)
    for name in ("PreTrainedTokenizerFast", "Qwen2Tokenizer", "LlamaTokenizer", "InternLM2Tokenizer", "GPT2Tokenizer"):
        edit_json(checkpoint / "tokenizer_config.json", tokenizer_class=name)
        try:
            num_tokens = len(load_tokenizer(checkpoint))
        except (ValueError, OSError):
            continue
        assert num_tokens < len(load_tokenizer(tiny_inputs / "model")) // 2, name


# -- optimizer and other states ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_steps(tiny_inputs, tmp_path_factory) -> Path:
    """Train two steps without DeepSpeed; return the output folder."""
    output = tmp_path_factory.mktemp("two_steps") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
        train_in_process(tiny_inputs, output, *TRAIN_ADAPTERS, "--max_steps", "2", "--save_steps", "2")
    return output


STATE_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def test_pickled_states_do_not_run(tiny_inputs, two_steps, tmp_path, monkeypatch, marker):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    checkpoint = Path(shutil.copytree(two_steps / "checkpoint-2", tmp_path / "checkpoint-2"))
    for data in two_steps.glob("data-*.npz"):
        shutil.copy(data, tmp_path)
    torch.save(Attack(marker), checkpoint / "training_args.bin")  # nothing reads it
    trainer = prepare_trainer([*build_run_flags(tiny_inputs, tmp_path / "out"), *TRAIN_ADAPTERS, "--max_steps", "3"])
    for name in STATE_FILES:
        content = (checkpoint / name).read_bytes()
        torch.save({"state": Attack(marker)}, checkpoint / name)
        with pytest.raises(ValueError, match=rf"Unsafe file: opening .*{name} would call \w+.mkdir"):
            trainer.train(str(checkpoint))
        (checkpoint / name).write_bytes(content)
    trainer.train(str(checkpoint))
    assert trainer.state.global_step == 3


def test_libraries_load_data_only(tmp_path, marker, monkeypatch):
    """Also those that ask for pickles, by argument or environment variable."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    file = tmp_path / "states.pt"
    torch.save({"a": Attack(marker)}, file)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    config = Namespace(checkpoint_config={"checkpoint_serialization": True})
    for load_fn in (partial(torch.load, weights_only=False), torch.load, TorchCheckpointEngine(config).load):
        with (
            pytest.raises(ValueError, match="Unsafe file in the checkpoint: it holds more than data"),
            weights_only_loading(deepspeed=True),
        ):
            load_fn(file)
    with pytest.raises(ValueError, match=r"Unsafe file: opening .*states.pt would call \w+.mkdir"):
        refuse_unsafe_pickles(tmp_path)
    states = {"loss_scaler": DynamicLossScaler(1, 2, 3, 4, 5, False, "fp16"), "stage": ZeroStageEnum(2)}
    torch.save(states, file)
    refuse_unsafe_pickles(tmp_path)
    with weights_only_loading(deepspeed=True):
        assert torch.load(file, weights_only=False)["stage"] == 2
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    file.write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match="states.pt cannot be read as a file of torch.save"):
        refuse_unsafe_pickles(tmp_path)


@pytest.mark.multiprocess
def test_pickled_deepspeed_states_do_not_run(tiny_inputs, tmp_path, marker):
    flags = [*TRAIN_LLM_AND_PROJECTOR, "--deepspeed", "zero_stage1_config.json", "--save_steps", "2"]
    run_training(tiny_inputs, tmp_path / "out", *flags, "--max_steps", "2")
    (file,) = (tmp_path / "out/checkpoint-2").rglob("*_optim_states.pt")
    content = file.read_bytes()
    torch.save({"optimizer_state_dict": Attack(marker)}, file)
    (tmp_path / "out/checkpoint-2/manifest.json").unlink(missing_ok=True)  # an attacker would update it
    failed = run_training(tiny_inputs, tmp_path / "out", *flags, "--max_steps", "3", status=1)
    assert f"{file.name} would call posix.mkdir" in failed.stderr
    file.write_bytes(content)
    run_training(tiny_inputs, tmp_path / "out", *flags, "--max_steps", "3")
    assert len(read_losses(tmp_path / "out")) == 3


@pytest.mark.parametrize("name", ["../outside", "/etc", "absent", ".."])
def test_deepspeed_files_outside_the_checkpoint_are_not_read(tmp_path, name):
    (tmp_path / "outside").mkdir()
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/latest").write_text(name)
    with pytest.raises(ValueError, match="which is not a folder in"):
        find_deepspeed_shards(tmp_path / "checkpoint")


ZERO_FLAGS = [*TRAIN_ADAPTERS, *"--freeze_mlp False --deepspeed zero_stage2_config.json --save_steps 2".split()]


@pytest.fixture(scope="module")
def two_zero_steps(tiny_inputs, tmp_path_factory) -> Path:
    """Train two steps under ZeRO-2; return the output folder."""
    output = tmp_path_factory.mktemp("two_zero_steps") / "run"
    run_training(tiny_inputs, output, *ZERO_FLAGS, "--max_steps", "2")
    return output


MOMENT = "mlp1.1.weight.exp_avg"
# Change of tensors and metadata of the optimizer states under ZeRO -> the sentence.
ZERO_EDITS = {
    "transposed": (lambda t, m: t.update({MOMENT: t[MOMENT].T.contiguous()}), f"{MOMENT} has .*, expected floats"),
    "integers": (lambda t, m: t.update({MOMENT: t[MOMENT].int()}), f"{MOMENT} has dtype torch.int32"),
    "not finite": (lambda t, m: t[MOMENT].fill_(torch.inf), f"{MOMENT} has non-finite values"),
    "step beyond the checkpoint": (lambda t, m: m.update(step="400"), "step is '400', expected 1 to 2"),
    "scaler is a list": (lambda t, m: m.update(loss_scaler="[]"), r"loss_scaler is \[\], expected .*cur_scale"),
    "scaler replaces a method": (
        lambda t, m: m.update(loss_scaler='{"update_scale": 1}'),
        "loss_scaler is .*update_scale.*, expected .*cur_scale",
    ),
    "no metadata": (lambda t, m: m.clear(), "step is '', expected 1 to 2"),
    "moment missing": (lambda t, m: t.pop(MOMENT), "holds other parameters than this run trains: 1 differ"),
}  # fmt: skip


@pytest.mark.multiprocess
@pytest.mark.parametrize(("change_fn", "message"), ZERO_EDITS.values(), ids=ZERO_EDITS)
def test_edited_states_under_zero_are_one_sentence(tiny_inputs, two_zero_steps, tmp_path, change_fn, message):
    output = Path(shutil.copytree(two_zero_steps, tmp_path / "out"))
    edit_safetensors(output / "checkpoint-2/optimizer.safetensors", change_fn)
    write_manifest(output / "checkpoint-2", is_writer=True)
    failed = run_training(tiny_inputs, output, *ZERO_FLAGS, "--max_steps", "3", status=1)
    assert re.search(f"^error: .*optimizer.safetensors.* {message}", failed.stderr, re.MULTILINE), failed.stderr
    assert "Traceback" not in failed.stderr


# -- other files beside the weights ------------------------------------------------------------------------------------


def test_model_card_is_not_parsed_when_saving(two_steps, tiny_inputs, tmp_path):
    """PEFT would read its YAML: here one that expands to 10^9 entries, and a FIFO."""
    model = InternVLChatModel.from_pretrained(two_steps / "checkpoint-2")
    bomb = "".join(f"x{level}: &x{level} [{','.join([f'*x{level - 1}'] * 10)}]\n" for level in range(1, 10))
    for part in ("vision_model", "language_model"):
        (tmp_path / part).mkdir()
    (tmp_path / "vision_model/README.md").write_text(f"---\nx0: &x0 [1]\n{bomb}---\n")
    os.mkfifo(tmp_path / "language_model/README.md")
    start = time.monotonic()
    save_adapter_checkpoint(model, tmp_path, gather_trained_tensors(model))
    assert time.monotonic() - start < 20 and not list(tmp_path.rglob("README.md"))


def test_tensor_in_two_files_is_an_error(checkpoint):
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="holds the tensor .* twice, also in model.safetensors"):
        CheckpointTensors(checkpoint)


def test_adapters_must_hold_all_that_the_run_trains(two_steps):
    model = InternVLChatModel.from_pretrained(two_steps / "checkpoint-2")
    load_trained_tensors(model, two_steps / "checkpoint-2")
    with pytest.raises(ValueError, match="missing: mlp1.1.bias"):
        load_trained_tensors(model, two_steps / "checkpoint-2", required=["mlp1.1.bias"])


def test_resumed_mixture_of_experts_loads_its_experts(tiny_inputs, goldens, tmp_path, monkeypatch):
    """Files name the weights of each expert, memory those of all experts together."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tiny"
    make_tiny_checkpoint(folder / "model", goldens / "tokenizer", "qwen3_moe")
    (folder / "train.jsonl").write_text((tiny_inputs / "train.jsonl").read_text())
    write_meta_file(folder, goldens / "dataset/images")
    flags = [*TRAIN_LLM_AND_PROJECTOR, "--save_steps", "2", "--no_smoke_save", "True"]
    train_in_process(folder, tmp_path / "unbroken", *flags, "--max_steps", "3")
    shutil.copytree(tmp_path / "unbroken", tmp_path / "resumed", ignore=shutil.ignore_patterns("checkpoint-3"))
    trainer = prepare_trainer([*build_run_flags(folder, tmp_path / "resumed"), *flags, "--max_steps", "3"])
    trainer.train(str(tmp_path / "resumed/checkpoint-2"))
    expected = load_file(tmp_path / "unbroken/model.safetensors")
    trainer.save_model()
    resumed = load_file(tmp_path / "resumed/model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.items())
