"""Keys of other formats: content in them is refused with what to write instead; what describes a sample is ignored."""

import json

import pytest
from helpers.samples import are_samples_equal, make_turns

from internvl.constants import UnusableSample
from internvl.data.foreign_keys import FOREIGN_KEY_ROWS, MEDIA_KEYS, list_unused_keys, normalize_key
from internvl.data.preference_dataset import PreferenceDataset
from internvl.data.schema import get_turns
from internvl.data.supervised_dataset import LazySupervisedDataset

TURNS = make_turns("What?", "A.")
RECORD = {"conversations": TURNS}
PAIR = {"question": "What?", "chosen": "A.", "rejected": "B."}


def get_reason(dataset, index: int = 0) -> str:
    """Return why a sample is unusable; "" if it is usable."""
    try:
        dataset.measure(index)
    except UnusableSample as error:
        return str(error)
    return ""


# Key -> what the reason advises.
REFUSED = {
    "system_prompt": "make it the first turn, from 'system'",
    "system": "make it the first turn, from 'system'",
    "System-Message": "make it the first turn, from 'system'",
    "history": "write the earlier turns into conversations",
    "instruction": "write it into a turn from 'human'",
    "dialogue": "write the turns into conversations",
    "reasoning_content": "write it into the value of the answer, as <think>...</think>",
    "rejected_response": "preference pairs are trained by internvl_chat_mpo.py",
    "chosen": "preference pairs are trained by internvl_chat_mpo.py",
    "rejected": "preference pairs are trained by internvl_chat_mpo.py",
    "functions": "describe the tools in a first turn from 'system'",
    "function_call": "write the calls into the value of the turn",
    "image_url": "write paths into the key image",
    "img": "write paths into the key image",
    "imagePath": "write paths into the key image",
    "pictures": "write paths into the key image",
    "image_base64": "write the image to a file, and its path into the key image",
    "video_path": "write the path into the key video",
    "frames": "put the frames into a folder, and its path into the key video",
    "audio_path": "audio is not supported",
    "Image": "use image instead, with one path or a list of all paths",
    " images": "use images instead, with one path or a list of all paths",
    "image_1": "use image instead",
    "VIDEO": "use video instead",
    "Clip": "use clip instead",
    "Conversations": "use conversations instead",
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
@pytest.mark.parametrize("value", ["x", ["x"], {"x": 1}], ids=["text", "list", "object"])
def test_content_in_keys_of_other_formats_is_refused(make_dataset, key, value):
    reason = get_reason(make_dataset(RECORD | {key: value}))
    assert reason.startswith(f"it has the key {key}, ") and f"which is not supported: {REFUSED[key]}" in reason


def test_every_listed_key_is_refused_in_records_and_turns(make_dataset):
    """Also in upper case, and only if there is content."""
    names = [(name, has_effect) for names, _, has_effect, *_ in FOREIGN_KEY_ROWS for name in names.split()]
    assert len(names) > 100 and len({normalize_key(name) for name, _ in names}) == len(names)
    for name, has_effect in names:
        value = next(value for value in ("x", False, True) if has_effect(value))
        for key in (name, name.upper()):
            turn = TURNS[1] | {key: value}
            in_record, in_turn = RECORD | {key: value}, {"conversations": [TURNS[0], turn]}
            assert f"it has the key {key}, " in get_reason(make_dataset(in_record)), key
            assert f"turn 2 has the key {key}, " in get_reason(make_dataset(in_turn)), key
        for nothing in (None, "", [], {}):
            assert get_reason(make_dataset(RECORD | {name: nothing})) == ""


@pytest.mark.parametrize(
    "keys",
    [
        {"id": "7", "image_id": 3, "source": "web", "url": "https://x/y.png", "width": 3, "height": 4, "score": 0.5},
        {"messages": 2, "turns": 4, "frames": 32, "objects": 3, "images_count": 1, "tools": False, "history": 0},
        {"label": 1, "kto_tag": True, "weight": 1, "loss_mask": 0, "train": True},
        {"mask": "masks/7.png", "loss": 2.31, "weights": "imagenet", "train": "train2017", "ignore": {"size": [2, 3]}},
        {"question": "What?", "answer": "A.", "label": "cat", "caption": "A cat.", "prompt": "Hm?", "text": "x"},
        {"Image": None, "image_1": "", "Video": [], "history": [], "system": "  "},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_what_describes_a_sample_is_ignored(make_dataset, keys):
    dataset = make_dataset(RECORD, RECORD | keys)
    assert are_samples_equal(dataset.get(0, 0), dataset.get(1, 0))


@pytest.mark.parametrize(("media", "origin"), [("image", "image_url"), ("images", "img_path"), ("video", "video_url")])
def test_the_origin_of_the_media_is_ignored(make_dataset, media, origin):
    """Published data sets keep it beside the path."""
    record = RECORD | {media: ["a"] if media == "images" else "a", origin: "https://x/a"}
    assert origin not in get_reason(make_dataset(record))
    assert f"it has the key {origin}, " in get_reason(make_dataset(RECORD | {origin: "https://x/a"}))
    other_kind = {"image": "video", "images": "video", "video": "image"}[media]
    assert f"it has the key {origin}, " in get_reason(make_dataset(RECORD | {other_kind: "a", origin: "https://x/a"}))


def test_answers_marked_as_bad_are_refused(make_dataset):
    for keys in ({"label": False}, {"kto_tag": False}):
        assert "marked as one that shall not be trained" in get_reason(make_dataset(RECORD | keys))


@pytest.mark.parametrize(
    ("keys", "advice"),
    [
        ({"image": "a.png"}, "it belongs to the record, with <image> or <video> in the turn"),
        ({"videos": ["a.mp4"]}, "it belongs to the record"),
        ({"clip": [0, 1]}, "it belongs to the record"),
        ({"Value": "More."}, "use value instead"),
        ({"content": "More."}, "the text of a turn is its value"),
        ({"thinking": "Hm."}, "as <think>...</think>"),
        ({"label": False}, "shall not be trained"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_content_in_turns_is_refused(make_dataset, keys, advice):
    reason = get_reason(make_dataset({"conversations": [TURNS[0], TURNS[1] | keys]}))
    assert reason.startswith(f"turn 2 has the key {next(iter(keys))}, ") and advice in reason


def test_preference_pairs_have_their_own_keys(make_dataset):
    refused = [{"history": ["x"]}, {"system": "x"}, {"Chosen": "x"}, {"img": "a.png"}, {"rejected_response": "x"}]
    refused.append({"System_Prompt": "x"})
    usable = [{}, {"system_prompt": "Be brief."}, {"conversations": TURNS}, {"score_chosen": 3, "prompt": "x"}]
    dataset = make_dataset(*(PAIR | keys for keys in refused + usable), kind=PreferenceDataset)
    for index, keys in enumerate(refused):
        assert f"it has the key {next(iter(keys))}, " in get_reason(dataset, index)
    assert [get_reason(dataset, index) for index in range(len(refused), len(dataset))] == [""] * len(usable)
    messages = [{"role": "assistant", "content": "A."}]
    reason = get_reason(make_dataset(PAIR | {"chosen": messages}, kind=PreferenceDataset))
    assert "chosen must be a string, got [{" in reason and reason.endswith(": write the text alone, without roles")


def test_known_keys_are_those_of_the_dataset():
    assert LazySupervisedDataset.known_keys == ("conversations", "image", "images", "video", "videos", "clip")
    assert set(PreferenceDataset.known_keys) >= {*PAIR, "system_prompt", "image", "clip"}


def test_keys_that_may_be_meant_are_listed():
    """`check_data` counts them: they are content in other formats, and often describe a sample."""
    known_keys = ("conversations", *MEDIA_KEYS)
    texts = ["What?\nA. cat", "A."]
    for keys, unused in (
        ({"answer": "A.", "question": "What?", "label": "cat", "id": "x"}, []),
        ({"answer": "B.", "Question": "Who?", "label": 1, "caption": ["A", "cat"]}, ["answer", "Question", "caption"]),
        ({"start": 3, "end_time": 4.5}, []),
        ({"start": 3, "end_time": 4.5, "video": "a.mp4"}, ["start", "end_time"]),
        ({"start": 3, "end": 4, "video": "a.mp4", "clip": [3, 4]}, []),
    ):
        assert list_unused_keys({"conversations": TURNS} | keys, known_keys, texts) == unused


# -- turns in another form ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turns", "advice"),
    [
        (json.dumps(TURNS), "it is JSON in a string, write the list itself"),
        ({"from": ["human"], "value": ["What?"]}, "write a list of objects, one for each turn"),
        (TURNS[0], "write a list of objects, one for each turn"),
        ([TURNS], "write an object for each turn, all turns of the record in one list"),
        ([["human", "What?"]], "write an object for each turn, all turns of the record in one list"),
        ([{"role": "user", "content": "x"}], "rename role to from, rename content to value, write human for user"),
        ([{"role": "system", "content": "x"}], "rename role to from, rename content to value"),
        ([{"From": "human", "Value": "x"}], "rename From to from, rename Value to value"),
        ([{"from": "Assistant", "text": "x"}], "rename text to value, write gpt for assistant"),
        ([{"user": "What?", "assistant": "A."}], "write one turn for each role"),
        ([{"from": "human", "value": [{"type": "text"}]}], "write one text with <image> or <video>, and the paths into "
         "image or video of the record"),
        ([{"from": "gpt", "value": 42}], "write the number as text, in quotes"),
    ],
)  # fmt: skip
def test_turns_in_another_form_are_refused_with_what_to_write(turns, advice):
    with pytest.raises(UnusableSample) as caught:
        get_turns({"conversations": turns})
    assert str(caught.value).startswith(("conversations must be a list", "turn 1 must be"))
    assert str(caught.value).endswith(f": {advice}")


def test_reasons_stay_short_whatever_the_keys(make_dataset):
    many = {f"role{number}": "user" for number in range(10_000)}
    long = {"i" + "1" * 100_000 + "mage": "a.png"}
    for record in ({"conversations": [many]}, RECORD | long, {"conversations": [TURNS[0] | long]}, {**many, **long}):
        assert 0 < len(get_reason(make_dataset(record))) < 500


@pytest.mark.parametrize(
    "value", ["data:image/png;base64,iVBORw0KGgo=", '["a.png", "b.jpg"]', "['a.png']", '{"path": 1}']
)
def test_content_instead_of_a_path_is_refused(make_dataset, value):
    for image in (value, [value]):
        reason = get_reason(make_dataset(RECORD | {"image": image}))
        assert "image must be a path or a list of paths, not bytes or base64, nor JSON in a string, got" in reason
