"""Files of a checkpoint besides weights, configuration and tokenizer: reading, fitting and writing."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from helpers.base_files import AUTO_MAP, CODE_FILES, add_base_files, edit_json
from helpers.tiny_models import make_tiny_checkpoint
from huggingface_hub import ModelCard

from internvl import __version__
from internvl.model.auxiliary_files import (
    FILE_KINDS,
    MAX_FILE_BYTES,
    MAX_FILES,
    PREPROCESSOR_FILES,
    AuxiliaryFiles,
    compose_auxiliary_files,
    list_inner_files,
    read_auxiliary_files,
    read_normalization,
    remove_dangling_auto_maps,
    set_tile_size,
    write_auxiliary_files,
)
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.adapter_checkpoint import (
    describe_base_checkpoint,
    gather_trained_tensors,
    save_adapter_checkpoint,
)
from internvl.model.model_card import CardFields, read_card_fields

CARRIED = {*CODE_FILES, "LICENSE", "NOTICE.txt", "README.md", "preprocessor_config.json"}


@pytest.fixture
def base(tmp_path) -> Path:
    """Make a folder with a configuration and all auxiliary files."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text('{"model_type": "internvl_chat"}')
    add_base_files(tmp_path / "base")
    return tmp_path / "base"


def write_to(folder: Path, files: AuxiliaryFiles, **config) -> Path:
    """Write files to a new folder with this configuration."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "internvl_chat", **config}))
    write_auxiliary_files(files, folder, "a test")
    return folder


# -- reading -----------------------------------------------------------------------------------------------------------

LICENSE_NAMES = (
    "LICENSE licence.txt LICENSE-2.0 LICENSE.MIT MODEL_LICENSE NOTICE Notice.md COPYING.LESSER USE_POLICY.md"
).split()
OTHER_NAMES = (
    "LICENSE.safetensors license.json LICENSE.bin notebook.ipynb model.py.txt trainer_state.json x.pth".split()
)


def test_kinds_of_files(base):
    for name in [*LICENSE_NAMES, *OTHER_NAMES, "Qwen LICENSE AGREEMENT"]:
        (base / name).write_text(name)
    files = read_auxiliary_files(base)
    assert files.select("license").keys() == {*LICENSE_NAMES, "Qwen LICENSE AGREEMENT", "LICENSE", "NOTICE.txt"}
    assert files.select("code").keys() == CODE_FILES.keys()
    assert not files.contents.keys() & set(OTHER_NAMES)


def make_fifo(file: Path) -> None:
    os.mkfifo(file)


def make_large_file(file: Path) -> None:
    file.write_bytes(b"#" * (MAX_FILE_BYTES + 1))


def link_outside(file: Path) -> None:
    (file.parents[1] / "secret").write_text("secret")
    file.symlink_to("../secret")


IRREGULAR_FILES = {
    "FIFO": (make_fifo, "is a FIFO"),
    "folder": (Path.mkdir, "Is a directory"),
    "large": (make_large_file, "has 1,048,577 bytes, more than 1,048,576"),
    "link out": (link_outside, "is a link that leads out of its folder"),
    "link loop": (lambda file: file.symlink_to(file.name), "symbolic links"),
    "dangling link": (lambda file: file.symlink_to("nowhere"), "No such file"),
}


@pytest.mark.parametrize(("make_fn", "reason"), IRREGULAR_FILES.values(), ids=IRREGULAR_FILES)
@pytest.mark.parametrize("name", ["modeling_internvl_chat.py", "LICENSE", "README.md"])
def test_irregular_files_are_left_out_and_logged(base, name, make_fn, reason, caplog):
    (base / name).unlink()
    make_fn(base / name)
    assert read_auxiliary_files(base).contents.keys() == CARRIED - {name}
    [line] = [record.message for record in caplog.records if "Not copied to results" in record.message]
    assert name in line and reason in line


def test_number_of_files_is_bounded(base, caplog):
    for index in range(MAX_FILES):
        (base / f"z{index:03}.py").touch()
    assert len(list_inner_files(base, FILE_KINDS.values())) == MAX_FILES
    assert f"one of more than {MAX_FILES} files" in caplog.text


def test_unprintable_names_are_left_out(base, caplog):
    (base / "a\x1b[31m\n.py").touch()
    (base / "b\udcff.py").touch()
    assert read_auxiliary_files(base).contents.keys() == CARRIED
    assert caplog.text.count("has an unprintable name") == 2 and "\x1b" not in caplog.text


@pytest.fixture
def hub_snapshot(base, tmp_path, monkeypatch) -> Path:
    """Move the files to a cache of the hub: a snapshot of links to blobs."""
    repository = tmp_path / "hub/models--OpenGVLab--InternVL"
    snapshot = repository / "snapshots/c0ffee"
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs/main").write_text("c0ffee")
    for index, file in enumerate(sorted(base.iterdir())):
        shutil.move(file, repository / f"blobs/{index}")
        (snapshot / file.name).symlink_to(f"../../blobs/{index}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_links_of_the_hubs_cache_are_followed(hub_snapshot, caplog):
    for source in (hub_snapshot, "OpenGVLab/InternVL"):
        files = read_auxiliary_files(source)
        assert files.contents.keys() == CARRIED and files.card.base_models == ["OpenGVLab/InternVL"]
    assert not caplog.records


def test_code_that_auto_map_names_and_that_is_missing_is_logged(base, caplog):
    (base / "modeling_internvl_chat.py").unlink()
    read_auxiliary_files(base)
    assert "auto_map names 'modeling_internvl_chat.py', which is missing" in caplog.text


def test_adapter_checkpoints_without_files_have_those_of_their_base(tmp_path, goldens):
    make_tiny_checkpoint(tmp_path / "base", goldens / "tokenizer")
    add_base_files(tmp_path / "base")
    model = InternVLChatModel.from_pretrained(tmp_path / "base")
    model.wrap_llm_lora(2, 4)
    model.base_checkpoint = describe_base_checkpoint(tmp_path / "base")
    save_adapter_checkpoint(model, tmp_path / "run", gather_trained_tensors(model))
    (tmp_path / "run/LICENSE").write_text("of the run")
    files = read_auxiliary_files(tmp_path / "run")
    assert files.contents.keys() == CARRIED and files.contents["LICENSE"] == b"of the run"
    assert files.card.license["license_name"] == "qwen"
    write_auxiliary_files(files, tmp_path / "run", "fine-tuning")
    shutil.rmtree(tmp_path / "base")
    assert read_auxiliary_files(tmp_path / "run").contents.keys() == CARRIED


# -- fitting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("internvl_chat", CARRIED),
        ("internvl", {"LICENSE", "NOTICE.txt", "README.md"}),
        ("intern_vit_6b", {"LICENSE", "NOTICE.txt", "README.md", "preprocessor_config.json"}),
    ],
)
def test_files_that_fit_a_result(base, tmp_path, model_type, expected):
    folder = write_to(tmp_path / "out", read_auxiliary_files(base), model_type=model_type)
    assert {file.name for file in folder.iterdir()} == {"config.json", *expected}
    for name in expected - {"README.md"}:
        assert (folder / name).read_bytes() == (base / name).read_bytes()


def test_a_vision_encoder_gets_the_code_that_its_auto_map_names(base, tmp_path):
    """And the files that this code imports; never another repository's."""
    auto_map = {"AutoConfig": "configuration_internvl_chat.Config", "AutoModel": "org/repo--handler.Model"}
    folder = write_to(tmp_path / "out", read_auxiliary_files(base), model_type="intern_vit_6b", auto_map=auto_map)
    assert {file.name for file in folder.glob("*.py")} == {"configuration_internvl_chat.py", "model_types.py"}


