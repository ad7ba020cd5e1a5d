"""InternVL 3.5's records: the rules of its gpt-oss template and of plain text, spelled out turn by turn."""

import re

import pytest
from helpers.samples import ANSWER, QUESTION

from internvl.constants import IGNORE_INDEX, UnusableSample
from internvl.conversation import get_conv_template
from internvl.data.chat_tokenization import tokenize_turns
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.train import dataset

TEMPLATE = "internvl3_5_gpt_oss"
MARKERS = ["<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>"]
HEADERS = {"system": "<|start|>system<|message|>", "human": "<|start|>user<|message|>"}
HEADERS |= {"function": "<|start|>tool<|message|>", "gpt": "<|start|>assistant"}
IMAGE = "<img><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT></img>"


@pytest.fixture(scope="module")
def tokenizer(goldens):
    tokenizer = load_tokenizer(goldens / "tokenizer")
    tokenizer.add_tokens(MARKERS, special_tokens=True)
    return tokenizer


def turn(role, value):
    return {"from": role, "value": value}


SYSTEM, HUMAN, GPT = turn("system", "Be brief."), turn("human", "<image>\nWhere?"), turn("gpt", "On the left.\n")
CALL, RESULT, EMPTY = turn("gpt", "search(cat)"), turn("function", '{"cat": 3}'), turn("gpt", "")
THINK = turn("gpt", "<think>\nA tail. </think> No: <think>ears.\n</think>\n\nA cat. ")
OPENED = turn("gpt", "<think>Hm.")
DIALOGUES = [
    [HUMAN, GPT],
    [SYSTEM, HUMAN, GPT, HUMAN, GPT],
    [HUMAN, CALL, RESULT, GPT],
    [SYSTEM, HUMAN, GPT, HUMAN],
    [GPT, GPT, HUMAN, HUMAN, EMPTY],
    [HUMAN, THINK, HUMAN, THINK],
    [HUMAN, OPENED],
]


def spelled_out(turns, tokenizer, think=False):
    """Ids and labels of each turn tokenised by itself; of an answer all but `<|start|>assistant` is trained."""
    if turns[0]["from"] != "system":
        turns = [turn("system", get_conv_template(TEMPLATE).system_message), *turns]
    input_ids, labels = [], []
    for number, one in enumerate(turns):
        value, header = one["value"], HEADERS[one["from"]]
        if one["from"] == "gpt":
            body = "<|channel|>final<|message|>" + value
            if think and "<think>" in value and "</think>" in value:
                thoughts, answer = value.replace("<think>", "", 1).rsplit("</think>", 1)
                body = f"<|channel|>analysis<|message|>{thoughts.strip()}<|end|>"
                body += f"<|start|>assistant<|channel|>final<|message|>{answer.strip()}"
            body += "<|return|>" if think or number == len(turns) - 1 else "<|end|>"
        else:
            body = value.replace("<image>", IMAGE, 1) + "<|end|>"
        ids = tokenizer(header + body).input_ids
        mask = len(tokenizer(header).input_ids) if one["from"] == "gpt" else len(ids)
        input_ids += ids
        labels += [IGNORE_INDEX] * mask + ids[mask:]
    return input_ids, labels


@pytest.mark.parametrize("turns", DIALOGUES, ids=lambda turns: " ".join(one["from"] for one in turns))
@pytest.mark.parametrize(
    ("name", "think"), [("preprocess_internvl3_5_gpt_oss", False), ("preprocess_internvl3_5_gpt_oss_with_think", True)]
)
def test_the_rules(tokenizer, turns, name, think):
    images = sum("<image>" in one["value"] for one in turns)
    function = getattr(dataset, name)
    result = function(TEMPLATE, [turns], tokenizer, [3] * images, num_image=images)
    input_ids, labels = spelled_out(turns, tokenizer, think)
    assert result["input_ids"].tolist() == [input_ids]
    assert result["labels"].tolist() == [labels]
    assert result["attention_mask"].all()  # never padded, although neither flag forbids it


def test_training_text_is_the_prompt_of_inference(tokenizer):
    """The model gets its own answer back as history, channel and all."""
    conversation = get_conv_template(TEMPLATE)
    for text in ("Where?", "<|channel|>final<|message|>There.", "Sure?", "<|channel|>final<|message|>Yes."):
        conversation.append_message(conversation.roles[len(conversation.messages) % 2], text)
    turns = [turn("human", "Where?"), turn("gpt", "There."), turn("human", "Sure?"), turn("gpt", "Yes.")]
    input_ids, _ = tokenize_turns(TEMPLATE, turns, tokenizer, [])
    assert input_ids.tolist() == tokenizer(conversation.get_prompt()).input_ids


def test_functions_belong_to_this_template_only(tokenizer):
    with pytest.raises(UnusableSample, match="turn 2 is from 'function'; expected human or gpt"):
        tokenize_turns("internvl2_5", [HUMAN, CALL, RESULT], tokenizer, [3])


@pytest.mark.parametrize("template", [TEMPLATE, "internvl2_5", "Hermes-2"])
def test_plain_text_is_trained_but_for_its_images(tokenizer, template):
    text = "A page.\n<image>\nMore <|im_end|> of it, and <image> again."
    result = dataset.preprocess_pretrain(template, [[turn("pretrain", text)]], tokenizer, [3], num_image=1)
    input_ids = tokenizer(text.replace("<image>", IMAGE, 1)).input_ids
    untrained = set(tokenizer.convert_tokens_to_ids(["<img>", "<IMG_CONTEXT>", "</img>"]))
    assert result["input_ids"].tolist() == [input_ids]
    assert result["labels"].tolist() == [[IGNORE_INDEX if index in untrained else index for index in input_ids]]


def test_plain_text_stands_alone(tokenizer):
    with pytest.raises(UnusableSample, match="has this one turn, not 2"):
        tokenize_turns(TEMPLATE, [turn("pretrain", "x"), ANSWER], tokenizer, [])
    with pytest.raises(UnusableSample, match="turn 1 is from 'pretrain'"):
        tokenize_turns(TEMPLATE, [QUESTION, turn("pretrain", "x")], tokenizer, [4])


def test_plain_text_in_a_data_set(make):
    """Beside conversations; where no `<image>` stands, the picture comes first."""
    page = turn("pretrain", "A house by the river.")
    mixed = make({"image": "a.png", "conversations": [page]}, {"image": "a.png", "conversations": [QUESTION, ANSWER]})
    (sample, dialogue), tokenizer = (mixed[0], mixed[1]), mixed.tokenizer
    trained = sample["labels"][sample["labels"] != IGNORE_INDEX]
    text = tokenizer.decode(sample["input_ids"])
    assert re.fullmatch(r"<img>(<IMG_CONTEXT>){4,}</img>\nA house by the river\.", text)
    assert tokenizer.decode(trained) == "\nA house by the river."
    assert tokenizer.decode(dialogue["labels"][dialogue["labels"] != IGNORE_INDEX]) == ANSWER["value"] + "<|im_end|>"
