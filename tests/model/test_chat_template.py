"""Chat templates give the prompt of `chat`, as text and as ids."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.environments import layer_environment, make_layer_or_skip
from helpers.tiny_models import make_tiny_checkpoint
from PIL import Image
from programs import render_chat_template
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from internvl.constants import IMG_CONTEXT_TOKEN
from internvl.conversation import PROMPT_STYLES, Conversation, conv_templates, get_conv_template
from internvl.model.chat_template import build_jinja_chat_template, save_tokenizer, set_chat_template
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.model.tokenizers.v4_compat import update_json
from internvl.tools.internvl_custom2hf import main as custom2hf
from internvl.tools.internvl_hf2custom import main as hf2custom
from internvl.tools.merge_lora import main as merge_lora
from internvl.tools.replace_llm import main as replace_llm
from internvl.tools.resize_pos_embed import main as resize_pos_embed

TOKENIZERS = ["tokenizer", "tokenizer_internlm2", "tokenizer_internlm2_prefix", "tokenizer_phi3", "tokenizer_phi3_fast"]
SYSTEM_MESSAGE = 'Be {{ brief }}, {% raw %} "你" \\ \r\n.'
TEMPLATES = {name: get_conv_template(name) for name in conv_templates}
TEMPLATES |= {
    f"{style.name}, system {system!r}": Conversation(
        "chatglm2" if system else "other", system, SYSTEM_MESSAGE, ("Q", "A"), sep_style=style, sep="|", sep2="||"
    )
    for style in PROMPT_STYLES
    for system in ("", "{system_message}", "<s>{system_message}!")
}
# Lists of (role, text).
DIALOGUES = [
    [("user", "two\n\nlines\r\n{{ x }} {% endif %}")],
    [("user", "Q1"), ("assistant", "A1")],
    [("user", "Q1"), ("assistant", " A1\n"), ("user", "<image>\n你好"), ("assistant", "A2"), ("user", "Q3")],
    [("user", "Q1"), ("assistant", ""), ("user", "Q2"), ("assistant", "A2")],
    [("user", "")],
    [("assistant", "A0"), ("user", "Q1"), ("assistant", "A1")],
    [("user", "Q1"), ("user", "Q2")],
]


def render(jinja_template: str, messages: list[dict], add_generation_prompt: bool = True) -> str:
    prompts, _ = render_jinja_template(
        [messages], chat_template=jinja_template, add_generation_prompt=add_generation_prompt
    )
    return prompts[0]


def make_messages(dialogue, system_message: str | None = None) -> list[dict]:
    turns = dialogue if system_message is None else [("system", system_message), *dialogue]
    return [{"role": role, "content": text} for role, text in turns]


def make_prompt(template: Conversation, dialogue, system_message: str | None, add_generation_prompt: bool) -> str:
    conversation = template.copy()
    if system_message is not None:
        conversation.set_system_message(system_message)
    for role, text in dialogue:
        conversation.append_message(conversation.roles[role == "assistant"], text)
    if add_generation_prompt:
        conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_text_equals_get_prompt(name):
    """With texts as strings and as parts, as engines pass them."""
    jinja_template = build_jinja_chat_template(TEMPLATES[name])
    for dialogue in DIALOGUES:
        for system_message in (None, "", SYSTEM_MESSAGE):
            messages = make_messages(dialogue, system_message)
            parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
            for add_generation_prompt in (False, True):
                prompt = make_prompt(TEMPLATES[name], dialogue, system_message, add_generation_prompt)
                for same_messages in (messages, parts):
                    assert render(jinja_template, same_messages, add_generation_prompt) == prompt, dialogue


@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("template_name", conv_templates)
def test_ids_equal_those_of_chat(template_name, tokenizer_name, goldens):
    """Tokenizers of InternLM2 and Llama begin a text with <s>, and some with a space."""
    tokenizer, template = load_tokenizer(goldens / tokenizer_name), get_conv_template(template_name)
    set_chat_template(tokenizer, SimpleNamespace(template=template_name, system_message="Be brief."))
    for dialogue in DIALOGUES[:3]:
        for system_message in (None, " "):
            prompt = make_prompt(template, dialogue, system_message or "Be brief.", True)
            messages = make_messages(dialogue, system_message)
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tools=[], return_dict=False)
            assert ids == tokenizer(prompt).input_ids, dialogue
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            assert text.removesuffix(prompt) in ("", "<s>", "<s> ")


@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
def test_ids_of_the_processor_equal_those_of_chat(tokenizer_name, goldens, tmp_path):
    fields = {"template": "phi3-chat", "system_message": "Be brief."}
    model = make_tiny_checkpoint(tmp_path / "chat", goldens / tokenizer_name, **fields)
    custom2hf(["--custom_path", str(tmp_path / "chat"), "--save_path", str(tmp_path / "hf")])
    processor, tokenizer = AutoProcessor.from_pretrained(tmp_path / "hf"), load_tokenizer(tmp_path / "chat")
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    for dialogue in DIALOGUES[:2]:
        expected = tokenizer(make_prompt(get_conv_template("phi3-chat"), dialogue, "Be brief.", True)).input_ids
        assert processor.apply_chat_template(make_messages(dialogue), **options)["input_ids"] == [expected]
    image = {"type": "image", "image": Image.new("RGB", (56, 56))}
    messages = [{"role": "user", "content": [image, text_part("What?")]}]
    prompt = make_prompt(get_conv_template("phi3-chat"), [("user", "<image>\nWhat?")], "Be brief.", True)
    prompt = prompt.replace("<image>", f"<img>{IMG_CONTEXT_TOKEN * model.num_image_token}</img>")
    assert processor.apply_chat_template(messages, **options)["input_ids"] == [tokenizer(prompt).input_ids]


IMAGE = {"type": "image"}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


# Content -> question of `chat`, or None if it is the text of the content.
CONTENTS = [
    ([IMAGE, text_part("What?")], None),
    ([IMAGE, {"type": "image_url", "image_url": {"url": "x"}}, text_part("Which is "), text_part("larger?")], None),
    ([text_part("Is this "), IMAGE, text_part("this? "), IMAGE], "Is this <image>\nthis? <image>\n"),
    ([text_part("Frame1: "), IMAGE, text_part("Frame2: "), IMAGE], "Frame1: <image>\nFrame2: <image>\n"),
    ([IMAGE, IMAGE, text_part("<image> or <image>, not <image>?")], None),
    ("First <image>, second <image>.", "First <image>, second <image>."),
]


@pytest.mark.parametrize("number", range(len(CONTENTS)))
def test_images_are_placed_as_by_chat(number, goldens, capsys):
    """In the first question and in a history, in the chat and the HF layout."""
    content, question = CONTENTS[number]
    model, tokenizer = InternVLChatModel.from_pretrained(goldens / "e2e/qwen2"), load_tokenizer(goldens / "tokenizer")
    pixels = next(iter(load_file(goldens / "e2e/chat_pixels.safetensors").values()))
    num_images = 1 if number == 0 else 2
    typed = "".join(part.get("text", "") for part in content) if question is None else question
    options, tiles = {"max_new_tokens": 1, "do_sample": False}, {"num_patches_list": [1] * num_images}
    answer, history = model.chat(tokenizer, pixels[:num_images], typed, options, None, True, verbose=True, **tiles)
    model.chat(tokenizer, pixels[:num_images], "And now?", options, history, verbose=True, **tiles)
    printed = capsys.readouterr().out
    dialogue = [{"role": "user", "content": content}]
    longer = [*dialogue, {"role": "assistant", "content": answer}, {"role": "user", "content": "And now?"}]
    template = get_conv_template(model.template)
    jinja_template = build_jinja_chat_template(template)
    assert printed == "".join(f"{render(jinja_template, messages)}\n" for messages in (dialogue, longer))
    hf_prompt = render(build_jinja_chat_template(template, IMG_CONTEXT_TOKEN), dialogue)
    chat_prompt = render(jinja_template, dialogue).replace("<image>", IMG_CONTEXT_TOKEN, num_images)
    assert hf_prompt == chat_prompt


def test_unsupported_messages_are_errors():
    jinja_template = build_jinja_chat_template(get_conv_template("internvl2_5"))
    for messages, error in [
        ([("user", "Q"), ("tool", "7")], "message 2 is from tool: expected user or assistant, or system first"),
        ([("user", "Q"), ("system", "S")], "message 2 is from system: expected user or assistant, or system first"),
        ([("user", [IMAGE, IMAGE, text_part("<image>?")])], "2 images, but 1 <image> in the text"),
        ([("user", [{"type": "audio"}])], "a part of type audio is not supported: expected text, image or video"),
    ]:
        with pytest.raises(Exception, match=error):
            render(jinja_template, make_messages(messages))
    assert render(jinja_template, [{"role": "user", "content": [{"type": "video"}, text_part("Q")]}]).endswith(
        "<|im_start|>user\n<video>\nQ<|im_end|>\n<|im_start|>assistant\n"
    )


# -- saved tokenizers --------------------------------------------------------------------------------------------------

OTHER_TEMPLATES = [{"name": name, "template": f"{{{{ '{name}' }}}}"} for name in ("default", "tool_use")]


def merge(base: Path, out: Path) -> None:
    model = InternVLChatModel.from_pretrained(base)
    model.config.use_llm_lora = 2
    model.wrap_llm_lora(2, 4)
    model.save_pretrained(base)
    merge_lora([str(base), str(out)])


def resize(base: Path, out: Path) -> None:
    resize_pos_embed([str(base), str(out), "112"])


def replace(base: Path, out: Path) -> None:
    replace_llm([str(base), str(base / "llm")])
    Path(f"{base}_replace_llm").rename(out)


def convert(base: Path, out: Path, *arguments: str) -> None:
    hf = out.with_name("hf")
    custom2hf(["--custom_path", str(base), "--save_path", str(hf)])
    hf2custom(["--hf_path", str(hf), "--save_path", str(out), *arguments])


def convert_with_reference(base: Path, out: Path) -> None:
    convert(base, out, "--custom_path", str(base))


@pytest.fixture
def base(tmp_path, goldens):
    """Save a chat model whose tokenizer has templates of another model, and its LLM."""
    fields = {"template": "Hermes-2", "system_message": "Be kind."}
    model = make_tiny_checkpoint(tmp_path / "base", goldens / "tokenizer", **fields)
    config = json.loads((tmp_path / "base/tokenizer_config.json").read_text())
    (tmp_path / "base/tokenizer_config.json").write_text(json.dumps(config | {"chat_template": OTHER_TEMPLATES}))
    (tmp_path / "base/chat_template.jinja").write_text("{{ 'other' }}")
    model.language_model.save_pretrained(tmp_path / "base/llm")
    load_tokenizer(tmp_path / "base").save_pretrained(tmp_path / "base/llm")
    return tmp_path / "base"


@pytest.mark.parametrize("tool", [merge, resize, replace, convert, convert_with_reference])
def test_results_have_the_template_of_their_model(tool, base, tmp_path):
    tool(base, tmp_path / "out")
    template = get_conv_template("Hermes-2")
    assert_reads_template(tmp_path / "out", prompt := make_prompt(template, DIALOGUES[2], "Be kind.", True))
    if tool is convert:
        assert_reads_template(tmp_path / "hf", prompt.replace("<image>", IMG_CONTEXT_TOKEN))
        processor = AutoProcessor.from_pretrained(tmp_path / "hf")
        assert processor.chat_template == processor.tokenizer.chat_template


def assert_reads_template(folder, prompt: str) -> None:
    """transformers 4.37 reads tokenizer_config.json, newer versions the other file."""
    stored = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert stored == (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for tokenizer in (load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)):
        assert tokenizer.chat_template == stored
        messages = make_messages(DIALOGUES[2])
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == prompt


# Class in tokenizer_config.json -> tokenizer of the goldens. Those ending in "slow" are loaded with `use_fast=False`.
SAVED_CLASSES = {
    "PreTrainedTokenizerFast": "tokenizer",
    "Qwen2TokenizerFast": "tokenizer",
    "Qwen2Tokenizer slow": "tokenizer",
    "LlamaTokenizer slow": "tokenizer_phi3",
    "LlamaTokenizerFast": "tokenizer",  # as in models of Llama 3
    "GPT2Tokenizer": "tokenizer",  # a class that `load_tokenizer` leaves to AutoTokenizer
}


@pytest.mark.multiprocess
@pytest.mark.parametrize("version", ["4.37.2", "4.57.6", None])
def test_all_versions_of_transformers_read_the_same_template(version, goldens, tmp_path):
    python = Path(sys.executable)
    if version:
        python = make_layer_or_skip(f"transformers-{version}", [f"transformers=={version}"])
    expected = {}
    for name, source in SAVED_CLASSES.items():
        shutil.copytree(goldens / source, tmp_path / "base" / name, copy_function=shutil.copyfile)
        update_json(tmp_path / "base" / name / "tokenizer_config.json", tokenizer_class=name.removesuffix(" slow"))
        tokenizer = load_tokenizer(tmp_path / "base" / name)
        save_tokenizer(tokenizer, SimpleNamespace(template="phi3-chat", system_message="Be kind."), tmp_path / name)
        options = {"add_generation_prompt": True, "tokenize": False}
        text = tokenizer.apply_chat_template(render_chat_template.MESSAGES, **options)
        expected[str(tmp_path / name)] = [text, tokenizer(text, add_special_tokens=False).input_ids]
    command = [python, render_chat_template.__file__, tmp_path / "out.json", *expected]
    done = subprocess.run(command, capture_output=True, text=True, env=layer_environment(python))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text()) == expected
