"""Records as people write them: read as what they obviously are, or refused with a reason; never silently."""

import json
import re
from pathlib import Path

import pytest
from helpers.samples import ANSWER, are_samples_equal, load_cached_tokenizer, make_turns
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

from internvl.arguments.data import DataTrainingArguments
from internvl.constants import UnusableSample
from internvl.data.preference_dataset import PreferenceDataset
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.planning.sample_lengths import measure_dataset

FAULTS = Path(__file__).parent / "faults"
TEXT, IMAGE = make_turns("What?", "A."), make_turns("<image>\nWhat?", "A.")


@pytest.fixture
def open_fault(goldens):
    """Return a function that opens one of the recorded inputs."""

    def open_fault(name: str, root: str = "img", max_length: int = 400) -> LazySupervisedDataset:
        data_args = DataTrainingArguments(conv_style="internvl2_5", force_image_size=28, max_num_frame=8)
        tokenizer = load_cached_tokenizer(goldens / "tokenizer", max_length)
        meta = {"root": str(FAULTS / root), "annotation": str(FAULTS / f"{name}.jsonl")}
        return LazySupervisedDataset(name, meta, tokenizer, 4, data_args)

    return open_fault


def get_reason(dataset, index: int = 0) -> str:
    """Return why a sample is unusable; "" if it is usable."""
    try:
        dataset.get(index, 0)
    except UnusableSample as error:
        return str(error)
    return ""


# -- keys --------------------------------------------------------------------------------------------------------------


def test_plural_keys_are_read_like_the_singular(make_dataset, open_fault):
    dataset = make_dataset(
        {"image": ["a.png"], "conversations": IMAGE},
        {"images": ["a.png"], "conversations": IMAGE},
        {"images": "a.png", "image": None, "conversations": IMAGE},
        {"image": "a.png", "images": [], "videos": "", "conversations": IMAGE},
    )
    samples = [dataset.get(index, 0) for index in range(4)]
    assert len(samples[0]["image_flags"]) and all(are_samples_equal(samples[0], sample) for sample in samples)
    assert dataset.list_media_paths(1) == dataset.list_media_paths(0), "changed files are noticed"
    assert len(open_fault("F02_images_key").get(0, 0)["image_flags"])
    videos = make_dataset(
        {"video": "frames", "conversations": TEXT}, {"videos": ["frames"], "conversations": TEXT}, max_num_frame=8
    )
    assert videos.measure(0) == videos.measure(1)


