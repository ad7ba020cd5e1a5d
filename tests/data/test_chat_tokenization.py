"""Turns -> ids and labels: as upstream recorded them, and the laws that hold where upstream fails.

Upstream's own defects, which ours does not share, are told apart by what the record shows:
- every label -100 although answers survive: a length check of upstream failed (all of internvl_zh; older templates now
  and then). Ours trains the answers.
- KeyError for a system turn, ValueError for a role marker inside an answer (older templates). Ours trains these too.
- older templates put an image wherever `<image>` stands, also into an answer, and let images lack one. Ours counts
  placeholders of human turns and reports a sample that has too few.
"""

import functools
import json

import pytest
import torch

from internvl.constants import IGNORE_INDEX, IMG_CONTEXT_TOKEN, UnusableSample
from internvl.conversation import conv_templates, get_conv_template
from internvl.data import chat_tokenization
from internvl.data.chat_tokenization import tokenize_turns
from internvl.model.tokenizers.loading import load_tokenizer

OPTIONS = ("text_only", "group_by_length", "use_packed_ds", "num_image")
RECORDED = [name for name in conv_templates if name != "internvl3_5_gpt_oss"]  # which is younger than the record
SURVIVING_ERRORS = ("system_image", "system_text", "system_empty", "answer_contains_role_marker")


@functools.cache
def tokenizer_at(folder):
    return load_tokenizer(folder)


@pytest.fixture(params=["tokenizer", "tokenizer_internlm2", "tokenizer_internlm2_prefix"])
def tokenizer(goldens, request):
    return tokenizer_at(goldens / request.param)


def call(row, goldens):
    tokenizer = tokenizer_at(goldens / row["tokenizer"])
    tokenizer.model_max_length = row["model_max_length"]
    function = getattr(chat_tokenization, row["function"])
    options = {key: row[key] for key in OPTIONS}
    return function(row["template"], [row["conversations"]], tokenizer, row["num_image_token_list"], **options)


def rows(goldens, template):
    lines = (goldens / "preprocess" / f"{template}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def lacks_placeholders(row):
    found = sum(turn["value"].count("<image>") for turn in row["conversations"] if turn["from"] == "human")
    return not row["text_only"] and found < row["num_image"]


def trained_text(ids, labels, tokenizer):
    """Text of each run of trained tokens."""
    runs, previous = [], IGNORE_INDEX
    for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
        assert label in (IGNORE_INDEX, token)
        if label != IGNORE_INDEX:
            runs += [[]] if previous == IGNORE_INDEX else []
            runs[-1].append(label)
        previous = label
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", RECORDED)
def test_recorded_rows(goldens, template):
    compared = 0
    for row in rows(goldens, template):
        if "error" in row or lacks_placeholders(row):
            continue
        result = call(row, goldens)
        assert result["input_ids"].tolist() == [row["input_ids"]], row["id"]
        assert "".join(map(str, result["attention_mask"][0].long().tolist())) == row["attention_mask"], row["id"]
        if template == "internvl2_5" or any(label != IGNORE_INDEX for label in row["labels"]):
            assert result["labels"].tolist() == [row["labels"]], row["id"]
        compared += 1
    assert compared


@pytest.mark.parametrize("template", RECORDED)
def test_recorded_errors_are_reported_with_a_reason(goldens, template):
    for row in rows(goldens, template):
        survives = row["id"] in SURVIVING_ERRORS and not lacks_placeholders(row)
        if lacks_placeholders(row) or ("error" in row and not survives):
            with pytest.raises(UnusableSample, match=r"images|turn|from"):
                call(row, goldens)
        elif "error" in row:
            assert (call(row, goldens)["labels"] != IGNORE_INDEX).any(), row["id"]


TURNS = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "<image>\nWhat is this? <image>"},
    {"from": "gpt", "value": "A cat.\n\nBlack."},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "是的"},
]


