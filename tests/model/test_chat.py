"""`chat` and `batch_chat`: upstream's answers, batches, streaming, ends of answers, errors."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LogitsProcessor

from internvl.conversation import get_conv_template
from internvl.model.compose import add_special_tokens
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.tokenizers.loading import load_tokenizer

GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def chat_case(e2e_case, goldens):
    golden = json.loads((e2e_case / "expected.json").read_text())
    model = InternVLChatModel.from_pretrained(e2e_case)
    pixels = next(iter(load_file(goldens / "e2e" / "chat_pixels.safetensors").values()))
    return model, load_tokenizer(goldens / golden["tokenizer"]), pixels, golden


def test_answers_equal_upstreams(chat_case):
    """Recorded ids begin with a placeholder of transformers 4: skip it."""
    model, tokenizer, pixels, golden = chat_case
    separator = get_conv_template(golden["template"]).sep.strip()
    for row in golden["chat"]:
        history = row["history"] and [tuple(pair) for pair in row["history"]]
        tiles = pixels[: row["n_tiles"]] if row["n_tiles"] else None
        arguments = (tokenizer, tiles, row["question"], GREEDY, history, True, row["num_patches_list"])
        if "error" in row:
            with pytest.raises(ValueError):
                model.chat(*arguments)
            continue
        answer, new_history = model.chat(*arguments)
        text = tokenizer.decode(row["new_tokens"][1:], skip_special_tokens=True)
        assert answer == text.split(separator)[0].strip(), row
        assert len(new_history) == len(history or []) + 1 and new_history[-1][1] == answer
        assert new_history[:-1] == (history or [])


def test_batched_answers_equal_single_answers(chat_case):
    """Text only, one image, several images, with history.

    Prompts differ in length and are padded.
    """
    model, tokenizer, pixels, _ = chat_case
    dialogues = [
        ("Hello", [], None),
        ("Describe the image.", [2], None),
        ("Compare <image> with <image>\nin one word.", [1, 2], None),
        ("And now?", [1], [("<image>\nWhat is this?", "A tree.")]),
    ]
    questions, patches, histories = (list(column) for column in zip(*dialogues, strict=True))
    ends = [sum(map(sum, patches[: i + 1])) for i in range(len(patches))]
    pixels = torch.cat([pixels, pixels, pixels])[: ends[-1]]
    single = []
    for end, (question, tiles, history) in zip(ends, dialogues, strict=True):
        own_pixels = pixels[end - sum(tiles) : end] if tiles else None
        single.append(model.chat(tokenizer, own_pixels, question, GREEDY, history, num_patches_list=tiles))
    side = tokenizer.padding_side
    batched, new_histories = model.batch_chat(
        tokenizer, pixels, questions, GREEDY, patches, histories, return_history=True
    )
    assert batched == single and len(set(single)) > 1
    assert tokenizer.padding_side == side
    assert [len(history) for history in new_histories] == [1, 1, 1, 2]
    assert model.batch_chat(tokenizer, pixels[:2], questions[1:2], GREEDY, num_patches_list=[2]) == single[1:2]
    assert model.batch_chat(tokenizer, None, questions[:1], GREEDY) == single[:1]


def test_a_tokenizer_without_padding_and_end_token(chat_case):
    """Single answers and padded rows of a batch are the same; a template's separator still ends them."""
    model, tokenizer, pixels, _ = chat_case
    questions = ["Hello", "What is the colour of this?"]
    expected = [model.chat(tokenizer, None, question, GREEDY) for question in questions]
    tokenizer.pad_token = tokenizer.eos_token = None
    assert tokenizer.pad_token_id is None
    assert model.batch_chat(tokenizer, None, questions, GREEDY) == expected
    assert [model.chat(tokenizer, None, question, GREEDY) for question in questions] == expected


