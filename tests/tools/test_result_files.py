"""The files that each tool writes for a base checkpoint with code, licence and card, and for one without."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.base_files import (
    AUTO_MAP,
    CODE_FILES,
    GENERATION_CONFIG,
    PREPROCESSOR_CONFIG,
    SAVED_GENERATION_CONFIG,
    add_base_files,
    edit_json,
    read_generation_config,
)
from helpers.tiny_models import TINY_LLM, TINY_LLMS, make_tiny_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from internvl.model.auxiliary_files import read_auxiliary_files, write_auxiliary_files
from internvl.model.chat_template import save_tokenizer
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import (
    describe_base_checkpoint,
    gather_trained_tensors,
    save_adapter_checkpoint,
)
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tools.convert_to_int8 import main as convert_to_int8
from internvl.tools.extract_mlp import main as extract_mlp
from internvl.tools.extract_vit import main as extract_vit
from internvl.tools.internvl_custom2hf import main as custom2hf
from internvl.tools.internvl_hf2custom import main as hf2custom
from internvl.tools.merge_lora import main as merge_lora
from internvl.tools.pickle2safetensors import main as pickle2safetensors
from internvl.tools.replace_llm import main as replace_llm
from internvl.tools.resize_pos_embed import main as resize_pos_embed
from internvl.tools.write_remote_code import main as write_remote_code

LICENSES = {"LICENSE", "NOTICE.txt"}
CARRIED = {*CODE_FILES, *LICENSES, "preprocessor_config.json"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
WEIGHTS = {"config.json", "model.safetensors"}
CHAT = {*WEIGHTS, *TOKENIZER, "generation_config.json", "README.md"}
HF = {*CHAT, "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"}


@pytest.fixture(scope="module", params=["with code", "without code"])
def base(request, goldens, tmp_path_factory) -> Path:
    """Make a base checkpoint and a run of adapters on it, `base_run`."""
    folder = tmp_path_factory.mktemp("tools") / "base"
    make_tiny_checkpoint(folder, goldens / "tokenizer")
    if request.param == "with code":
        add_base_files(folder)
    model = InternVLChatModel.from_pretrained(folder).requires_grad_(False)
    model.wrap_llm_lora(2, 4)
    model.base_checkpoint, run = describe_base_checkpoint(folder), folder.with_name("base_run")
    save_adapter_checkpoint(model, run, gather_trained_tensors(model))
    save_tokenizer(load_tokenizer(folder), model.config, run)
    write_auxiliary_files(read_auxiliary_files(folder), run, "fine-tuning")
    return folder


def merge(base: Path, out: Path) -> None:
    merge_lora([f"{base}_run", str(out)])


def resize(base: Path, out: Path) -> None:
    resize_pos_embed([str(base), str(out), "112"])


def convert_to_hf(base: Path, out: Path) -> None:
    custom2hf(["--custom_path", str(base), "--save_path", str(out)])


def convert_run_to_hf(base: Path, out: Path) -> None:
    custom2hf(["--custom_path", f"{base}_run", "--save_path", str(out)])


def convert_back(base: Path, out: Path) -> None:
    convert_to_hf(base, out.with_name("hf"))
    hf2custom(["--hf_path", str(out.with_name("hf")), "--save_path", str(out)])


def convert_back_with_reference(base: Path, out: Path) -> None:
    convert_to_hf(base, out.with_name("hf"))
    hf2custom(["--hf_path", str(out.with_name("hf")), "--custom_path", str(base), "--save_path", str(out)])


def extract_vision(base: Path, out: Path) -> None:
    extract_vit([str(base), str(out)])


def extract_projector(base: Path, out: Path) -> None:
    extract_mlp([str(base), str(out)])


def replace(base: Path, out: Path, llm_class=Qwen2ForCausalLM, config_class=Qwen2Config) -> None:
    llm = llm_class(config_class(**TINY_LLM | TINY_LLMS["qwen2"]))
    llm.generation_config.update(eos_token_id=[3, 4], temperature=0.5, do_sample=True)
    llm.save_pretrained(out.with_name("llm"))
    for file in base.glob("tokenizer*"):
        shutil.copy(file, out.with_name("llm"))
    (out.with_name("llm") / "LICENSE").write_text("of the LLM")
    shutil.copytree(base, out.with_name("copy"))
    replace_llm([str(out.with_name("copy")), str(out.with_name("llm"))])
    out.with_name("copy_replace_llm").rename(out)


def replace_by_llama(base: Path, out: Path) -> None:
    replace(base, out, LlamaForCausalLM, LlamaConfig)


def unpickle(base: Path, out: Path) -> None:
    shutil.copytree(base, pickled := out.with_name("pickled"), symlinks=True)
    (pickled / "model.safetensors").unlink()
    torch.save(InternVLChatModel.from_pretrained(base).state_dict(), pickled / "pytorch_model.bin")
    pickle2safetensors([str(pickled), str(out)])


def quantize(base: Path, out: Path) -> None:
    convert_to_int8([str(base), str(out)])


HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
# Tool -> files of the result, without and with the files that the base carries.
RESULTS: dict[Callable, tuple[set[str], set[str]]] = {
    merge: (CHAT, CHAT | CARRIED),
    resize: (CHAT, CHAT | CARRIED),
    convert_to_hf: (HF, HF | LICENSES),
    convert_run_to_hf: (HF, HF | LICENSES),
    convert_back: (CHAT | {"preprocessor_config.json"}, CHAT | {"preprocessor_config.json"} | LICENSES),
    convert_back_with_reference: (CHAT | {"preprocessor_config.json"}, CHAT | CARRIED),
    extract_vision: (WEIGHTS | {"README.md"}, WEIGHTS | {"README.md", "preprocessor_config.json"} | LICENSES),
    extract_projector: ({"mlp_projector.pth"}, {"mlp_projector.pth"} | LICENSES),
    replace: (CHAT | {"LICENSE"}, CHAT | CARRIED | {"LICENSE.language_model"}),
    replace_by_llama: (CHAT | {"LICENSE"}, (CHAT | CARRIED | {"LICENSE.language_model"}) - CODE_FILES.keys()),
    # The tokenizer and the card are copied as they are.
    unpickle: (CHAT - {"README.md", "chat_template.jinja"}, (CHAT | CARRIED) - {"chat_template.jinja"}),
    quantize: (CHAT, CHAT | CARRIED),
}
NOT_INSTALLED = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
TOOLS = [pytest.param(tool, marks=NOT_INSTALLED if tool is quantize else ()) for tool in RESULTS]


@pytest.mark.parametrize("tool", TOOLS)
def test_files_of_results(base, tool, tmp_path, capsys):
    tool(base, tmp_path / "out")
    has_code, out = (base / "LICENSE").exists(), tmp_path / "out"
    is_noted = has_code and tool in (merge, resize, convert_back, convert_back_with_reference)
    assert ("Note: vLLM 0.32 ignores image_mean [0.5, 0.5, 0.5]" in capsys.readouterr().out) == is_noted
    assert {file.name for file in out.iterdir()} == RESULTS[tool][has_code]
    for name in (LICENSES | CODE_FILES.keys()) & {file.name for file in out.iterdir()} if has_code else ():
        assert (out / name).read_bytes() == (base / name).read_bytes()
    if (out / "generation_config.json").exists() and tool is not unpickle:
        assert 999 in read_generation_config(out)["eos_token_id"]  # the template's end mark
    if not has_code or not (out / "config.json").exists():
        return
    auto_map = json.loads((out / "config.json").read_text()).get("auto_map")
    assert auto_map == (AUTO_MAP if (out / "handler.py").exists() else None)
    if (out / "generation_config.json").exists():
        check_generation_config(tool, read_generation_config(out))
    if (out / "preprocessor_config.json").exists():
        settings = json.loads((out / "preprocessor_config.json").read_text())
        assert settings["image_std"] == PREPROCESSOR_CONFIG["image_std"]
        assert "unknown_setting" in settings or not (out / "handler.py").exists()
        tile_size = 112 if tool is resize else 56
        assert settings["size"] in (tile_size, {"height": tile_size, "width": tile_size})


def test_code_files_are_written_with_a_note_about_ignored_settings(base, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "out", symlinks=True)
    edit_json(tmp_path / "out/config.json", pad2square=True)
    write_remote_code([str(tmp_path / "out")])
    assert "pad2square True (it does not pad): its answers differ from chat's." in capsys.readouterr().out


def check_generation_config(tool: Callable, config: dict) -> None:
    """Check that the settings are those of the base, or of the new LLM."""
    if tool in (replace, replace_by_llama):
        assert (config["eos_token_id"], config["temperature"]) == ([3, 4, 999], 0.5)
    elif tool in (convert_to_hf, convert_run_to_hf, convert_back, convert_back_with_reference):
        assert config == SAVED_GENERATION_CONFIG | {"pad_token_id": 997}  # of the tokenizer
    else:
        assert config == (GENERATION_CONFIG if tool is unpickle else SAVED_GENERATION_CONFIG)


def test_stock_transformers_opens_the_configuration_with_the_bases_code(base, tmp_path):
    """In a process without this package."""
    merge(base, tmp_path / "merged")
    program = f"""