FILE = "handler.Model"
AUTO_MAPS = {
    "kept": ({"AutoModel": FILE}, {"AutoModel": FILE}),
    "missing": ({"AutoModel": "missing.Model"}, None),
    "one missing": ({"AutoModel": FILE, "AutoConfig": "missing.C"}, {"AutoModel": FILE}),
    "on the hub": ({"AutoModel": "org/repo--missing.Model"}, {"AutoModel": "org/repo--missing.Model"}),
    "slow tokenizer": ({"AutoTokenizer": [FILE, None]}, {"AutoTokenizer": [FILE, None]}),
    "fast tokenizer is missing": ({"AutoTokenizer": [FILE, "missing.T"]}, {"AutoTokenizer": [FILE, None]}),
    "both are missing": ({"AutoTokenizer": ["missing.T", None]}, None),
    "list of transformers 4.5": ([FILE, None], [FILE, None]),
    "outside": ({"AutoModel": "../out/handler.Model", "AutoConfig": "/etc/x.C"}, None),
    "no reference": ({"AutoModel": 1, "AutoConfig": {"a": []}}, None),
    "empty": ({}, None),
}


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(("auto_map", "expected"), AUTO_MAPS.values(), ids=AUTO_MAPS)
def test_auto_map_is_kept_if_its_code_is_there(tmp_path, file, auto_map, expected):
    (tmp_path / "handler.py").touch()
    part = {"a": "b", "auto_map": auto_map}
    (tmp_path / file).write_text(json.dumps(part | {"llm_config": part}))
    remove_dangling_auto_maps(tmp_path)
    content = json.loads((tmp_path / file).read_text())
    expected_part = {"a": "b"} if expected is None else {"a": "b", "auto_map": expected}
    assert content == expected_part | {"llm_config": expected_part}


