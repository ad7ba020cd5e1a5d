"""A chat model from parts: the right weights arrive, the projector is drawn from the seed, wrong parts are named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.training_runs import composed, flags_of
from safetensors.torch import load_file, save_file

from internvl.arguments.training import parse_args
from internvl.arguments.validate import validate_arguments
from internvl.model.compose import compose, load_projector
from internvl.model.internvl_chat import InternVLChatModel
from internvl.train.build_model import build_model, build_tokenizer


def build(argv: list[str]) -> InternVLChatModel:
    model_args, data_args, training_args = parse_args(argv)
    validate_arguments(model_args, data_args, training_args)
    return build_model(model_args, data_args, training_args, build_tokenizer(model_args, data_args))


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture
def whole_model(tiny):
    return InternVLChatModel.from_pretrained(tiny / "model")


@pytest.mark.parametrize("source", ["vit", "chat checkpoint"])
def test_parts_make_the_model_they_were_cut_from(tiny, parts, whole_model, source, tmp_path):
    flags = [*flags_of(tiny, tmp_path), *composed(parts), "--mlp_path", f"{parts}/mlp_projector.pth"]
    if source == "chat checkpoint":
        flags += ["--vision_path", f"{tiny}/model"]
    model = build([*flags, "--vision_select_layer", "-2", "--drop_path_rate", "0.2"])
    assert same(model.vision_model, whole_model.vision_model)
    assert same(model.mlp1, whole_model.mlp1)
    assert same(model.language_model.model.layers, whole_model.language_model.model.layers)
    config = model.config
    assert (config.template, config.select_layer, config.ps_version) == ("internvl2_5", -2, "v2")
    assert config.force_image_size == config.vision_config.image_size == 56
    assert config.vision_config.drop_path_rate == model.vision_model.encoder.layers[-1].drop_path1.drop_prob == 0.2


def test_a_tied_head_becomes_a_copy_and_new_tokens_start_at_the_mean(tiny, parts, whole_model, tmp_path):
    model = build([*flags_of(tiny, tmp_path), *composed(parts)])
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert torch.equal(embedding, head)
    assert embedding.data_ptr() != head.data_ptr()
    assert not model.config.tie_word_embeddings
    before = whole_model.get_input_embeddings().weight
    assert torch.equal(embedding[:-9], before[:-9])
    torch.testing.assert_close(embedding[-9:], before[:-9].mean(0).expand(9, -1))


def test_a_composed_model_survives_saving(tiny, parts, tmp_path):
    model = build([*flags_of(tiny, tmp_path), *composed(parts)])
    model.save_pretrained(tmp_path / "saved")
    assert same(InternVLChatModel.from_pretrained(tmp_path / "saved"), model)


def test_the_projector_is_drawn_from_the_seed_alone(parts):
    def projector(seed: int) -> torch.Tensor:
        torch.rand(seed + 1)  # whatever else was drawn before
        return compose(parts / "vit", parts / "llm", seed=seed, template="internvl2_5").mlp1[1].weight

    assert torch.equal(projector(3), projector(3))
    assert not torch.equal(projector(3), projector(4))


@pytest.mark.parametrize("name", ["internlm2", "phi3", "llama"])
def test_language_models_of_every_origin(goldens, parts, name, tmp_path):
    source = InternVLChatModel.from_pretrained(goldens / "models" / name)
    source.language_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Model"}  # published ones name code, which is not run
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = compose(parts / "vit", tmp_path, template="internvl2_5")
    assert same(model.language_model, source.language_model)
    ids = torch.arange(1, 9)[None]
    model.img_context_token_id = source.img_context_token_id = -1
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, source.eval()(input_ids=ids).logits)


def test_a_projector_is_read_from_both_kinds_of_file(whole_model, parts, tmp_path):
    state = {name: torch.randn_like(tensor) for name, tensor in whole_model.mlp1.state_dict().items()}
    torch.save(state, tmp_path / "one.pth")
    save_file(state, tmp_path / "two.safetensors")
    for file in ("one.pth", "two.safetensors"):
        load_projector(whole_model, parts / "mlp_projector.pth")
        load_projector(whole_model, tmp_path / file)
        assert all(torch.equal(tensor, state[name]) for name, tensor in whole_model.mlp1.state_dict().items())


class Code:
    def __reduce__(self):
        return print, ("code of a projector file has run",)


PROJECTORS = {
    "another width": ({"0.weight": torch.zeros(3)}, r"holds \{'0.weight': \(3,\)\}, but the model's projector is"),
    "code": (Code(), "cannot be read as a state dict"),
    "one tensor": (torch.zeros(3), "cannot be read as a state dict"),
}


@pytest.mark.parametrize(("content", "message"), PROJECTORS.values(), ids=PROJECTORS)
def test_another_projector_file_is_refused(whole_model, content, message, tmp_path, capsys):
    torch.save(content, tmp_path / "mlp.pth")
    with pytest.raises(ValueError, match=message):
        load_projector(whole_model, tmp_path / "mlp.pth")
    assert "has run" not in capsys.readouterr().out


@pytest.mark.parametrize("file", ["absent.pth", "absent.safetensors", "text.pth", "text.safetensors"])
def test_a_projector_file_that_is_none_is_named(whole_model, file, tmp_path):
    (tmp_path / file.replace("absent", "text")).write_text("not a state dict")
    with pytest.raises(ValueError, match=f"{file} cannot be read as a state dict"):
        load_projector(whole_model, tmp_path / file)


def changed_llm(parts: Path, folder: Path, change) -> Path:
    """A copy of the language model with its weights changed by a function."""
    shutil.copytree(parts / "llm", folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_part_that_lacks_weights_is_refused(tiny, parts, goldens, tmp_path):
    norm = changed_llm(parts, tmp_path / "no_norm", lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"no_norm is no Qwen2ForCausalLM .* it lacks.*: lm_head.weight, model.norm"):
        compose(parts / "vit", norm)
    untied = changed_llm(parts, tmp_path / "untied", lambda weights: None)
    config = json.loads((untied / "config.json").read_text()) | {"tie_word_embeddings": False}
    (untied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lm_head.weight"):
        compose(parts / "vit", untied)
    with pytest.raises(ValueError, match="llm is no vision encoder of its configuration"):
        compose(parts / "llm", parts / "llm")
    with pytest.raises(ValueError, match="Unsupported architecture: 'InternVLChatModel'"):
        compose(parts / "vit", tiny / "model")
    with pytest.raises(ValueError, match="holds LoRA adapters, not plain weights: merge them first"):
        compose(goldens / "models/qwen2_lora", parts / "llm")


def test_pickled_weights_are_not_read(parts, tmp_path):
    shutil.copytree(parts / "llm", tmp_path / "llm")
    torch.save(load_file(parts / "llm/model.safetensors"), tmp_path / "llm/pytorch_model.bin")
    (tmp_path / "llm/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"are pickled \(pytorch_model.bin\)"):
        compose(parts / "vit", tmp_path / "llm")
    read = compose(parts / "vit", tmp_path / "llm", template="internvl2_5", allow_pickle=True).language_model
    expected = load_file(parts / "llm/model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.state_dict().items() if name in expected)


SOURCES = {
    "nothing": ([], "--model_name_or_path is missing, and so are --vision_path and --llm_path"),
    "vision alone": (["--vision_path", "v"], "--vision_path is given and --llm_path is not"),
    "language alone": (["--llm_path", "l"], "--llm_path is given and --vision_path is not"),
}


@pytest.mark.parametrize(("flags", "message"), SOURCES.values(), ids=SOURCES)
def test_half_a_model_is_refused(tiny, flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build([*flags_of(tiny, tmp_path), "--model_name_or_path", "", *flags])


def test_a_chat_checkpoint_takes_precedence_and_says_so(tiny, parts, whole_model, tmp_path, caplog):
    model = build([*flags_of(tiny, tmp_path), *composed(parts), "--model_name_or_path", f"{tiny}/model"])
    assert same(model, whole_model)
    assert "--vision_path and --llm_path not read: --model_name_or_path takes precedence" in caplog.text