@pytest.mark.parametrize("template", RECORDED)
def test_answers_and_their_end_markers_are_trained_and_nothing_else(goldens, template):
    name = {"phi3-chat": "tokenizer_phi3_fast", "internvl_zh": "tokenizer_internlm2"}.get(template, "tokenizer")
    tokenizer = tokenizer_at(goldens / name)
    end_marker = get_conv_template(template).sep.strip()
    trained = trained_text(*tokenize_turns(template, TURNS, tokenizer, [2, 3]), tokenizer)
    answers = [turn["value"] for turn in TURNS if turn["from"] == "gpt"]
    assert [text.replace(f" {end_marker}", end_marker).strip() for text in trained] == [a + end_marker for a in answers]


@pytest.mark.parametrize("template", ["internvl2_5", "internlm2-chat", "Hermes-2"])
def test_training_text_is_the_prompt_of_inference(tokenizer, template):
    """What the model reads in training is what `get_prompt` gives it later, whatever the tokenizer."""
    conversation = get_conv_template(template)
    conversation.set_system_message("Be brief.")
    for turn in TURNS[1:]:
        text = turn["value"].replace("<image>", f"<img>{IMG_CONTEXT_TOKEN * 2}</img>")
        conversation.append_message(conversation.roles[turn["from"] == "gpt"], text)
    input_ids, _ = tokenize_turns(template, TURNS, tokenizer, [2, 2])
    assert input_ids.tolist() == tokenizer(conversation.get_prompt()).input_ids


def test_images_take_as_many_tokens_as_they_need(tokenizer):
    context = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
    small, _ = tokenize_turns("internvl2_5", TURNS, tokenizer, [1, 1])
    for counts in ([256, 3328], [1, 2], [7, 7]):
        input_ids, labels = tokenize_turns("internvl2_5", TURNS, tokenizer, counts)
        values, runs = torch.unique_consecutive(input_ids, return_counts=True)
        assert runs[values == context].tolist() == counts
        assert len(input_ids) == len(labels) == len(small) + sum(counts) - 2
        assert (labels[input_ids.eq(context)] == IGNORE_INDEX).all()


def test_text_only_leaves_placeholders(tokenizer):
    written, _ = tokenize_turns("internvl2_5", TURNS, tokenizer, [4, 4], text_only=True)
    none, _ = tokenize_turns("internvl2_5", TURNS, tokenizer, [])
    assert torch.equal(written, none)
    assert tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN) not in written


HUMAN = {"from": "human", "value": "Look: <image>"}


@pytest.mark.parametrize(
    ("turns", "image_tokens", "reason"),
    [
        ([], [], "no turns"),
        ([HUMAN], [4, 4], "1 <image> in human turns for 2 images"),
        ([{"from": "gpt", "value": "<image>"}, HUMAN], [4, 4], "1 <image> in human turns for 2 images"),
        ([HUMAN, {"from": "robot", "value": "hi"}], [4], "turn 1 is from 'robot'"),
        ([HUMAN, {"value": "hi"}], [4], "turn 1 is from None"),
        ([HUMAN, {"from": "system", "value": "hi"}], [4], "turn 1 is from 'system'"),
        ([HUMAN, {"from": "gpt", "value": None}], [4], "value of turn 1 .gpt. is None"),
        ([{"from": "human", "value": "<image> <IMG_CONTEXT>"}], [4], "turn 0 .human. itself writes <IMG_CONTEXT>"),
    ],
)
def test_bad_turns_are_named(goldens, turns, image_tokens, reason):
    with pytest.raises(UnusableSample, match=reason):
        tokenize_turns("internvl2_5", turns, tokenizer_at(goldens / "tokenizer"), image_tokens)


def test_tokenizer_without_image_tokens_is_refused(goldens, tmp_path):
    tokenizer = load_tokenizer(goldens / "tokenizer_internlm2")
    stripped = type(tokenizer)(goldens / "tokenizer_internlm2" / "tokenizer.model")
    with pytest.raises(ValueError, match="does not know <IMG_CONTEXT>"):
        tokenize_turns("internvl2_5", [HUMAN], stripped, [4])
