"""Checkpoints of a stranger: whatever lies in them, none of it runs, and nothing outside their folders is opened.

The attacks are real: each would leave a folder named `marker` if anything of it ran.
"""

import json
import os
import shutil
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.training_runs import FULL, LORA, flags_of, losses, prepare, run, run_here
from safetensors.torch import load_file, save_file
from tools.pickle2safetensors import main as pickle2safetensors

from internvl.checkpoint.optimizer_state import find_deepspeed_shards
from internvl.checkpoint.safe_load import refuse_unsafe_pickles, weights_only_loading
from internvl.model.adapter_io import lora_config
from internvl.model.compose import compose, load_projector
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.safetensors_io import Checkpoint
from internvl.model.tokenizers.loading import load_tokenizer


class Attack:
    """What a pickle of it calls when it is opened."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """Where an attack would leave its mark; it is a real one, which the fixture tries."""
    marker = tmp_path / "marker"
    torch.save(Attack(marker), tmp_path / "tried.pt")
    torch.load(tmp_path / "tried.pt", weights_only=False)
    marker.rmdir()
    (tmp_path / "tried.pt").unlink()
    yield marker
    assert not marker.exists()


@pytest.fixture
def chat(tiny, tmp_path) -> Path:
    """A chat checkpoint that may be changed."""
    return Path(shutil.copytree(tiny / "model", tmp_path / "chat"))


def edit(file: Path, **fields) -> None:
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(old | fields))


# -- weights -----------------------------------------------------------------------------------------------------------


def pickled(folder: Path, to: Path) -> Path:
    """A checkpoint whose weights are `pytorch_model.bin`."""
    shutil.copytree(folder, to)
    torch.save(load_file(to / "model.safetensors"), to / "pytorch_model.bin")
    (to / "model.safetensors").unlink()
    return to


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])
def test_pickled_weights_run_nothing(tiny, parts, build, tmp_path, marker, chat, old):
    (chat / "model.safetensors").unlink()
    torch.save({"a": Attack(marker)}, chat / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    refused = r"are pickled \(pytorch_model.bin\).*pickle2safetensors.py.*--allow_pickle True"
    for load in (InternVLChatModel.from_pretrained, Checkpoint, lora_config):
        with pytest.raises(ValueError, match=refused):
            load(chat)
    for paths in ((parts / "vit", chat), (chat, parts / "llm")):
        with pytest.raises(ValueError, match=refused):
            compose(*paths)
    with pytest.raises(ValueError, match=refused):
        build("--model_name_or_path", str(chat))
    with pytest.raises(ValueError, match="holds more than data"):
        build("--model_name_or_path", str(chat), "--allow_pickle", "True")
    with pytest.raises(ValueError, match="cannot be read as a state dict"):
        load_projector(InternVLChatModel.from_pretrained(tiny / "model"), chat / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="pytorch_model.bin cannot be read as tensors"):
        pickle2safetensors([str(chat), str(tmp_path / "out")])


def test_tensors_in_a_pickle_are_read_when_allowed(tiny, build, tmp_path):
    folder, model = pickled(tiny / "model", tmp_path / "pickled"), InternVLChatModel.from_pretrained(tiny / "model")
    read = build("--model_name_or_path", str(folder), "--allow_pickle", "True", *LORA)
    assert read.base_checkpoint is None, "it is saved as a whole"
    assert torch.equal(read.mlp1[1].weight, model.mlp1[1].weight)
    pickle2safetensors([str(folder), str(tmp_path / "out")])
    rewritten = InternVLChatModel.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, rewritten[name]) for name, tensor in model.state_dict().items())
    # Safetensors are taken where there are some.
    torch.save({}, tmp_path / "out/pytorch_model.bin")
    build("--model_name_or_path", str(tmp_path / "out"), "--allow_pickle", "True", *LORA)


# -- what JSON names ---------------------------------------------------------------------------------------------------


def index(folder: Path, name: str) -> None:
    names = load_file(folder / "model.safetensors")
    edit(folder / "model.safetensors.index.json", weight_map=dict.fromkeys(names, name))
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")


def pickle_beside(folder: Path, name: str) -> None:
    torch.save(Attack(folder.parent / "marker"), folder / name)


def pickle_as_weights(folder: Path) -> None:
    edit(folder / "config.json", transformers_weights="adapter_model.bin")
    pickle_beside(folder, "adapter_model.bin")


def adapter_beside(folder: Path) -> None:
    edit(folder / "adapter_config.json", peft_type="LORA", r=2, target_modules=["q_proj"])
    pickle_beside(folder, "adapter_model.bin")


def in_llm(folder: Path, **fields) -> None:
    edit(folder / "config.json", llm_config=json.loads((folder / "config.json").read_text())["llm_config"] | fields)


LLM_KERNEL = {"attn_implementation": "stranger/kernel"}
NAMED = {
    "a shard elsewhere": (lambda f: index(f, "../elsewhere.safetensors"), "elsewhere.safetensors.*beside it"),
    "a shard by its absolute name": (lambda f: index(f, "/etc/passwd"), "/etc/passwd.*beside it"),
    "a pickled shard": (lambda f: (pickle_beside(f, "x.bin"), index(f, "x.bin")), "x.bin.*no \\*.safetensors"),
    "a pickle as weights": (pickle_as_weights, "adapter_model.bin.*no safetensors"),
    "attention of a hub": (lambda f: edit(f / "config.json", **LLM_KERNEL), "stranger/kernel.*not run"),
    "the same for the language model": (lambda f: in_llm(f, **LLM_KERNEL), "stranger/kernel.*not run"),
    "experts of a hub": (lambda f: in_llm(f, _experts_implementation="a/b"), "a/b.*not run"),
    "an adapter beside": (adapter_beside, "adapter_config.json beside config.json"),
    "itself as its base": (
        lambda f: edit(f / "config.json", base_model={"path": str(f), "fingerprint": "", "merged": False}),
        "stands on itself",
    ),
    "a list as config": (lambda f: (f / "config.json").write_text("[1]"), "holds a JSON list"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMED)
def test_json_names_nothing_elsewhere(chat, marker, case):
    change, said = NAMED[case]
    change(chat)
    with pytest.raises(ValueError, match=said):
        InternVLChatModel.from_pretrained(chat)


KINDS = {"XLORA": {"adapters": {"1": "/etc"}}, "LORA": {"megatron_config": {"a": 1}, "megatron_core": "antigravity"}}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_plain_lora(tmp_path, kind):
    save_file({}, tmp_path / "adapter_model.safetensors")
    edit(tmp_path / "adapter_config.json", peft_type=kind, r=2, target_modules=["q_proj"], **KINDS[kind])
    with pytest.raises(ValueError, match="not plain LoRA"):
        lora_config(tmp_path)


# -- code that lies beside ---------------------------------------------------------------------------------------------

CODE = """
import os
os.mkdir({marker!r})
from transformers import PreTrainedModel, PreTrainedConfig, PreTrainedTokenizerFast
class Stranger(PreTrainedTokenizerFast): pass
"""
NAMES = ("modeling_x", "configuration_x", "tokenization_x", "processing_x", "custom_generate/generate", "sitecustomize")


def test_code_in_a_checkpoint_is_not_run(chat, marker, tiny, build, monkeypatch):
    monkeypatch.chdir(chat)
    (chat / "custom_generate").mkdir()
    for name in NAMES:
        (chat / f"{name}.py").write_text(CODE.format(marker=str(marker)))
    classes = {"AutoConfig": "configuration_x.Stranger", "AutoModel": "modeling_x.Stranger"}
    classes |= {"AutoModelForCausalLM": "modeling_x.Stranger", "AutoTokenizer": ["tokenization_x.Stranger", None]}
    edit(chat / "config.json", auto_map=classes)
    in_llm(chat, auto_map=classes)
    edit(chat / "tokenizer_config.json", auto_map=classes, trust_remote_code=True)
    edit(chat / "generation_config.json", custom_generate=str(chat), trust_remote_code=True)
    (chat / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    tokenizer = load_tokenizer(chat)
    assert tokenizer("What?").input_ids == load_tokenizer(tiny / "model")("What?").input_ids
    model = build("--model_name_or_path", str(chat), *LORA)
    model.img_context_token_id = 0
    model.generate(input_ids=torch.ones(1, 3, dtype=torch.int64), max_new_tokens=2)
    edit(chat / "tokenizer_config.json", tokenizer_class="Stranger")
    with pytest.raises(ValueError, match="Stranger, which only Python code of the checkpoint defines"):
        load_tokenizer(chat)


def test_a_tokenizer_reads_its_own_folder_alone(chat, tiny, tmp_path):
    """Names of files in its configuration lead nowhere."""
    files = {f"{name}_file": str(tiny / f"model/{name}.json") for name in ("tokenizer", "vocab", "special_tokens_map")}
    edit(chat / "tokenizer_config.json", **files, merges_file=str(tiny / "model/merges.txt"))
    for file in ("tokenizer.json", "vocab.json", "merges.txt"):
        (chat / file).unlink(missing_ok=True)
    for name in ("PreTrainedTokenizerFast", "Qwen2Tokenizer", "LlamaTokenizer", "InternLM2Tokenizer", "GPT2Tokenizer"):
        edit(chat / "tokenizer_config.json", tokenizer_class=name)
        try:
            size = len(load_tokenizer(chat))
        except (ValueError, OSError):
            continue
        assert size < len(load_tokenizer(tiny / "model")) // 2, name


# -- states to go on from ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory) -> Path:
    """The output of a run of two steps without DeepSpeed."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERNVL_CACHE", str(tiny / "cache"))
        run_here(tiny, output, *LORA, "--max_steps", "2", "--save_steps", "2")
    return output


STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def test_states_of_a_checkpoint_run_nothing(tiny, stopped, tmp_path, monkeypatch, marker):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny / "cache"))
    checkpoint = Path(shutil.copytree(stopped / "checkpoint-2", tmp_path / "checkpoint-2"))
    for data in stopped.glob("data-*.npz"):
        shutil.copy(data, tmp_path)
    torch.save(Attack(marker), checkpoint / "training_args.bin")  # nothing opens it
    trainer = prepare([*flags_of(tiny, tmp_path / "out"), *LORA, "--max_steps", "3"])
    for name in STATES:
        kept = (checkpoint / name).read_bytes()
        torch.save({"state": Attack(marker)}, checkpoint / name)
        with pytest.raises(ValueError, match=rf"{name} is no checkpoint's: opening it would call \w+.mkdir"):
            trainer.train(str(checkpoint))
        (checkpoint / name).write_bytes(kept)
    trainer.train(str(checkpoint))
    assert trainer.state.global_step == 3


def test_whoever_loads_gets_data_alone(tmp_path, marker, monkeypatch):
    """DeepSpeed and others ask for everything."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    file = tmp_path / "states.pt"
    torch.save({"a": Attack(marker)}, file)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    config = Namespace(checkpoint_config={"checkpoint_serialization": True})
    for load in (partial(torch.load, weights_only=False), torch.load, TorchCheckpointEngine(config).load):
        with pytest.raises(ValueError, match="holds more than data"), weights_only_loading(deepspeed=True):
            load(file)
    with pytest.raises(ValueError, match=r"states.pt is no checkpoint's: opening it would call \w+.mkdir"):
        refuse_unsafe_pickles(tmp_path)
    states = {"loss_scaler": DynamicLossScaler(1, 2, 3, 4, 5, False, "fp16"), "stage": ZeroStageEnum(2)}
    torch.save(states, file)
    refuse_unsafe_pickles(tmp_path)
    with weights_only_loading(deepspeed=True):
        assert torch.load(file, weights_only=False)["stage"] == 2
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    file.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="states.pt cannot be read as a file of torch.save"):
        refuse_unsafe_pickles(tmp_path)


@pytest.mark.slow
def test_states_of_deepspeed_run_nothing(tiny, tmp_path, marker):
    """Resumed from in a process of its own; a whole checkpoint is gone on from."""
    flags = [*FULL, "--deepspeed", "zero_stage1_config.json", "--save_steps", "2"]
    run(tiny, tmp_path / "out", *flags, "--max_steps", "2")
    (file,) = (tmp_path / "out/checkpoint-2").rglob("*_optim_states.pt")
    kept = file.read_bytes()
    torch.save({"optimizer_state_dict": Attack(marker)}, file)
    (tmp_path / "out/checkpoint-2/manifest.json").unlink(missing_ok=True)  # who wrote the file wrote that, too
    done = run(tiny, tmp_path / "out", *flags, "--max_steps", "3", status=1)
    assert f"{file.name} is no checkpoint's: opening it would call posix.mkdir" in done.stderr
    file.write_bytes(kept)
    run(tiny, tmp_path / "out", *flags, "--max_steps", "3")
    assert len(losses(tmp_path / "out")) == 3


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "absent", ".."])
def test_deepspeeds_files_lie_in_the_checkpoint(tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/latest").write_text(name)
    with pytest.raises(ValueError, match="which is no folder in"):
        find_deepspeed_shards(tmp_path / "checkpoint")
