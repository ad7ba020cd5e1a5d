"""Composing a chat model from parts: weights, seeds, invalid parts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.training_runs import build_composition_flags, build_run_flags
from safetensors.torch import load_file, save_file

from internvl.arguments.training import parse_args
from internvl.arguments.validate import validate_arguments
from internvl.model.compose import compose_chat_model, load_projector
from internvl.model.internvl_chat import InternVLChatModel
from internvl.train.build_model import build_model, build_tokenizer


def build(argv: list[str]) -> InternVLChatModel:
    model_args, data_args, training_args = parse_args(argv)
    validate_arguments(model_args, data_args, training_args)
    return build_model(model_args, data_args, training_args, build_tokenizer(model_args, data_args))


def have_equal_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture
def chat_model(tiny_inputs):
    return InternVLChatModel.from_pretrained(tiny_inputs / "model")


@pytest.mark.parametrize("source", ["vit", "chat checkpoint"])
def test_parts_compose_the_model_they_were_extracted_from(tiny_inputs, model_parts, chat_model, source, tmp_path):
    flags = [
        *build_run_flags(tiny_inputs, tmp_path),
        *build_composition_flags(model_parts),
        "--mlp_path",
        f"{model_parts}/mlp_projector.pth",
    ]
    if source == "chat checkpoint":
        flags += ["--vision_path", f"{tiny_inputs}/model"]
    model = build([*flags, "--vision_select_layer", "-2", "--drop_path_rate", "0.2"])
    assert have_equal_weights(model.vision_model, chat_model.vision_model)
    assert have_equal_weights(model.mlp1, chat_model.mlp1)
    assert have_equal_weights(model.language_model.model.layers, chat_model.language_model.model.layers)
    config = model.config
    assert (config.template, config.select_layer, config.ps_version) == ("internvl2_5", -2, "v2")
    assert config.force_image_size == config.vision_config.image_size == 56
    assert config.vision_config.drop_path_rate == model.vision_model.encoder.layers[-1].drop_path1.drop_prob == 0.2


def test_tied_head_becomes_a_copy_and_new_tokens_start_at_the_mean(tiny_inputs, model_parts, chat_model, tmp_path):
    model = build([*build_run_flags(tiny_inputs, tmp_path), *build_composition_flags(model_parts)])
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert torch.equal(embedding, head)
    assert embedding.data_ptr() != head.data_ptr()
    assert not model.config.tie_word_embeddings
    before = chat_model.get_input_embeddings().weight
    assert torch.equal(embedding[:-9], before[:-9])
    torch.testing.assert_close(embedding[-9:], before[:-9].mean(0).expand(9, -1))


def test_composed_model_is_saved_and_loaded(tiny_inputs, model_parts, tmp_path):
    model = build([*build_run_flags(tiny_inputs, tmp_path), *build_composition_flags(model_parts)])
    model.save_pretrained(tmp_path / "saved")
    assert have_equal_weights(InternVLChatModel.from_pretrained(tmp_path / "saved"), model)


def test_projector_depends_on_the_seed_only(model_parts):
    def projector(seed: int) -> torch.Tensor:
        torch.rand(seed + 1)  # other random numbers drawn before do not matter
        return (
            compose_chat_model(model_parts / "vit", model_parts / "llm", seed=seed, template="internvl2_5")
            .mlp1[1]
            .weight
        )

    assert torch.equal(projector(3), projector(3))
    assert not torch.equal(projector(3), projector(4))


@pytest.mark.parametrize("name", ["internlm2", "phi3", "llama"])
def test_every_kind_of_llm_is_composed(goldens, model_parts, name, tmp_path):
    source = InternVLChatModel.from_pretrained(goldens / "models" / name)
    source.language_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # Published checkpoints name code here. It must not run.
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = compose_chat_model(model_parts / "vit", tmp_path, template="internvl2_5")
    assert have_equal_weights(model.language_model, source.language_model)
    ids = torch.arange(1, 9)[None]
    model.img_context_token_id = source.img_context_token_id = -1
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, source.eval()(input_ids=ids).logits)


def test_projector_is_loaded_from_both_file_formats(chat_model, model_parts, tmp_path):
    state = {name: torch.randn_like(tensor) for name, tensor in chat_model.mlp1.state_dict().items()}
    torch.save(state, tmp_path / "one.pth")
    save_file(state, tmp_path / "two.safetensors")
    for file in ("one.pth", "two.safetensors"):
        load_projector(chat_model, model_parts / "mlp_projector.pth")
        load_projector(chat_model, tmp_path / file)
        assert all(torch.equal(tensor, state[name]) for name, tensor in chat_model.mlp1.state_dict().items())


class Code:
    """An object whose pickle runs code."""

    def __reduce__(self):
        return print, ("code of a projector file has run",)


INVALID_PROJECTORS = {
    "another width": ({"0.weight": torch.zeros(3)}, r"does not fit the model: expected .*, got \{'0.weight': \(3,\)\}"),
    "code": (Code(), "is not readable as a state dict"),
    "one tensor": (torch.zeros(3), "is not readable as a state dict"),
}


@pytest.mark.parametrize(("content", "message"), INVALID_PROJECTORS.values(), ids=INVALID_PROJECTORS)
def test_invalid_projector_file_is_refused(chat_model, content, message, tmp_path, capsys):
    torch.save(content, tmp_path / "mlp.pth")
    with pytest.raises(ValueError, match=message):
        load_projector(chat_model, tmp_path / "mlp.pth")
    assert "has run" not in capsys.readouterr().out


@pytest.mark.parametrize("file", ["absent.pth", "absent.safetensors", "text.pth", "text.safetensors"])
def test_unreadable_projector_file_is_named(chat_model, file, tmp_path):
    (tmp_path / file.replace("absent", "text")).write_text("not a state dict")
    with pytest.raises(ValueError, match=f"{file} is not readable as a state dict"):
        load_projector(chat_model, tmp_path / file)


def copy_changed_llm(parts: Path, folder: Path, change) -> Path:
    """Copy the LLM with its weights changed by a function."""
    shutil.copytree(parts / "llm", folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_part_with_missing_weights_is_refused(tiny_inputs, model_parts, goldens, tmp_path):
    norm = copy_changed_llm(model_parts, tmp_path / "no_norm", lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(
        ValueError, match=r"no_norm do not match the model of its config.json: missing: model.norm.weight$"
    ):
        compose_chat_model(model_parts / "vit", norm)
    untied = copy_changed_llm(model_parts, tmp_path / "untied", lambda weights: None)
    config = json.loads((untied / "config.json").read_text()) | {"tie_word_embeddings": False}
    (untied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lm_head.weight"):
        compose_chat_model(model_parts / "vit", untied)
    with pytest.raises(ValueError, match=r"llm/config.json has model_type 'qwen2', expected 'intern_vit_6b'"):
        compose_chat_model(model_parts / "llm", model_parts / "llm")
    with pytest.raises(ValueError, match="Unsupported architecture: 'InternVLChatModel'"):
        compose_chat_model(model_parts / "vit", tiny_inputs / "model")
    with pytest.raises(ValueError, match="holds LoRA adapters, not plain weights: merge them first"):
        compose_chat_model(goldens / "models/qwen2_lora", model_parts / "llm")


def test_pickled_weights_are_loaded_with_allow_pickle_only(model_parts, tmp_path):
    shutil.copytree(model_parts / "llm", tmp_path / "llm")
    torch.save(load_file(model_parts / "llm/model.safetensors"), tmp_path / "llm/pytorch_model.bin")
    (tmp_path / "llm/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"are pickled \(pytorch_model.bin\)"):
        compose_chat_model(model_parts / "vit", tmp_path / "llm")
    read = compose_chat_model(
        model_parts / "vit", tmp_path / "llm", template="internvl2_5", allow_pickle=True
    ).language_model
    expected = load_file(model_parts / "llm/model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.state_dict().items() if name in expected)


MISSING_SOURCES = {
    "no path": ([], "--model_name_or_path is required: .* --vision_path and --llm_path"),
    "vision encoder only": (["--vision_path", "v"], "--llm_path is required with --vision_path"),
    "LLM only": (["--llm_path", "l"], "--vision_path is required with --llm_path"),
}


@pytest.mark.parametrize(("flags", "message"), MISSING_SOURCES.values(), ids=MISSING_SOURCES)
def test_missing_part_is_refused(tiny_inputs, flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build([*build_run_flags(tiny_inputs, tmp_path), "--model_name_or_path", "", *flags])


def test_chat_checkpoint_takes_precedence_with_a_warning(tiny_inputs, model_parts, chat_model, tmp_path, caplog):
    model = build(
        [
            *build_run_flags(tiny_inputs, tmp_path),
            *build_composition_flags(model_parts),
            "--model_name_or_path",
            f"{tiny_inputs}/model",
        ]
    )
    assert have_equal_weights(model, chat_model)
    assert "--vision_path and --llm_path ignored: --model_name_or_path takes precedence" in caplog.text