CONVERSATION = {"conversations": IMAGE, "image": "a.png"}
REFUSED = {
    "image and images": (CONVERSATION | {"images": ["b.jpg"]}, "it has image and images, expected only one of them"),
    "image and video": (CONVERSATION | {"video": "frames"}, "it has image and video, expected only one of them"),
    "images and videos": ({"images": ["a.png"], "videos": ["frames"], "conversations": TEXT}, "has images and videos"),
    "two videos": ({"videos": ["frames", "frames"], "conversations": TEXT}, "2 videos in one record .* split"),
    "image is an object": ({"image": {"bytes": "AAAA"}, "conversations": TEXT}, "path or a list of paths, not bytes"),
    "image is false": ({"image": False, "conversations": TEXT}, "image must be a path .* got False"),
    "image is nested": ({"image": [["a.png"]], "conversations": TEXT}, "image must be a path"),
    "image is base64": ({"image": "data:image/png;base64," + "A" * 2_000_000, "conversations": TEXT}, "not bytes or"),
    "messages": ({"messages": [{"role": "user", "content": "Hm?"}]}, "has the key messages.* write them as conversa"),
    "messages beside": (CONVERSATION | {"messages": [1]}, "has the key messages"),
    "system": (CONVERSATION | {"system": "Be brief."}, "has the key system, 'Be brief.'.* first turn, from 'system'"),
    "tools": (CONVERSATION | {"tools": "[]x"}, "has the key tools"),
    "objects": (CONVERSATION | {"objects": {"bbox": [[1, 2, 3, 4]]}}, "has the key objects.*<box>"),
    "audios": (CONVERSATION | {"audios": ["a.wav"]}, "has the key audios.* audio is not supported"),
    "no loss": (CONVERSATION | {"loss": False}, "has the key loss, False, .* every answer has loss"),
    "weight": (CONVERSATION | {"weight": 0.5}, "has the key weight, 0.5"),
    "mask": (CONVERSATION | {"mask": [0, 1]}, r"has the key mask, \[0, 1\]"),
    "turn without loss": (
        {"conversations": [TEXT[0], TEXT[1] | {"loss": False}]},
        "turn 2 has the key loss, False, which is not supported",
    ),
    "turn weight": ({"conversations": [TEXT[0], TEXT[1] | {"weight": 0}]}, "turn 2 has the key weight, 0"),
    "tool calls": ({"conversations": [TEXT[0], TEXT[1] | {"tool_calls": [{}]}]}, "turn 2 has the key tool_calls"),
    "clip of an image": (CONVERSATION | {"clip": [0, 1]}, r"it has clip, \[0, 1\], but no video"),
    "query": ({"query": "Hm?", "response": "A.", "images": ["a.png"]}, "conversations is missing; query, response"),
    "alpaca": ({"instruction": "Hm?", "input": "", "output": "A."}, "missing; instruction, input, output"),
    "pair": ({"question": "Hm?", "chosen": "A.", "rejected": "B."}, "missing; question, chosen, rejected"),
    "role and content": ({"conversations": [{"role": "user", "content": "Hm?"}]}, "turn 1 must be .*got .*'role'"),
}  # fmt: skip


@pytest.mark.parametrize(("record", "reason"), REFUSED.values(), ids=REFUSED)
def test_records_that_mean_something_else_are_refused(make_dataset, record, reason):
    text = get_reason(make_dataset(record))
    assert re.search(reason, text), text
    assert len(text) < 400, "values are shortened"


HARMLESS = [
    {"id": 3, "width": 60, "height": 40, "source": "web", "length": 7, "split": "train", "score": 0.3},
    {"question": "What?", "answer": "A.", "query": "What?", "response": "A.", "category": "vqa", "label": 1},
    {"system": None, "tools": [], "messages": [], "objects": {}, "mask": None, "loss": "", "audios": []},
    {"loss": True, "weight": 1, "loss_scale": 1.0, "mask": False},
]


@pytest.mark.parametrize("keys", HARMLESS, ids=lambda keys: next(iter(keys)))
def test_other_keys_are_ignored(make_dataset, keys):
    turns = [IMAGE[0] | {"id": 1}, IMAGE[1] | {"loss": True, "weight": 1, "score": 0.1}]
    dataset = make_dataset(CONVERSATION, CONVERSATION | {"conversations": turns} | keys)
    assert are_samples_equal(dataset.get(0, 0), dataset.get(1, 0))


def test_keys_of_preference_pairs(make_dataset):
    pair = {"question": "Hm?", "chosen": "A.", "rejected": "B."}
    conversation = {"conversations": TEXT}
    dataset = make_dataset(pair, pair | conversation, pair | {"system": "S."}, conversation, kind=PreferenceDataset)
    assert get_reason(dataset, 0) == get_reason(dataset, 1) == ""
    assert "has the key system" in get_reason(dataset, 2) and "system_prompt" in get_reason(dataset, 2)
    assert "question is missing; conversations instead of question, chosen, rejected" in get_reason(dataset, 3)


