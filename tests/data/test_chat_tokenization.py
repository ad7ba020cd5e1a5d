"""Turns to ids and labels, compared with upstream's recorded ones.

Laws are tested where upstream fails. Its own defects, which ours does not share, are recognized in the recorded rows:
- Every label is -100 although there are answers: a length check of upstream failed (all of internvl_zh; older templates
  now and then). Ours has loss on the answers.
- KeyError for a system turn, ValueError for a role marker inside an answer (older templates). Ours accepts both.
- Older templates put an image wherever `<image>` stands, even in an answer, and accept images without placeholders.
  Ours counts the placeholders of human turns and reports a sample that has too few.
"""

import functools
import json
import re

import pytest
import torch
from helpers.samples import ANSWER, QUESTION

from internvl.constants import IGNORE_INDEX, IMG_CONTEXT_TOKEN, UnusableSample
from internvl.conversation import conv_templates, get_conv_template
from internvl.data import chat_tokenization
from internvl.data.chat_tokenization import tokenize_turns
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.train import dataset

OPTIONS = ("text_only", "group_by_length", "use_packed_ds", "num_image")
GPT_OSS = "internvl3_5_gpt_oss"
RECORDED_TEMPLATES = [name for name in conv_templates if name != GPT_OSS]  # which is newer than the recording
ERRORS_OF_UPSTREAM_ONLY = ("system_image", "system_text", "system_empty", "answer_contains_role_marker")


@functools.cache
def load_cached_tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(params=["tokenizer", "tokenizer_internlm2", "tokenizer_internlm2_prefix"])
def tokenizer(goldens, request):
    return load_cached_tokenizer(goldens / request.param)


def make_turn(role: str, value: str) -> dict:
    return {"from": role, "value": value}


# -- recorded rows -----------------------------------------------------------------------------------------------------


