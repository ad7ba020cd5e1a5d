"""Tokens that a user has added to the tokenizer: their rows are trained, or their answers are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.agreement import compute_probe_logits
from helpers.training_runs import (
    FREEZE_ALL,
    build_run_flags,
    load_weights,
    prepare_trainer,
    read_losses,
    run_training,
    train_in_process,
    write_meta_file,
)

from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.tokenizers.loading import load_tokenizer
from internvl.tools import merge_lora

NEW_TOKENS = ["<left>", "<right>"]
LLM_LORA = [*FREEZE_ALL, "--use_llm_lora", "4", "--llm_lora_dropout", "0"]
TRAIN_TOKENS = [*LLM_LORA, "--train_new_tokens", "True"]
ROWS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


@pytest.fixture(scope="module")
def inputs(tiny_inputs, tmp_path_factory) -> Path:
    """Return a tiny model whose tokenizer has two new tokens, and data whose answers use them."""
    folder = tmp_path_factory.mktemp("new_tokens")
    shutil.copytree(tiny_inputs / "model", folder / "model")
    tokenizer = load_tokenizer(folder / "model")
    tokenizer.add_tokens(NEW_TOKENS)
    tokenizer.save_pretrained(folder / "model")
    turns = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": ""}]
    records = [[turns[0], turns[1] | {"value": NEW_TOKENS[i % 2]}] for i in range(24)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"conversations": r}) + "\n" for r in records))
    write_meta_file(folder, folder)
    return folder


@pytest.fixture(autouse=True)
def cache(inputs, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(inputs / "cache"))


def test_rows_of_new_tokens_are_trained_saved_resumed_and_merged(inputs, tmp_path):
    base, run = load_weights(inputs / "model"), tmp_path / "run"
    train_in_process(inputs, run, *TRAIN_TOKENS)
    tokenizer = load_tokenizer(run)
    vocab_size = len(base[ROWS[0]])
    assert tokenizer.convert_tokens_to_ids(NEW_TOKENS) == [vocab_size, vocab_size + 1]

    merge_lora.main([str(run), str(tmp_path / "merged"), "--dtype", "float32"])
    merged = load_weights(tmp_path / "merged")
    for name in ROWS:
        assert torch.equal(merged[name][:vocab_size], base[name])
        mean = base[name].mean(dim=0)
        assert not torch.allclose(merged[name][vocab_size], mean)
        assert not torch.equal(*merged[name][vocab_size:])
    expected = compute_probe_logits(InternVLChatModel.from_pretrained(run).eval(), tokenizer)
    actual = compute_probe_logits(InternVLChatModel.from_pretrained(tmp_path / "merged").eval(), tokenizer)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)

    resumed = tmp_path / "resumed"
    shutil.copytree(run / "checkpoint-3", resumed / "checkpoint-3")
    trainer = prepare_trainer([*build_run_flags(inputs, resumed), *TRAIN_TOKENS])
    trainer.train(resume_from_checkpoint=str(resumed / "checkpoint-3"))
    trainer.save_model()
    trainer.save_state()
    assert read_losses(resumed) == read_losses(run)
    assert torch.equal(compute_probe_logits(InternVLChatModel.from_pretrained(resumed).eval(), tokenizer), expected)

    # A later run on the adapters continues them, rows included.
    train_in_process(
        inputs,
        tmp_path / "continued",
        *TRAIN_TOKENS,
        "--model_name_or_path",
        str(run),
        "--max_steps",
        "1",
        "--learning_rate",
        "0",
    )
    continued = InternVLChatModel.from_pretrained(tmp_path / "continued").eval()
    assert torch.equal(compute_probe_logits(continued, tokenizer), expected)


@pytest.mark.multiprocess
def test_rows_are_trained_alike_under_zero_2(inputs, tmp_path):
    flags = [*TRAIN_TOKENS, "--deepspeed", "zero_stage2_config.json"]
    run_training(inputs, tmp_path / "zero2", *flags, ranks=2)
    train_in_process(inputs, tmp_path / "one", *TRAIN_TOKENS)
    assert read_losses(tmp_path / "zero2") == pytest.approx(read_losses(tmp_path / "one"), rel=1e-4)


def test_answers_with_untrained_tokens_are_refused(inputs, tmp_path):
    with pytest.raises(ValueError, match="<left>.*--train_new_tokens True"):
        prepare_trainer([*build_run_flags(inputs, tmp_path), *LLM_LORA])


def test_tokens_that_an_earlier_run_left_untrained_stay_so(inputs, tiny_inputs, tmp_path):
    """The earlier run has added their rows, and its data does not use them."""
    train_in_process(
        tiny_inputs, tmp_path / "run", *LLM_LORA, "--model_name_or_path", f"{inputs}/model", "--max_steps", "1"
    )
    flags = [*build_run_flags(inputs, tmp_path / "second"), "--model_name_or_path", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="<left>.*--train_new_tokens True"):
        prepare_trainer([*flags, *LLM_LORA])
    trainer = prepare_trainer([*flags, *TRAIN_TOKENS, "--merge_before_training", "True"])
    assert [n for n, p in trainer.model.named_parameters() if "trainable_tokens_delta" in n and p.requires_grad]
    assert trainer.model.config.untrained_token_ids == []


def test_adapters_that_train_rows_are_continued_with_the_flag_only(inputs, tmp_path):
    train_in_process(inputs, tmp_path / "run", *TRAIN_TOKENS, "--max_steps", "1")
    flags = [*build_run_flags(inputs, tmp_path / "second"), "--model_name_or_path", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="--train_new_tokens False is not supported with these adapters"):
        prepare_trainer([*flags, *LLM_LORA])


@pytest.mark.parametrize("flags", [["--unfreeze_lm_head", "True"], ["--llm_lora_targets", "lm_head"]])
def test_answers_are_accepted_if_other_flags_train_their_rows(inputs, tmp_path, flags):
    prepare_trainer([*build_run_flags(inputs, tmp_path), *LLM_LORA, *flags])


def test_new_tokens_are_logged(inputs, tmp_path, caplog):
    with caplog.at_level("INFO", logger="internvl"):
        prepare_trainer([*build_run_flags(inputs, tmp_path), *TRAIN_TOKENS])
    assert "New tokens of the tokenizer, with the mean row: <left>, <right>" in caplog.text


def test_the_flag_requires_adapters(parse_flags):
    from internvl.arguments.validate import validate_arguments

    with pytest.raises(ValueError, match="--train_new_tokens True requires --use_llm_lora"):
        validate_arguments(*parse_flags("--train_new_tokens", "True"))