SIZES = [
    ({"size": 56, "crop_size": 56}, {"size": 112, "crop_size": 112}),
    ({"size": {"height": 56, "width": 56}}, {"size": {"height": 112, "width": 112}}),
    ({"image_processor": {"size": {"shortest_edge": 56}}}, {"image_processor": {"size": {"shortest_edge": 112}}}),
    ({"resample": 3}, {"resample": 3}),
]


@pytest.mark.parametrize("name", PREPROCESSOR_FILES)
@pytest.mark.parametrize(("settings", "expected"), SIZES)
def test_tile_size_in_preprocessor_settings(name, settings, expected):
    files = AuxiliaryFiles({name: json.dumps(settings).encode()})
    set_tile_size(files, 112)
    assert json.loads(files.contents[name]) == expected


def test_normalization_of_preprocessor_settings(base):
    assert read_normalization(base) == ([0.5] * 3, [0.25] * 3)
    for value in ("x", [1, 2], [1, 2, "3"], [0.5, 0.5, float("inf")], None):
        edit_json(base / "preprocessor_config.json", image_std=value)
        with pytest.raises(ValueError, match="preprocessor_config.json is invalid: image_mean and image_std"):
            read_normalization(base)


def test_licences_of_both_parts_of_a_composed_model_are_kept():
    vision = AuxiliaryFiles({"LICENSE": b"MIT", "x.py": b""}, card=CardFields("vit", ["a/vit"], {"license": "mit"}))
    code = {"tokenization_x.py": b"from .y import Z", "y.py": b"", "unused.py": b""}
    llm_card = CardFields("llm", ["b/llm"], {"license": "apache-2.0"})
    llm = AuxiliaryFiles({"LICENSE": b"Apache", "NOTICE": b"n", **code}, card=llm_card)
    files = compose_auxiliary_files(vision, llm)
    assert files.contents == {"LICENSE": b"MIT", "LICENSE.language_model": b"Apache", "NOTICE": b"n", "x.py": b""}
    assert files.named_code == code
    assert files.card == CardFields("vit and llm", ["a/vit", "b/llm"], {})
    assert compose_auxiliary_files(llm, llm).contents.keys() == llm.contents.keys()


def test_code_of_the_tokenizer_of_another_llm_is_written(tmp_path):
    code = {"tokenization_x.py": b"from .y import Z", "y.py": b"", "unused.py": b""}
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_x.T", null]}}')
    (folder / "config.json").write_text('{"model_type": "internvl_chat"}')
    write_auxiliary_files(AuxiliaryFiles(named_code=code), folder, "a test")
    assert {file.name for file in folder.glob("*.py")} == {"tokenization_x.py", "y.py"}


# -- model card --------------------------------------------------------------------------------------------------------