def read_recorded_rows(goldens, template):
    lines = (goldens / "preprocess" / f"{template}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def call_recorded_function(row, goldens):
    tokenizer = load_cached_tokenizer(goldens / row["tokenizer"])
    tokenizer.model_max_length = row["model_max_length"]
    preprocess = getattr(chat_tokenization, row["function"])
    options = {key: row[key] for key in OPTIONS}
    return preprocess(row["template"], [row["conversations"]], tokenizer, row["num_image_token_list"], **options)


def lacks_placeholders(row):
    num_placeholders = sum(turn["value"].count("<image>") for turn in row["conversations"] if turn["from"] == "human")
    return not row["text_only"] and num_placeholders < row["num_image"]


@pytest.mark.parametrize("template", RECORDED_TEMPLATES)
def test_recorded_rows(goldens, template):
    num_compared = 0
    for row in read_recorded_rows(goldens, template):
        if "error" in row or lacks_placeholders(row):
            continue
        result = call_recorded_function(row, goldens)
        assert result["input_ids"].tolist() == [row["input_ids"]], row["id"]
        assert "".join(map(str, result["attention_mask"][0].long().tolist())) == row["attention_mask"], row["id"]
        if template == "internvl2_5" or any(label != IGNORE_INDEX for label in row["labels"]):
            assert result["labels"].tolist() == [row["labels"]], row["id"]
        num_compared += 1
    assert num_compared


@pytest.mark.parametrize("template", RECORDED_TEMPLATES)
def test_recorded_errors_are_reported_with_a_reason(goldens, template):
    for row in read_recorded_rows(goldens, template):
        is_accepted = row["id"] in ERRORS_OF_UPSTREAM_ONLY and not lacks_placeholders(row)
        if lacks_placeholders(row) or ("error" in row and not is_accepted):
            with pytest.raises(UnusableSample, match=r"images|turn|from"):
                call_recorded_function(row, goldens)
        elif "error" in row:
            assert (call_recorded_function(row, goldens)["labels"] != IGNORE_INDEX).any(), row["id"]


# -- laws of all templates ---------------------------------------------------------------------------------------------

TURNS = [
    make_turn("system", "Be brief."),
    make_turn("human", "<image>\nWhat is this? <image>"),
    make_turn("gpt", "A cat.\n\nBlack."),
    make_turn("human", "Sure?"),
    make_turn("gpt", "是的"),
]


def decode_loss_runs(ids, labels, tokenizer):
    """Decode each run of consecutive loss tokens."""
    runs, previous = [], IGNORE_INDEX
    for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
        assert label in (IGNORE_INDEX, token)
        if label != IGNORE_INDEX:
            runs += [[]] if previous == IGNORE_INDEX else []
            runs[-1].append(label)
        previous = label
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", RECORDED_TEMPLATES)
def test_only_answers_and_their_end_markers_have_loss(goldens, template):
    name = {"phi3-chat": "tokenizer_phi3_fast", "internvl_zh": "tokenizer_internlm2"}.get(template, "tokenizer")
    tokenizer = load_cached_tokenizer(goldens / name)
    end_marker = get_conv_template(template).sep.strip()
    texts = decode_loss_runs(*tokenize_turns(template, TURNS, tokenizer, [2, 3]), tokenizer)
    answers = [turn["value"] for turn in TURNS if turn["from"] == "gpt"]
    assert [text.replace(f" {end_marker}", end_marker).strip() for text in texts] == [a + end_marker for a in answers]


@pytest.mark.parametrize("template", ["internvl2_5", "internlm2-chat", "Hermes-2"])
def test_training_text_equals_inference_prompt(tokenizer, template):
    """With any tokenizer, training reads what `get_prompt` gives at inference."""
    conversation = get_conv_template(template)
    conversation.set_system_message("Be brief.")
    for turn in TURNS[1:]:
        text = turn["value"].replace("<image>", f"<img>{IMG_CONTEXT_TOKEN * 2}</img>")
        conversation.append_message(conversation.roles[turn["from"] == "gpt"], text)
    input_ids, _ = tokenize_turns(template, TURNS, tokenizer, [2, 2])
    assert input_ids.tolist() == tokenizer(conversation.get_prompt()).input_ids


def test_each_image_has_its_number_of_context_tokens(tokenizer):
    context_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
    shortest, _ = tokenize_turns("internvl2_5", TURNS, tokenizer, [1, 1])
    for tokens_per_image in ([256, 3328], [1, 2], [7, 7]):
        input_ids, labels = tokenize_turns("internvl2_5", TURNS, tokenizer, tokens_per_image)
        values, run_lengths = torch.unique_consecutive(input_ids, return_counts=True)
        assert run_lengths[values == context_id].tolist() == tokens_per_image
        assert len(input_ids) == len(labels) == len(shortest) + sum(tokens_per_image) - 2
        assert (labels[input_ids.eq(context_id)] == IGNORE_INDEX).all()


def test_text_only_keeps_placeholders_as_text(tokenizer):
    text_only, _ = tokenize_turns("internvl2_5", TURNS, tokenizer, [4, 4], text_only=True)
    no_images, _ = tokenize_turns("internvl2_5", TURNS, tokenizer, [])
    assert torch.equal(text_only, no_images)
    assert tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN) not in text_only


LOOK = make_turn("human", "Look: <image>")


@pytest.mark.parametrize(
    ("turns", "tokens_per_image", "reason"),
    [
        ([], [], "no turns"),
        ([LOOK], [4, 4], "1 <image> in human turns for 2 images"),
        ([make_turn("gpt", "<image>"), LOOK], [4, 4], "1 <image> in human turns for 2 images"),
        ([LOOK, make_turn("robot", "hi")], [4], "turn 2 is from 'robot'"),
        ([LOOK, {"value": "hi"}], [4], "turn 2 is from None"),
        ([LOOK, make_turn("system", "hi")], [4], "turn 2 is from 'system'"),
        ([LOOK, make_turn("gpt", None)], [4], "value of turn 2 .gpt. must be a string, got None"),
        ([make_turn("human", "<image> <IMG_CONTEXT>")], [4], "turn 1 .human. contains <IMG_CONTEXT>"),
    ],
)
def test_invalid_turns_are_reported(goldens, turns, tokens_per_image, reason):
    with pytest.raises(UnusableSample, match=reason):
        tokenize_turns("internvl2_5", turns, load_cached_tokenizer(goldens / "tokenizer"), tokens_per_image)