def test_pointers_of_git_lfs_are_named(make_dataset, tmp_path):
    for name in ("a.png", "a.jsonl", "a.parquet"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 99\n")
    assert re.search("a.png .*Git LFS.*git lfs pull", get_reason(make_dataset(CONVERSATION)))
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(ValueError, match=f"{name} is a pointer of Git LFS.*git lfs pull"):
            make_dataset(CONVERSATION, meta={"annotation": str(tmp_path / name)})


# -- roles and texts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "alias"),
    [("user", "human"), ("assistant", "gpt"), ("Human", "human"), ("tool", "function"), ("x" * 9**6, "")],
)
def test_unknown_roles_are_what_the_reason_is_about(make_dataset, open_fault, role, alias):
    """Not the missing human turn, to which they lead."""
    text = get_reason(make_dataset({"image": "a.png", "conversations": [{"from": role, "value": "<image>"}, ANSWER]}))
    assert text.startswith("turn 1 is from '") and text.endswith(f": rename it to {alias}" if alias else "function")
    assert "expected one of system, human, gpt, pretrain, function" in text and len(text) < 300
    assert "turn 1 is from 'user'; expected one of" in get_reason(open_fault("F11_wrong_roles"))


def test_lone_surrogates_are_reported(make_dataset, open_fault):
    reason = r"turn 2 (gpt) has a lone surrogate '\ud83d' at character 4"
    assert get_reason(open_fault("F01_lone_surrogate")).startswith(reason)
    pair = {"question": "Hm?", "chosen": "A.", "rejected": "\udc00"}
    text = get_reason(make_dataset(pair, kind=PreferenceDataset))
    assert text.startswith(r"rejected: turn 2 (gpt) has a lone surrogate '\udc00' at character 0")
    whole = make_dataset(json.dumps({"conversations": make_turns("Hi", "\U0001f600")}))
    assert get_reason(whole) == "", "a pair of escaped surrogates is one character"


def test_text_cannot_forge_image_tokens(make_dataset):
    """Neither in any role, nor by what a tokenizer normalizes to the token."""
    for role in ("system", "human", "gpt"):
        turns = [{"from": role, "value": "<IMG_CONTEXT>"}, *TEXT] if role == "system" else [*TEXT]
        turns = turns if role == "system" else [{**turn, "value": "<IMG_CONTEXT>"} for turn in turns]
        assert "contains <IMG_CONTEXT>, which is reserved for images" in get_reason(
            make_dataset({"conversations": turns})
        )
    dataset = make_dataset({"conversations": make_turns("<img_context>?", "A.")}, {"conversations": TEXT})
    backend = type(dataset.tokenizer.backend_tokenizer).from_str(dataset.tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Replace("img_context", "IMG_CONTEXT")
    backend.add_tokens([AddedToken("<IMG_CONTEXT>", normalized=True, special=False)])
    normalizing = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=400)
    if normalizing.convert_tokens_to_ids("<IMG_CONTEXT>") not in normalizing("<img_context>").input_ids:
        pytest.skip("this version of tokenizers does not match added tokens in normalized text")
    dataset.tokenizer = normalizing
    assert "its text gives 1 <IMG_CONTEXT> tokens for 0 images" in get_reason(dataset, 0)
    assert get_reason(dataset, 1) == ""


# -- placeholders ------------------------------------------------------------------------------------------------------

PLACEHOLDERS = {
    "surplus": ({"image": "a.png"}, ["<image> <image>?", "A."], "2 <image> in human turns for 1 image:"),
    "in each turn": ({"image": "a.png"}, ["<image>?", "A.", "<image>?", "A."], "2 <image> in human turns for 1 image:"),
    "missing": ({"image": ["a.png", "b.jpg"]}, ["<image>?", "A."], "1 <image> in human turns for 2 images:"),
    "null image": ({"image": None}, ["<image>?", "A."], "1 <image> in human turns for 0 images:"),
    "no image": ({}, ["<image> <image>?", "A."], "2 <image> in human turns for 0 images:"),
    "no video": ({"video": ""}, ["<video>?", "A."], "1 <video> in human turns for 0 videos:"),
    "two videos": ({"video": "frames"}, ["<video> <video>?", "A."], "2 <video> in human turns for 1 video:"),
    "image for a video": ({"video": "frames"}, ["<image>?", "A."], "1 <image> in human turns for 0 images:"),
    "video for an image": ({"image": "a.png"}, ["<video>?", "A."], "1 <video> in human turns for 0 videos:"),
    "both": ({"video": "frames"}, ["<image> <video>?", "A."], "1 <image> in human turns for 0 images:"),
    "in the answer": ({"image": "a.png"}, ["<image>?", "<image>"], "turn 2 (gpt) contains <image>, which belongs"),
    "only in the answer": ({"image": "a.png"}, ["What?", "<image>"], "turn 2 (gpt) contains <image>, which belongs"),
    "video in the answer": ({}, ["What?", "A <video>."], "turn 2 (gpt) contains <video>, which belongs"),
}