def test_card_takes_over_licence_and_base_models(base, tmp_path):
    card = ModelCard.load(write_to(tmp_path / "out", read_auxiliary_files(base), auto_map=AUTO_MAP) / "README.md")
    assert card.data.to_dict() == {
        "base_model": ["OpenGVLab/InternViT-300M-448px", "Qwen/Qwen2.5-0.5B"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "qwen",
        "license_link": "LICENSE",
        "pipeline_tag": "image-text-to-text",
        "tags": ["internvl", "custom_code"],
    }
    assert f"Made from `base` by a test (internvl {__version__}). " in card.text
    assert "trust_remote_code=True" in card.text


def test_card_of_the_user_is_kept(base, tmp_path):
    folder = write_to(tmp_path / "out", read_auxiliary_files(base))
    (folder / "README.md").write_text("mine")
    write_auxiliary_files(read_auxiliary_files(base), folder, "a test")
    assert (folder / "README.md").read_text() == "mine"


def test_card_names_the_repository_of_the_code(base, tmp_path):
    auto_map = {"AutoModel": "ORG/REPO--modeling_internvl_chat.InternVLChatModel"}
    folder = write_to(tmp_path / "out", read_auxiliary_files(base), auto_map=auto_map)
    card = ModelCard.load(folder / "README.md")
    assert "with code from ORG/REPO, which transformers downloads." in card.text and "custom_code" in card.data.tags


ALIASES = "".join(f"x{i}: &x{i} [{','.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 30))
MERGES = "".join(f"x{i}: &x{i} {{<<: [{','.join([f'*x{i - 1}'] * 9)}]}}\n" for i in range(1, 30))
CARDS = {
    "no front matter": ("license: mit\n", {}, []),
    "list of licences": ("---\nlicense: [mit, apache-2.0]\n---\n", {"license": ["mit", "apache-2.0"]}, []),
    "one base model": ("---\nbase_model: a/b\nlicense: 'mit'\n---\nlicense: gpl\n", {"license": "mit"}, ["a/b"]),
    "Windows": ("\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}, []),
    "path": ("---\nbase_model: /my/model\n---\n", {}, []),
    "tag": ("---\nlicense: !!python/object/apply:os.system [mit]\n---\n", {"license": "mit"}, []),
    "nested": ("---\nmodel-index:\n- name: x\n  license: gpl\nlicense: mit\n---\n", {"license": "mit"}, []),
    "aliases": (f"---\nx0: &x0 [1]\n{ALIASES}license: *x29\n---\n", {}, []),
    "unfinished": ("---\nlicense: mit\n", {"license": "mit"}, []),
    "long": (f"---\nlicense: {'m' * 10**6}\n---\n", {}, []),
    "binary": ("---\nlicense: \x00\x1b[31m\n---\n", {}, []),
    "text": ("---\nlicense_name: Qwen License (v1)\n---\n", {"license_name": "Qwen License (v1)"}, []),
    "apostrophe, comma": ("---\nlicense_name: Bob's, v1\n---\n", {"license_name": "Bob's, v1"}, []),
    "fragment": ("---\nlicense_link: https://a/b/LICENSE#x # y\n---\n", {"license_link": "https://a/b/LICENSE#x"}, []),
    "quoted": ('---\nlicense: "a # b" # c\n---\n', {"license": "a # b"}, []),
    "quoted keys": ("---\n\"license\": mit\n'license_name': x\n---\n", {"license": "mit", "license_name": "x"}, []),
    "flow list with a comment": ("---\nlicense: ['mit', \"gpl\"] # c\n---\n", {"license": ["mit", "gpl"]}, []),
    "block list with comments": ("---\nlicense: # c\n\n# d\n  - mit # e\n---\n", {"license": "mit"}, []),
    "dots": ("---\nlicense: mit\n...\nlicense: gpl\n---\n", {"license": "mit"}, []),
    "folded": ("---\nlicense_name: >-\n  a\n  b\n---\n", {"license_name": "a b"}, []),
    "several lines": ("---\nlicense_name: a\n  b\n---\n", {"license_name": "a b"}, []),
    "merge keys": (f"---\nx0: &x0 {{license: mit}}\n{MERGES}<<: *x29\n---\n", {}, []),
    "deep": ("---\nlicense: " + "[" * 60000, {}, []),
    "null": ("---\nlicense_name: null\nlicense_link: ~\nlicense: mit\n---\n", {"license": "mit"}, []),
    "other keys": ("---\nlicense: mit\nmodel-index:\n- gpl\na key:\n- bsd\n---\n", {"license": "mit"}, []),
    "nested in the field": ("---\nlicense:\n  a:\n  - gpl\n---\n", {}, []),
    "slow": (f"---\nlicense: x{' ' * 60000}y\n---\n", {}, []),
    "many base models": (f"---\nbase_model: [{','.join(['a/b'] * 99)}]\n---\n", {}, ["a/b"] * 8),
}


@pytest.mark.parametrize(("text", "license_fields", "base_models"), CARDS.values(), ids=CARDS)
def test_cards_of_unknown_origin(text, license_fields, base_models):
    start = time.monotonic()
    fields = read_card_fields(text.encode(), "base")
    assert (fields.license, fields.base_models) == (license_fields, base_models)
    assert time.monotonic() - start < 20
