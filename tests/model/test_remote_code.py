"""Stock transformers opens results by the code files in their folders, and computes what the chat model computes.

One process of each version of transformers opens the results of all tools, for bases with code files and without.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.environments import layer_environment, make_layer_or_skip
from helpers.paths import PACKAGE_DIR
from helpers.tiny_models import TINY_LLM, TINY_LLMS, TINY_VITS, make_tiny_checkpoint, randomize_weights
from huggingface_hub import ModelCard
from packaging.version import Version
from programs import remote_code_answers
from safetensors.torch import save_file
from transformers import AutoTokenizer

from internvl.model import code_files
from internvl.model.auxiliary_files import read_auxiliary_files, write_auxiliary_files
from internvl.model.chat_template import save_tokenizer
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import (
    describe_base_checkpoint,
    gather_trained_tensors,
    save_adapter_checkpoint,
)
from internvl.model.remote_code import configuration_internvl_chat, modeling_internvl_chat
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.model.tokenizers.v4_compat import update_json
from internvl.regular_files import read_json_object
from internvl.tools.internvl_custom2hf import main as custom2hf
from internvl.tools.internvl_hf2custom import main as hf2custom
from internvl.tools.merge_lora import main as merge_lora
from internvl.tools.resize_pos_embed import main as resize_pos_embed
from internvl.tools.write_remote_code import main as write_remote_code

VERSIONS = ("4.37.2", "4.57.6", None)  # None: the installed one
LLMS = {"qwen2": "tokenizer", "internlm2_dynamic": "tokenizer_internlm2", "qwen3": "tokenizer"}
SKIPPED = {("4.37.2", "qwen3"): "transformers has Qwen3 from 4.51 on"}
BASES = ("with code", "without code")
CODE_FILES = {Path(name).name for name in code_files.CODE_FILES}
FLOAT32 = {"torch_dtype": "float32"}
TOOLS_WITH_FLAG = "merge_lora resize_pos_embed replace_llm internvl_hf2custom convert_to_int8 export_adapters".split()
MARK = "# Changed by the author of the base.\n"


def make_base(folder: Path, tokenizer: Path, llm: str, has_code: bool, **fields) -> None:
    """Save a chat checkpoint; its code files are marked, so that rewritten ones are found."""
    make_tiny_checkpoint(folder, tokenizer, llm, **fields)
    save_tokenizer(load_tokenizer(folder), InternVLChatConfig.from_pretrained(folder), folder)
    if has_code:
        write_remote_code([str(folder)])
        for file in folder.glob("*.py"):
            file.write_text(file.read_text() + MARK)


def save_run(model: InternVLChatModel, base: Path, folder: Path, save_fn) -> None:
    """Save a model as a run does."""
    save_fn(folder)
    save_tokenizer(load_tokenizer(base), model.config, folder)
    write_auxiliary_files(read_auxiliary_files(base), folder, "fine-tuning")


# -- results of a base checkpoint; `flag` is empty if the base has code ------------------------------------------------


def merge(base: Path, out: Path, flag: list[str]) -> None:
    model, run = InternVLChatModel.from_pretrained(base).requires_grad_(False), base.with_name(f"{base.name}_run")
    torch.manual_seed(0)
    model.wrap_llm_lora(2, 4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.base_checkpoint = describe_base_checkpoint(base)
    save_run(model, base, run, lambda folder: save_adapter_checkpoint(model, folder, gather_trained_tensors(model)))
    merge_lora([str(run), str(out), *flag])


def fine_tune(base: Path, out: Path, flag: list[str]) -> None:
    model = InternVLChatModel.from_pretrained(base)
    randomize_weights(model, 0.3)
    save_run(model, base, out, model.save_pretrained)
    if flag:
        write_remote_code([str(out)])


def resize(base: Path, out: Path, flag: list[str]) -> None:
    resize_pos_embed([str(base), str(out), "112", *flag])


def convert(base: Path, out: Path, flag: list[str]) -> None:
    hf = out.with_name(f"{out.name}_hf")
    custom2hf(["--custom_path", str(base), "--save_path", str(hf)])
    hf2custom(["--hf_path", str(hf), "--save_path", str(out), "--custom_path", str(base), *flag])


RESULTS = {"merged": merge, "full": fine_tune, "resized": resize, "converted": convert}
# Name -> LLM, other fields of the configuration, auto class and options of `from_pretrained`.
VARIANTS = {
    "6b_v1": ("llama", {"vit": "6B", "ps_version": "v1", "select_layer": -2}, "AutoModelForCausalLM", FLOAT32),
    "linear": ("internlm2_bias_linear", {"template": "internlm2-chat"}, "AutoModel", {"device_map": "cpu", **FLOAT32}),
    "eager": ("llama", {"template": "internvl_zh"}, "AutoModel", {"attn_implementation": "eager", **FLOAT32}),
    "low_memory": ("internlm2_dynamic", {}, "AutoModelForCausalLM", {"low_cpu_mem_usage": True, **FLOAT32}),
    "system_message": ("qwen2", {"template": "phi3-chat", "system_message": "Be brief."}, "AutoModel", FLOAT32),
    "gpt_oss_template": ("qwen2", {"template": "internvl3_5_gpt_oss"}, "AutoModel", FLOAT32),
    "bfloat16": ("qwen2", {}, "AutoModel", {"torch_dtype": "bfloat16"}),
    "bfloat16_internlm2": ("internlm2", {}, "AutoModel", {"torch_dtype": "bfloat16"}),
}


def write_inputs(model: InternVLChatModel, folder: Path) -> None:
    """Write a batch of two prompts with an image each; the second one is padded on the left."""
    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    image = f"<img>{'<IMG_CONTEXT>' * model.num_image_token}</img>"
    inputs = tokenizer([f"Look: {image} what is it?", f"{image}?"], return_tensors="pt", padding=True)
    side, generator = model.config.vision_config.image_size, torch.Generator().manual_seed(0)
    tensors = {"pixel_values": torch.randn(2, 3, side, side, generator=generator)}
    tensors |= {name: inputs[name] for name in ("input_ids", "attention_mask")}
    save_file(tensors, folder / "inputs.safetensors")


@pytest.fixture(scope="module")
def cases(goldens, tmp_path_factory) -> dict[str, dict]:
    """Make all checkpoints; return what the program shall load."""
    root, cases = tmp_path_factory.mktemp("results"), {}

    def add_case(folder: Path, auto_class: str = "AutoModel", options: dict = FLOAT32) -> None:
        write_inputs(InternVLChatModel.from_pretrained(folder), folder)
        cases[folder.name] = {"folder": str(folder), "auto_class": auto_class, "options": options}

    for llm, tokenizer in LLMS.items():
        for base in BASES:
            folder = root / f"base {base} {llm}"
            make_base(folder, goldens / tokenizer, llm, base == "with code")
            for kind, make_fn in RESULTS.items():
                out = root / f"{base} {llm} {kind}"
                make_fn(folder, out, [] if base == "with code" else ["--with_remote_code"])
                add_case(out)
    for name, (llm, fields, auto_class, options) in VARIANTS.items():
        make_base(root / name, goldens / LLMS.get(llm, "tokenizer"), llm, has_code=True, **fields)
        add_case(root / name, auto_class, options)
    cases["lmdeploy"] = {**cases["6b_v1"], "auto_class": "from_config"}
    return cases


@pytest.fixture(scope="module")
def expected(cases) -> dict[str, dict]:
    """The answers of InternVLChatModel."""
    answers = {}
    for name, case in cases.items():
        dtype = getattr(torch, case["options"]["torch_dtype"])
        model, folder = InternVLChatModel.from_pretrained(case["folder"], dtype=dtype).eval(), Path(case["folder"])
        inputs = remote_code_answers.load_file(folder / "inputs.safetensors")
        if case["auto_class"] == "from_config":
            with torch.no_grad():
                answers[name] = {"features": model.extract_feature(inputs["pixel_values"]).tolist()}
        else:
            answers[name] = {"problems": {}, **remote_code_answers.answer(model, load_tokenizer(folder), inputs)}
    return answers


@pytest.fixture(scope="module", params=VERSIONS, ids=str)
def answered(request, cases, tmp_path_factory) -> tuple[str | None, dict[str, dict]]:
    """The version of transformers, and its answers."""
    version, folder = request.param, tmp_path_factory.mktemp("answers")
    python = make_layer_or_skip(f"transformers-{version}", [f"transformers=={version}"]) if version else sys.executable
    chosen = {name: case for name, case in cases.items() if not any((version, w) in SKIPPED for w in name.split())}
    (folder / "cases.json").write_text(json.dumps(chosen))
    command = [python, remote_code_answers.__file__, folder / "cases.json", folder / "out.json"]
    environment = layer_environment(Path(python), HF_MODULES_CACHE=str(folder / "modules"), HF_HUB_OFFLINE="1")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return version, json.loads((folder / "out.json").read_text())


def assert_same_answers(actual: dict, expected: dict) -> None:
    for name in ("logits", "features"):
        torch.testing.assert_close(torch.tensor(actual.pop(name, 0)), torch.tensor(expected.get(name, 0)))
    assert actual == {name: value for name, value in expected.items() if name not in ("logits", "features")}


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", RESULTS)
@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("base", BASES)
def test_stock_classes_open_every_result(answered, expected, base, llm, kind):
    version, answers = answered
    if reason := SKIPPED.get((version, llm)):
        pytest.skip(reason)
    name = f"{base} {llm} {kind}"
    assert_same_answers(answers[name], expected[name])


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", [*VARIANTS, "lmdeploy"])
def test_stock_classes_open_every_variant(answered, expected, name):
    assert_same_answers(answered[1][name], expected[name])


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", RESULTS)
@pytest.mark.parametrize("base", BASES)
def test_code_of_the_base_is_carried_over(cases, base, kind):
    folder = Path(cases[f"{base} qwen2 {kind}"]["folder"])
    assert {file.name for file in folder.glob("*.py")} == CODE_FILES
    marks = {file.read_text().endswith(MARK) for file in folder.glob("*.py")}
    assert marks == {base == "with code"}
    assert read_json_object(folder / "config.json")["auto_map"] == code_files.AUTO_MAP


# -- the files themselves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("llm", ["qwen2", "internlm2_bias_linear", "internlm2_dynamic"])
@pytest.mark.parametrize("vit", TINY_VITS)
def test_both_implementations_agree_bitwise(llm, vit):
    torch.manual_seed(0)
    config = InternVLChatConfig(TINY_VITS[vit], TINY_LLM | TINY_LLMS[llm], template="internvl2_5")
    model = InternVLChatModel(config).eval()
    randomize_weights(model, 0.3)
    model.bfloat16()
    fields = model.config.to_dict()
    other = modeling_internvl_chat.InternVLChatModel(configuration_internvl_chat.InternVLChatConfig(**fields)).eval()
    other.bfloat16().load_state_dict(model.state_dict())
    tiles = torch.randn(2, 3, 70, 70).bfloat16()  # position embeddings are resized
    ids, mask = torch.randint(3, 900, (2, 40)), torch.ones(2, 40, dtype=torch.long)
    with torch.no_grad():
        states = [m.vision_model(tiles, output_hidden_states=True).hidden_states for m in (model, other)]
        logits = [m(None, ids, mask).logits for m in (model, other)]
        features = [m.extract_feature(tiles[:, :, :56, :56]) for m in (model, other)]
    # The kernels of torch < 2.9 round a masked attention otherwise: by two units of bf16.
    tolerance = 0 if Version(torch.__version__) >= Version("2.9") else 0.02
    for actual, expected in [*zip(*states, strict=True), logits, features]:
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max())


def test_files_import_only_one_another(goldens, tmp_path):
    make_base(tmp_path, goldens / "tokenizer", "qwen2", has_code=True)
    imports = {}
    for file in tmp_path.glob("*.py"):
        text = file.read_text()
        assert not re.search(r"^\s*(from|import) internvl", text, re.MULTILINE), file.name
        imports[file.name] = {f"{name}.py" for name in re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE)}
    assert set(imports) == CODE_FILES
    # transformers 4 and 5.10 copy the files that an entry of `auto_map` imports, and not what these import.
    for entry in ("configuration_internvl_chat.py", "modeling_internvl_chat.py"):
        needed = {name for imported in imports[entry] for name in imports[imported]}
        assert needed <= imports[entry] <= CODE_FILES


def test_nothing_imports_the_files():
    for file in (file for folder in ("internvl", "tools") for file in (PACKAGE_DIR / folder).glob("**/*.py")):
        if file.parent.name != "remote_code":
            assert "internvl.model.remote_code" not in file.read_text(), file


def test_own_code_is_kept(goldens, tmp_path, capsys):
    make_base(tmp_path, goldens / "tokenizer", "qwen2", has_code=True)
    write_remote_code([str(tmp_path)])
    assert "no code files are written" in capsys.readouterr().out
    assert all(file.read_text().endswith(MARK) for file in tmp_path.glob("*.py"))
    (tmp_path / "modeling_internvl_chat.py").unlink()  # `auto_map` names a file that is missing
    write_remote_code([str(tmp_path)])
    assert not any(file.read_text().endswith(MARK) for file in tmp_path.glob("*.py"))


@pytest.mark.parametrize("on_the_hub", [("AutoConfig",), ("AutoModel",), tuple(code_files.AUTO_MAP)])
def test_code_on_the_hub_is_replaced_on_request_only(goldens, tmp_path, on_the_hub):
    base, plain, complete = (tmp_path / name for name in ("base", "plain", "complete"))
    make_base(base, goldens / "tokenizer", "qwen2", has_code=True)
    auto_map = code_files.AUTO_MAP | {name: f"ORG/NAME--{code_files.AUTO_MAP[name]}" for name in on_the_hub}
    update_json(base / "config.json", auto_map=auto_map)
    resize_pos_embed([str(base), str(plain), "56"])
    resize_pos_embed([str(base), str(complete), "56", "--with_remote_code"])
    assert read_json_object(plain / "config.json")["auto_map"] == auto_map
    assert read_json_object(complete / "config.json")["auto_map"] == code_files.AUTO_MAP
    assert {file.name for file in complete.glob("*.py")} == CODE_FILES
    assert not any(file.read_text().endswith(MARK) for file in complete.glob("*.py"))
    assert "with the code that opens it" in (complete / "README.md").read_text()
    assert ("with code from ORG/NAME" in (plain / "README.md").read_text()) == ("AutoModel" in on_the_hub)


CARD = """\
---
license: other
license_name: Qwen License (v1)
license_link: https://a/b/LICENSE#x
base_model: [ORG/A, ORG/B]
---
"""


@pytest.mark.parametrize("is_edited", [False, True])
def test_card_of_a_tool_is_adapted_unless_a_user_changed_it(goldens, tmp_path, is_edited):
    base, folder = tmp_path / "base", tmp_path / "out"
    make_base(base, goldens / "tokenizer", "qwen2", has_code=False)
    (base / "README.md").write_text(CARD)
    resize_pos_embed([str(base), str(folder), "56"])
    folder = folder.rename(tmp_path / "renamed")
    card = folder / "README.md"
    if is_edited:
        card.write_text(card.read_text() + "\nMine.\n")
    before = ModelCard.load(card)
    write_remote_code([str(folder)])
    after = ModelCard.load(card)
    if is_edited:
        assert after.content == before.content
        return
    assert after.data.tags == ["internvl", "custom_code"] and before.data.tags == ["internvl"]
    assert after.data.to_dict() == before.data.to_dict() | {"tags": after.data.tags}
    assert (after.data.license_name, after.data.license_link) == ("Qwen License (v1)", "https://a/b/LICENSE#x")
    assert "trust_remote_code=True" in after.text and "from internvl" not in after.text
    write_remote_code([str(folder)])  # the code is there
    assert ModelCard.load(card).content == after.content


def test_adapters_are_refused(goldens, tmp_path):
    model = make_tiny_checkpoint(tmp_path, goldens / "tokenizer")
    model.wrap_llm_lora(2, 4)
    model.config.use_llm_lora = 2
    model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="merge them first"):
        write_remote_code([str(tmp_path)])
    assert not list(tmp_path.glob("*.py"))


@pytest.mark.parametrize("name", ["tokenizer_internlm2", "tokenizer_internlm2_prefix"])
def test_internlm2_tokenizer_needs_no_code(goldens, tmp_path, name, monkeypatch):
    make_base(tmp_path, goldens / name, "internlm2", has_code=True)
    monkeypatch.setattr("builtins.input", None)  # to ask whether code may run
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert not type(tokenizer).__module__.startswith("internvl")
    for line in (goldens / name / "encodings.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert tokenizer(record["text"]).input_ids == record["ids"]
        assert tokenizer.decode(record["ids"], skip_special_tokens=True) == record["decoded_skip_special"]


def test_flag_is_in_every_tool_that_writes_a_chat_checkpoint():
    tools = {file.stem for file in (PACKAGE_DIR / "tools").glob("*.py") if "add_remote_code_flag" in file.read_text()}
    assert tools == {
        "merge_lora",
        "resize_pos_embed",
        "replace_llm",
        "internvl_hf2custom",
        "convert_to_int8",
        "export_adapters",
    }