def test_tokenizer_without_image_tokens_is_refused(goldens):
    tokenizer_class = type(load_cached_tokenizer(goldens / "tokenizer_internlm2"))
    tokenizer = tokenizer_class(goldens / "tokenizer_internlm2" / "tokenizer.model")
    with pytest.raises(ValueError, match="does not know <IMG_CONTEXT>"):
        tokenize_turns("internvl2_5", [LOOK], tokenizer, [4])


# -- InternVL 3.5: gpt-oss template, spelled out turn by turn ----------------------------------------------------------

MARKERS = ["<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>"]
HEADERS = {"system": "<|start|>system<|message|>", "human": "<|start|>user<|message|>"}
HEADERS |= {"function": "<|start|>tool<|message|>", "gpt": "<|start|>assistant"}
IMAGE = "<img><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT></img>"


@pytest.fixture(scope="module")
def gpt_oss_tokenizer(goldens):
    tokenizer = load_tokenizer(goldens / "tokenizer")  # not the cached one, which others use
    tokenizer.add_tokens(MARKERS, special_tokens=True)
    return tokenizer


SYSTEM, HUMAN = make_turn("system", "Be brief."), make_turn("human", "<image>\nWhere?")
GPT, EMPTY = make_turn("gpt", "On the left.\n"), make_turn("gpt", "")
CALL, RESULT = make_turn("gpt", "search(cat)"), make_turn("function", '{"cat": 3}')
THINK = make_turn("gpt", "<think>\nA tail. </think> No: <think>ears.\n</think>\n\nA cat. ")
UNCLOSED = make_turn("gpt", "<think>Hm.")
DIALOGUES = [
    [HUMAN, GPT],
    [SYSTEM, HUMAN, GPT, HUMAN, GPT],
    [HUMAN, CALL, RESULT, GPT],
    [SYSTEM, HUMAN, GPT, HUMAN],
    [GPT, GPT, HUMAN, HUMAN, EMPTY],
    [HUMAN, THINK, HUMAN, THINK],
    [HUMAN, UNCLOSED],
]


def tokenize_turn_by_turn(turns, tokenizer, think=False):
    """Tokenize each turn on its own.

    All of an answer but `<|start|>assistant` has loss.
    """
    if turns[0]["from"] != "system":
        turns = [make_turn("system", get_conv_template(GPT_OSS).system_message), *turns]
    input_ids, labels = [], []
    for number, turn in enumerate(turns):
        value, header = turn["value"], HEADERS[turn["from"]]
        if turn["from"] == "gpt":
            body = "<|channel|>final<|message|>" + value
            if think and "<think>" in value and "</think>" in value:
                thoughts, answer = value.replace("<think>", "", 1).rsplit("</think>", 1)
                body = f"<|channel|>analysis<|message|>{thoughts.strip()}<|end|>"
                body += f"<|start|>assistant<|channel|>final<|message|>{answer.strip()}"
            body += "<|return|>" if think or number == len(turns) - 1 else "<|end|>"
        else:
            body = value.replace("<image>", IMAGE, 1) + "<|end|>"
        ids = tokenizer(header + body).input_ids
        num_masked = len(tokenizer(header).input_ids) if turn["from"] == "gpt" else len(ids)
        input_ids += ids
        labels += [IGNORE_INDEX] * num_masked + ids[num_masked:]
    return input_ids, labels


