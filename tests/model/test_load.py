"""Published checkpoint folders load without running their code files."""

import json
import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from internvl.conversation import get_conv_template
from internvl.model import load_model_and_tokenizer
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.tokenizers.loading import load_tokenizer

CODE_FILES = ["configuration_internvl_chat", "modeling_internvl_chat", "configuration_llm", "modeling_llm"]
CODE_FILES += ["tokenization_internlm2"]
AUTO_MAP = {
    "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
    "AutoModel": "modeling_internvl_chat.InternVLChatModel",
    "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
}
LLM_AUTO_MAP = {"AutoConfig": "configuration_llm.Config", "AutoModelForCausalLM": "modeling_llm.Model"}


@pytest.fixture
def checkpoint(e2e_case, goldens, tmp_path):
    """Create a checkpoint whose code files write a file `trace` when run."""
    folder = tmp_path / "checkpoint"
    golden = json.loads((e2e_case / "expected.json").read_text())
    shutil.copytree(goldens / golden["tokenizer"], folder)
    shutil.copytree(e2e_case, folder, dirs_exist_ok=True)
    shutil.copy(goldens / "e2e" / "chat_pixels.safetensors", folder)
    for file in CODE_FILES:
        (folder / f"{file}.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\nraise ImportError('run')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": AUTO_MAP, "llm_config": config["llm_config"] | {"auto_map": LLM_AUTO_MAP}}
    (folder / "config.json").write_text(json.dumps(config))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    yield folder
    assert not (tmp_path / "trace").exists(), "code in the checkpoint was run"


def load_for_evaluation(checkpoint):
    return load_model_and_tokenizer(
        SimpleNamespace(checkpoint=checkpoint, auto=False, load_in_8bit=False, load_in_4bit=False)
    )


def test_loading_runs_no_code_in_the_checkpoint(checkpoint, tmp_path):
    """Check it after saving, too, which keeps the file names in `auto_map`."""
    InternVLChatConfig.from_pretrained(checkpoint)
    model, tokenizer = InternVLChatModel.from_pretrained(checkpoint), load_tokenizer(checkpoint)
    for file in CODE_FILES:
        shutil.copy(checkpoint / f"{file}.py", tmp_path)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    new_model, new_tokenizer = load_for_evaluation(tmp_path)
    assert type(new_model) is type(model) and type(new_tokenizer) is type(tokenizer)


def test_answers_equal_the_recorded_ones(checkpoint):
    model, tokenizer = load_for_evaluation(checkpoint)
    # `load_model_and_tokenizer` loads bfloat16; the answers were recorded in float32.
    model.float().load_state_dict(load_file(checkpoint / "model.safetensors"))
    golden = json.loads((checkpoint / "expected.json").read_text())
    pixels = next(iter(load_file(checkpoint / "chat_pixels.safetensors").values()))
    separator = get_conv_template(golden["template"]).sep.strip()
    rows = [row for row in golden["chat"] if "error" not in row]
    for row in rows:
        tiles = pixels[: row["n_tiles"]].to(model.device) if row["n_tiles"] else None
        history = row["history"] and [tuple(pair) for pair in row["history"]]
        options = {"max_new_tokens": 6, "do_sample": False}
        answer = model.chat(
            tokenizer, tiles, row["question"], options, history, num_patches_list=row["num_patches_list"]
        )
        recorded = tokenizer.decode(row["new_tokens"][1:], skip_special_tokens=True)
        assert answer == recorded.split(separator)[0].strip(), row["question"]
    assert rows


def test_tokenizer_that_only_code_defines_is_an_error(goldens, tmp_path):
    """InternVL3-9B has one. transformers would load another tokenizer from its files."""
    shutil.copytree(goldens / "tokenizer_internlm2", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "InternLM3Tokenizer"
    config["auto_map"] = {"AutoTokenizer": ["tokenization_internlm3.InternLM3Tokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="InternLM3Tokenizer in .*: only Python code.*is not run.*tokenizer.json"):
        load_tokenizer(tmp_path)