@pytest.mark.parametrize(("media", "values", "reason"), PLACEHOLDERS.values(), ids=PLACEHOLDERS)
def test_placeholders_must_match_the_media(make_dataset, tmp_path, media, values, reason):
    record = media | {"conversations": make_turns(*values)}
    dataset = make_dataset(record)
    text = get_reason(dataset)
    assert text.startswith(reason) and "--keep_surplus_placeholders True" in text
    options = {"show_progress": False, "cache_dir": str(tmp_path / "cache")}
    assert measure_dataset(dataset, **options).unusable == [(0, text)]
    # Upstream's way. Its cached lengths are not used without the flag.
    kept = make_dataset(record, keep_surplus_placeholders=True)
    if "missing" in text or "2 images" in text:
        assert get_reason(kept)
    else:
        assert not measure_dataset(kept, **options).unusable and get_reason(kept) == ""
    assert measure_dataset(dataset, **options).unusable == [(0, text)]


def test_placeholder_in_a_system_turn_is_text_beside_those_of_the_images(make_dataset):
    """One of upstream's recorded samples has it."""

    def make(system: str, question: str, **media):
        system_turn = {"from": "system", "value": system}
        return make_dataset({"conversations": [system_turn, *make_turns(question, "A.")], **media})

    assert get_reason(make("Images: <image>", "<image>?", image="a.png")) == ""
    reason = "turn 1 (system) contains <image>, which belongs in human turns"
    assert get_reason(make("Images: <image>", "What?", image="a.png")).startswith(reason)
    assert get_reason(make("Images: <image>", "What?")).startswith(reason)


def test_recorded_surplus_placeholders(open_fault):
    dataset = open_fault("F09_more_marks")
    assert get_reason(dataset, 0).startswith("2 <image> in human turns for 1 image")
    assert get_reason(dataset, 1).startswith("1 <image> in human turns for 0 images")
    assert get_reason(dataset, 2).startswith("it has image and video, expected only one of them")


# -- truncation --------------------------------------------------------------------------------------------------------


def test_lost_loss_tokens_are_measured(make_dataset, open_fault, tmp_path):
    record = {"conversations": make_turns("Hi", "word " * 50, "Again", "word " * 30)}
    full = make_dataset(record).measure(0)
    assert full[3] == 0
    for limit in (full[0] - 1, full[0] - 20, full[0] - 60):
        tokens, loss_tokens, _, num_lost = make_dataset(record, max_length=limit).measure(0)
        assert tokens == limit and loss_tokens + num_lost == full[1] and (num_lost > 0) == (limit < full[0] - 1)
    pair = {"question": "Hm?", "chosen": "word " * 30, "rejected": "word " * 50}
    tokens, loss_tokens, _, _ = make_dataset(pair, kind=PreferenceDataset).measure(0)
    *_, cut_loss_tokens, _, num_lost = make_dataset(pair, kind=PreferenceDataset, max_length=60).measure(0)
    assert num_lost > 0 and cut_loss_tokens + num_lost == loss_tokens
    measurements = measure_dataset(
        open_fault("F12_long_answer", max_length=200), show_progress=False, cache_dir=str(tmp_path)
    )
    assert measurements.lengths["tokens"].tolist() == [200] and measurements.lost_loss_tokens[0] > 1000


def test_reasons_do_not_carry_control_characters():
    """A terminal would obey them, and a line break would forge a line of the log."""
    assert str(UnusableSample("image \x1b[2Jx\n2026 INFO done ☃")) == r"image \x1b[2Jx\n2026 INFO done ☃"