def test_generation_config_is_not_modified_and_streams(chat_case):
    model, tokenizer, pixels, _ = chat_case

    class Streamer:
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ids.append("end")

    streamer = Streamer()
    config = {**GREEDY, "streamer": streamer}
    before = dict(config)
    answer = model.chat(tokenizer, pixels[:1], "What is this?", config)
    assert config == before
    assert streamer.ids.pop() == "end"
    assert tokenizer.decode(streamer.ids, skip_special_tokens=True).strip().startswith(answer[:3])


def test_answers_end_at_the_tokenizers_end_token(chat_case):
    """Upstream stops at the template's separator only."""
    model, tokenizer, _, golden = chat_case
    ids = next(row["new_tokens"][1:] for row in golden["chat"] if row["question"] == "Hello")
    assert len(model.chat(tokenizer, None, "Hello", GREEDY)) > len(tokenizer.decode(ids[:2]))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[1])
    assert model.chat(tokenizer, None, "Hello", GREEDY) == tokenizer.decode(ids[:1]).strip()


class ForcedOutput(LogitsProcessor):
    """Makes each row of a batch generate given ids."""

    def __init__(self, *rows):
        self.rows = rows
        self.step = 0

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(self.rows):
            forced[row, ids[min(self.step, len(ids) - 1)]] = 0
        self.step += 1
        return forced


def test_gpt_oss_answers_keep_their_channels(goldens, capsys):
    """InternVL 3.5's upstream returns them, and the next prompt needs them."""
    model = InternVLChatModel.from_pretrained(goldens / "e2e" / "qwen2")
    tokenizer = load_tokenizer(goldens / "tokenizer")
    markers = ["<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>"]
    add_special_tokens(model, tokenizer, markers)
    model.template, template = "internvl3_5_gpt_oss", get_conv_template("internvl3_5_gpt_oss")
    model.system_message = template.system_message
    short = "<|channel|>final<|message|>A cat."
    long = "<|channel|>analysis<|message|>A tail.<|end|><|start|>assistant<|channel|>final<|message|>A <ref>cat</ref>."
    ends = ["<|return|>", tokenizer.eos_token]
    forced_output = ForcedOutput(
        *(tokenizer(text + end).input_ids for text, end in zip((short, long), ends, strict=True))
    )
    options = {"max_new_tokens": 60, "do_sample": False, "logits_processor": [forced_output]}
    answers, histories = model.batch_chat(tokenizer, None, ["Q1", "Q1"], options, return_history=True)
    assert answers == [short, long]
    model.chat(tokenizer, None, "Q2", GREEDY, history=histories[0], verbose=True)
    history_text = "<|start|>user<|message|>Q1<|end|><|start|>assistant<|channel|>final<|message|>A cat.<|end|>"
    prompt_text = history_text + "<|start|>user<|message|>Q2<|end|><|start|>assistant\n"
    assert capsys.readouterr().out.endswith("every message.<|end|>" + prompt_text)


def test_invalid_calls_raise_errors(chat_case):
    model, tokenizer, pixels, _ = chat_case
    with pytest.raises(ValueError, match="sums to 3 tiles, but pixel_values has 2"):
        model.chat(tokenizer, pixels[:2], "x", GREEDY, num_patches_list=[3])
    with pytest.raises(ValueError, match="2 images, but 1 <image>"):
        model.chat(tokenizer, pixels[:2], "<image> x", GREEDY, num_patches_list=[1, 1])
    with pytest.raises(ValueError, match="2 questions, but num_patches_list has 1"):
        model.batch_chat(tokenizer, pixels[:2], ["x", "y"], GREEDY, num_patches_list=[2])
    with pytest.raises(ValueError, match="2 tiles for 2 questions"):
        model.batch_chat(tokenizer, pixels[:2], ["x", "y"], GREEDY)
    with pytest.raises(ValueError, match="1 questions, but 2 histories"):
        model.batch_chat(tokenizer, None, ["x"], GREEDY, history=[None, None])