@pytest.mark.parametrize("turns", DIALOGUES, ids=lambda turns: " ".join(turn["from"] for turn in turns))
@pytest.mark.parametrize(
    ("name", "think"), [("preprocess_internvl3_5_gpt_oss", False), ("preprocess_internvl3_5_gpt_oss_with_think", True)]
)
def test_gpt_oss_rules(gpt_oss_tokenizer, turns, name, think):
    num_images = sum("<image>" in turn["value"] for turn in turns)
    preprocess = getattr(dataset, name)
    result = preprocess(GPT_OSS, [turns], gpt_oss_tokenizer, [3] * num_images, num_image=num_images)
    input_ids, labels = tokenize_turn_by_turn(turns, gpt_oss_tokenizer, think)
    assert result["input_ids"].tolist() == [input_ids]
    assert result["labels"].tolist() == [labels]
    assert result["attention_mask"].all()  # never padded, although no option forbids it


def test_gpt_oss_training_text_equals_inference_prompt(gpt_oss_tokenizer):
    """The model gets its own answer back as history, channel included."""
    conversation = get_conv_template(GPT_OSS)
    for text in ("Where?", "<|channel|>final<|message|>There.", "Sure?", "<|channel|>final<|message|>Yes."):
        conversation.append_message(conversation.roles[len(conversation.messages) % 2], text)
    turns = [make_turn("human", "Where?"), make_turn("gpt", "There.")]
    turns += [make_turn("human", "Sure?"), make_turn("gpt", "Yes.")]
    input_ids, _ = tokenize_turns(GPT_OSS, turns, gpt_oss_tokenizer, [])
    assert input_ids.tolist() == gpt_oss_tokenizer(conversation.get_prompt()).input_ids


def test_function_turns_require_the_gpt_oss_template(gpt_oss_tokenizer):
    with pytest.raises(UnusableSample, match="turn 3 is from 'function'; expected human or gpt"):
        tokenize_turns("internvl2_5", [HUMAN, CALL, RESULT], gpt_oss_tokenizer, [3])


# -- InternVL 3.5: plain text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [GPT_OSS, "internvl2_5", "Hermes-2"])
def test_plain_text_has_loss_except_for_its_images(gpt_oss_tokenizer, template):
    text = "A page.\n<image>\nMore <|im_end|> of it, and <image> again."
    turns = [make_turn("pretrain", text)]
    result = dataset.preprocess_pretrain(template, [turns], gpt_oss_tokenizer, [3], num_image=1)
    input_ids = gpt_oss_tokenizer(text.replace("<image>", IMAGE, 1)).input_ids
    image_ids = set(gpt_oss_tokenizer.convert_tokens_to_ids(["<img>", "<IMG_CONTEXT>", "</img>"]))
    assert result["input_ids"].tolist() == [input_ids]
    assert result["labels"].tolist() == [[IGNORE_INDEX if token in image_ids else token for token in input_ids]]


def test_plain_text_is_a_single_turn(gpt_oss_tokenizer):
    with pytest.raises(UnusableSample, match="must have exactly one turn, got 2"):
        tokenize_turns(GPT_OSS, [make_turn("pretrain", "x"), ANSWER], gpt_oss_tokenizer, [])
    with pytest.raises(UnusableSample, match="turn 2 is from 'pretrain'"):
        tokenize_turns(GPT_OSS, [QUESTION, make_turn("pretrain", "x")], gpt_oss_tokenizer, [4])


def test_dataset_may_mix_plain_text_and_conversations(make_dataset):
    """Without an `<image>` in plain text, the image comes first."""
    page = make_turn("pretrain", "A house by the river.")
    mixed = make_dataset(
        {"image": "a.png", "conversations": [page]}, {"image": "a.png", "conversations": [QUESTION, ANSWER]}
    )
    (sample, dialogue), tokenizer = (mixed[0], mixed[1]), mixed.tokenizer
    text = tokenizer.decode(sample["input_ids"])
    assert re.fullmatch(r"<img>(<IMG_CONTEXT>){4,}</img>\nA house by the river\.", text)
    assert decode_loss_runs(sample["input_ids"], sample["labels"], tokenizer) == ["\nA house by the river."]
    expected = [ANSWER["value"] + "<|im_end|>"]
    assert decode_loss_runs(dialogue["input_ids"], dialogue["labels"], tokenizer) == expected
