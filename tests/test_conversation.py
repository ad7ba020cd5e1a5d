"""Templates render exactly the text that the published models were trained on."""

import json

import pytest

from internvl.conversation import PROMPT_STYLES, Conversation, SeparatorStyle, conv_templates, get_conv_template


def test_recorded_template_fields(goldens):
    templates = json.loads((goldens / "templates.json").read_text(encoding="utf-8"))["templates"]
    assert set(templates) | {"internvl3_5_gpt_oss"} == set(conv_templates)
    for name, fields in templates.items():
        template = get_conv_template(name)
        ours = {field: getattr(template, field) for field in fields}
        assert ours | {"roles": list(ours["roles"]), "sep_style": ours["sep_style"].name} == fields


def test_recorded_prompts(goldens):
    rows = [json.loads(line) for line in (goldens / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["template"] for row in rows} | {"internvl3_5_gpt_oss"} == set(conv_templates)
    for row in rows:
        template = get_conv_template(row["template"])
        if row["system_message"] is not None:
            template.set_system_message(row["system_message"])
        for message in row["messages"]:
            template.append_message(template.roles[message["role"] == "assistant"], message["text"])
        assert template.get_prompt() == row["prompt"]


def test_prompt_of_internvl3_5_gpt_oss():
    """The template is newer than the goldens: the text is written out here."""
    template = get_conv_template("internvl3_5_gpt_oss")
    assert template.sep_style is SeparatorStyle.MPT_TWO and SeparatorStyle.MPT_TWO == 19
    system = (
        "<|start|>system<|message|>You are InternVL, a large language model trained by Shanghai AI Laboratory.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: 2025-08-06\n\nReasoning: low\n\n"
        "# Valid channels: final. Channel must be included for every message.<|end|>"
    )
    messages = ["Q1", "<|channel|>final<|message|>A1", "Q2", "<|channel|>final<|message|>A2"]
    for index, text in enumerate(messages):
        template.append_message(template.roles[index % 2], text)
    until_last_answer = (
        "<|start|>user<|message|>Q1<|end|><|start|>assistant<|channel|>final<|message|>A1<|end|>"
        "<|start|>user<|message|>Q2<|end|><|start|>assistant"
    )
    assert template.get_prompt() == system + until_last_answer + "<|channel|>final<|message|>A2<|return|>"
    template.update_last_message(None)
    assert template.get_prompt() == system + until_last_answer


@pytest.mark.parametrize("style", SeparatorStyle)
def test_inference_prompt_is_the_beginning_of_the_training_text(style):
    """Up to the space after the role, which the model writes itself."""
    conversation = Conversation("any", system_message="Be brief.", sep_style=style, sep="|", sep2="||")
    conversation.append_message("USER", "two\n\nlines")
    conversation.append_message("ASSISTANT", None)
    open_prompt = conversation.get_prompt()
    conversation.update_last_message("yes")
    assert conversation.get_prompt().startswith(open_prompt.rstrip(" "))
    assert "Be brief." in open_prompt and "yes" in conversation.get_prompt()
    assert style in PROMPT_STYLES


def test_unknown_names_are_reported_with_the_supported_ones():
    with pytest.raises(KeyError, match=r"internvl3.*internvl_zh, Hermes-2, internlm2-chat, phi3-chat, internvl2_5"):
        get_conv_template("internvl3")
    with pytest.raises(ValueError, match="99"):
        Conversation("odd", sep_style=99).get_prompt()


def test_copy_is_independent():
    first = get_conv_template("internvl2_5")
    first.append_message(first.roles[0], "Hello")
    second = first.copy()
    second.update_last_message("Bye")
    second.append_message(second.roles[1], None)
    assert first.to_openai_api_messages()[1:] == [{"role": "user", "content": "Hello"}]
    assert second.to_gradio_chatbot() == [["Bye", None]]
    assert first.dict()["messages"] == [[first.roles[0], "Hello"]]
    assert not get_conv_template("internvl2_5").messages
