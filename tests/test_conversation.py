"""Templates render exactly what the published models were trained on."""

import json

import pytest

from internvl.conversation import STYLES, Conversation, SeparatorStyle, conv_templates, get_conv_template


def test_template_fields(goldens):
    templates = json.loads((goldens / "templates.json").read_text(encoding="utf-8"))["templates"]
    assert set(templates) | {"internvl3_5_gpt_oss"} == set(conv_templates)
    for name, fields in templates.items():
        template = get_conv_template(name)
        ours = {field: getattr(template, field) for field in fields}
        assert ours | {"roles": list(ours["roles"]), "sep_style": ours["sep_style"].name} == fields


def test_prompts(goldens):
    rows = [json.loads(line) for line in (goldens / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["template"] for row in rows} | {"internvl3_5_gpt_oss"} == set(conv_templates)
    for row in rows:
        template = get_conv_template(row["template"])
        if row["system_message"] is not None:
            template.set_system_message(row["system_message"])
        for message in row["messages"]:
            template.append_message(template.roles[message["role"] == "assistant"], message["text"])
        assert template.get_prompt() == row["prompt"]


def test_internvl3_5_gpt_oss():
    """The goldens are older than this template: the text that its published checkpoints were trained on."""
    template = get_conv_template("internvl3_5_gpt_oss")
    assert template.sep_style is SeparatorStyle.MPT_TWO and SeparatorStyle.MPT_TWO == 19
    system = (
        "<|start|>system<|message|>You are InternVL, a large language model trained by Shanghai AI Laboratory.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: 2025-08-06\n\nReasoning: low\n\n"
        "# Valid channels: final. Channel must be included for every message.<|end|>"
    )
    said = ["Q1", "<|channel|>final<|message|>A1", "Q2", "<|channel|>final<|message|>A2"]
    for index, text in enumerate(said):
        template.append_message(template.roles[index % 2], text)
    answered = (
        "<|start|>user<|message|>Q1<|end|><|start|>assistant<|channel|>final<|message|>A1<|end|>"
        "<|start|>user<|message|>Q2<|end|><|start|>assistant"
    )
    assert template.get_prompt() == system + answered + "<|channel|>final<|message|>A2<|return|>"
    template.update_last_message(None)
    assert template.get_prompt() == system + answered


@pytest.mark.parametrize("style", SeparatorStyle)
def test_every_style_leaves_a_slot_open_where_the_answer_will_stand(style):
    """What a model is given is the beginning of what it was trained on, up to the space that it writes itself."""
    conversation = Conversation("any", system_message="Be brief.", sep_style=style, sep="|", sep2="||")
    conversation.append_message("USER", "two\n\nlines")
    conversation.append_message("ASSISTANT", None)
    open_prompt = conversation.get_prompt()
    conversation.update_last_message("yes")
    assert conversation.get_prompt().startswith(open_prompt.rstrip(" "))
    assert "Be brief." in open_prompt and "yes" in conversation.get_prompt()
    assert style in STYLES


def test_unknown_names_are_told_with_the_known_ones():
    with pytest.raises(KeyError, match=r"internvl3.*internvl_zh, Hermes-2, internlm2-chat, phi3-chat, internvl2_5"):
        get_conv_template("internvl3")
    with pytest.raises(ValueError, match="99"):
        Conversation("odd", sep_style=99).get_prompt()


def test_a_copy_is_independent():
    first = get_conv_template("internvl2_5")
    first.append_message(first.roles[0], "Hello")
    second = first.copy()
    second.update_last_message("Bye")
    second.append_message(second.roles[1], None)
    assert first.to_openai_api_messages()[1:] == [{"role": "user", "content": "Hello"}]
    assert second.to_gradio_chatbot() == [["Bye", None]]
    assert first.dict()["messages"] == [[first.roles[0], "Hello"]]
    assert not get_conv_template("internvl2_5").messages