from transformers import AutoConfig
config = AutoConfig.from_pretrained({str(tmp_path / "merged")!r}, trust_remote_code=True)
print(type(config).__module__.split(".")[0], config.model_type)
"""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=env)
    if (base / "LICENSE").exists():
        assert done.stdout == "transformers_modules internvl_chat\n", done.stderr
    else:
        assert "internvl_chat" in done.stderr and done.returncode == 1


def test_code_of_the_tokenizer_is_carried(goldens, tmp_path):
    """The tokenizer of InternLM2; without its code, `auto_map` is removed."""
    make_tiny_checkpoint(tmp_path / "base", goldens / "tokenizer_internlm2", "internlm2")
    auto_map = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    edit_json(tmp_path / "base/tokenizer_config.json", auto_map=auto_map)
    for code in ("", "raise SystemExit('run')\n"):
        if code:
            (tmp_path / "base/tokenization_internlm2.py").write_text(code)
        out = tmp_path / f"out{len(code)}"
        resize(tmp_path / "base", out)
        assert (out / "tokenization_internlm2.py").exists() == bool(code)
        config = json.loads((out / "tokenizer_config.json").read_text())
        assert config.get("auto_map") == (auto_map if code else None)


def test_links_that_lead_out_of_the_base_are_not_followed(base, tmp_path, caplog):
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "base/NOTICE").symlink_to(tmp_path / "secret")
    (tmp_path / "base/secret.json").symlink_to(tmp_path / "secret")
    for tool in (resize, unpickle):
        tool(tmp_path / "base", tmp_path / tool.__name__)
        assert not {"NOTICE", "secret.json"} & {file.name for file in (tmp_path / tool.__name__).iterdir()}
    assert "NOTICE' is a link that leads out of its folder" in caplog.text
