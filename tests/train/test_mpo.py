"""Preference optimisation from its command line on: flags, the reference, and real runs on a tiny checkpoint."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import training_runs
from helpers.training_runs import FULL, LORA, copy_model, history, write_meta
from safetensors.torch import load_file

from internvl.arguments.preference import PREFERENCE_ARGUMENTS, DPOConfig, PreferenceDataArguments
from internvl.arguments.training import parse_args
from internvl.arguments.validate import validate_preference_arguments
from internvl.data.preference_dataset import PreferenceDataset, pair_collator
from internvl.metrics.model_flops import model_flops
from internvl.model import internvl_chat
from internvl.train.build_data import build_data
from internvl.train.build_model import build_model, build_tokenizer
from internvl.train.build_trainer import build_trainer
from internvl.train.internvl_chat_mpo import build_reference
from internvl.train.preference_loss import InternVLChatModel, PreferenceLoss
from internvl.train.trainer_dpo import MultimodalDPOTrainer
from internvl.train.trainer_metered import METRICS_FILE

ENTRY = training_runs.ENTRY.with_name("internvl_chat_mpo.py")
RECIPE = "--loss_type sigmoid,bco_pair --sigmoid_loss_weight 0.8 --bco_pair_loss_weight 0.2 --rpo_alpha 1".split()
FEW_STEPS = ["--max_steps", "4", "--save_steps", "2", "--gradient_accumulation_steps", "1", *RECIPE]

# -- flags -------------------------------------------------------------------------------------------------------------

UPSTREAM = {
    "2.5": "--conv_style internvl2_5 --use_liger True --pad2square False --use_data_resampling False --save_strategy no"
    " --evaluation_strategy no --max_seq_length 8192 --learning_rate 1e-6 --warmup_ratio 0.03 " + " ".join(RECIPE),
    "3.5": "--conv_style internvl2_5 --min_num_frame 8 --max_num_frame 32 --use_custom_flash_attn False"
    " --split_annotations False --gradient_checkpointing True --use_fast_tokenizer False --seed 42",
}


@pytest.mark.parametrize("flags", UPSTREAM.values(), ids=UPSTREAM)
def test_upstreams_flags_are_known(flags):
    _, data_args, args = parse_args(["--output_dir", "unused", *flags.split()], PREFERENCE_ARGUMENTS)
    recipe = "loss_type" in flags
    assert args.loss_type == ("sigmoid,bco_pair" if recipe else "sigmoid")
    assert args.rpo_alpha == (1 if recipe else None)
    assert (data_args.sigmoid_loss_weight, data_args.bco_pair_loss_weight) == ((0.8, 0.2) if recipe else (1, 1))
    assert args.beta == 0.1


WRONG = {
    "a loss over the batch": ("--loss_type aot", "--loss_type aot is not supported: it sorts"),
    "an unknown loss": ("--loss_type kto", "invalid choice: 'kto'"),
    "no temperature": ("--beta 0", "--beta 0.0 must be positive"),
    "worse than a coin": ("--label_smoothing 0.5", r"a probability in \[0, 0.5\)"),
    "smoothing without effect": ("--loss_type hinge --label_smoothing 0.1", "does not act on --loss_type hinge"),
    "a weight without effect": ("--loss_type hinge --sigmoid_loss_weight 0.8", "does not act on --loss_type hinge"),
    "packing": ("--use_packed_ds True", "--use_packed_ds True"),
}


@pytest.mark.parametrize(("flags", "message"), WRONG.values(), ids=WRONG)
def test_wrong_flags_are_refused_in_one_sentence(flags, message):
    with pytest.raises(ValueError, match=message):
        argv = "--output_dir unused --meta_path m --model_name_or_path n --conv_style internvl2_5".split()
        validate_preference_arguments(*parse_args([*argv, *flags.split()], PREFERENCE_ARGUMENTS))


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(goldens, tmp_path_factory) -> Path:
    """A checkpoint folder (model, tokenizer) and a meta file of pairs over real images."""
    folder = tmp_path_factory.mktemp("tiny_mpo")
    copy_model(goldens, folder)
    (folder / "model/modeling_internvl_chat.py").write_text("# upstream's published code\n")
    records = []
    for line in (goldens / "dataset/ds_main.jsonl").read_text().splitlines():
        record = json.loads(line)
        turns = record.pop("conversations")
        human, gpt = (next((t["value"] for t in turns if t["from"] == role), "") for role in ("human", "gpt"))
        if human and gpt and isinstance(record.get("image", ""), str):
            records.append(record | {"question": human, "chosen": gpt, "rejected": gpt[::-1]})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    write_meta(folder, goldens / "dataset/images")
    return folder


def flags_of(tiny: Path, output: Path) -> list[str]:
    return [*training_runs.flags_of(tiny, output), *FEW_STEPS]


def prepare(*argv: str) -> MultimodalDPOTrainer:
    """What `main` does before the first step, in this process."""
    model_args, data_args, args = parse_args(list(argv), PREFERENCE_ARGUMENTS)
    validate_preference_arguments(model_args, data_args, args)
    tokenizer = build_tokenizer(model_args, data_args)
    model = build_model(model_args, data_args, args, tokenizer, InternVLChatModel)
    reference = build_reference(model, model_args, data_args, args)
    data = build_data(data_args, args, tokenizer, model.num_image_token, PreferenceDataset)
    return build_trainer(
        *(model, tokenizer, data, data_args, args, MultimodalDPOTrainer, pair_collator),
        loss=PreferenceLoss(data_args, args),
        reference=reference,
    )


def batch_of(trainer: MultimodalDPOTrainer, *ids: int) -> dict:
    batch = trainer.data_collator([trainer.train_dataset[(0, index)] for index in ids])
    del batch["bad_samples"], batch["documents"]
    return batch


def run(tiny: Path, output: Path, *flags: str, ranks: int = 1) -> None:
    training_runs.run(tiny, output, *FEW_STEPS, *flags, ranks=ranks, entry=ENTRY)


@pytest.mark.parametrize("flags", [LORA, FULL, [*FULL, "--reference_free", "True"]])
def test_speed_is_that_of_both_answers_and_of_the_reference(tiny, tmp_path, monkeypatch, flags):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny / "cache"))
    trainer = prepare(*flags_of(tiny, tmp_path), *flags, "--max_steps", "1", "--save_strategy", "no")
    trainer.train()
    (entry,) = map(json.loads, (tmp_path / METRICS_FILE).read_text().splitlines())
    (row,) = trainer.schedule.plan(0).steps[0].flatten().tolist()
    (sample,) = trainer.schedule.plan(0).row(row)
    pair = trainer.train_dataset[(0, sample)]
    documents = [len(pair[f"{side}_input_ids"]) for side in ("chosen", "rejected")]
    trained = sum(int((pair[f"{side}_labels"] != -100).sum()) for side in ("chosen", "rejected"))
    assert entry["tokens_per_second"] * entry["step_seconds"] == pytest.approx(sum(documents))
    assert entry["padding_percent"] == pytest.approx(100 * (1 - sum(documents) / (2 * max(documents))))
    work = documents, trained, len(pair["pixel_values"])
    expected = model_flops(trainer.model).of(*work)
    if "--reference_free" not in flags:
        expected += model_flops(trainer.model, backward=False, adapters=False).of(*work)
    assert entry["tflops"] * 1e12 * entry["step_seconds"] == pytest.approx(expected)
    assert "rewards/margins" in entry


def test_training_starts_at_log_2_and_learns_to_prefer(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny / "cache"))
    flags = """--loss_type sigmoid --sigmoid_loss_weight 1 --bco_pair_loss_weight 1 --rpo_alpha 0
        --per_device_train_batch_size 4 --max_steps 8 --save_strategy no""".split()
    trainer = prepare(*flags_of(tiny, tmp_path), *FULL, *flags)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    assert steps[-1]["rewards/margins"] > 0.1
    assert steps[-1]["rewards/accuracies"] == 1
    assert "nll_loss" not in steps[0]


def test_switched_off_adapters_are_as_good_as_a_second_model(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny / "cache"))
    one = prepare(*flags_of(tiny, tmp_path), *LORA)
    two = prepare(*flags_of(tiny, tmp_path), *LORA, "--freeze_mlp", "False")
    assert one.reference is None
    assert not any(parameter.requires_grad for parameter in two.reference.parameters())
    batch = batch_of(one, 0, 1, 4)
    for trainer in (one, two):
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    trains = [name for name, parameter in one.model.named_parameters() if parameter.requires_grad]
    one.model.train()
    reference = one.reference_log_probs(one.model, batch)
    torch.testing.assert_close(reference, two.reference_log_probs(two.model, batch))
    assert not torch.allclose(reference, one.model(**batch)), "the adapters do something"
    assert one.model.training
    assert trains == [name for name, parameter in one.model.named_parameters() if parameter.requires_grad]


def test_a_reference_gets_new_tokens_tiles_and_adapters_of_the_checkpoint(tiny, tmp_path, monkeypatch):
    """Adapters that the checkpoint came with belong to the reference."""
    from helpers.training_runs import without_image_tokens

    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    lora = internvl_chat.InternVLChatModel.from_pretrained(tiny / "model")
    lora.wrap_llm_lora(r=4, lora_alpha=8)
    lora.config.use_llm_lora = 4
    lora.save_pretrained(tmp_path / "model")
    for file in (tiny / "model").glob("*token*"):
        shutil.copy(file, tmp_path / "model")
    without_image_tokens(tmp_path / "model")
    flags = [*LORA, "--use_backbone_lora", "0", "--model_name_or_path", f"{tmp_path}/model"]
    trainer = prepare(*flags_of(tiny, tmp_path / "out"), *flags, "--force_image_size", "112")
    policy, reference = trainer.model.eval(), trainer.reference
    assert policy.img_context_token_id == reference.img_context_token_id
    assert policy.num_image_token == reference.num_image_token == 16
    weights = reference.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in policy.state_dict().items())
    torch.testing.assert_close(policy(**batch_of(trainer, 0)), reference(**batch_of(trainer, 0)))


@pytest.fixture(scope="module")
def one_process(tiny, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "one"
    run(tiny, output, *FULL, "--per_device_train_batch_size", "2")
    return output


def test_a_run_saves_what_others_can_open(one_process):
    assert json.loads((one_process / "config.json").read_text())["architectures"] == ["InternVLChatModel"]
    internvl_chat.InternVLChatModel.from_pretrained(one_process)
    assert (one_process / "modeling_internvl_chat.py").read_text() == "# upstream's published code\n"


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_and_zero_change_no_number(tiny, one_process, stage, tmp_path):
    zero = ["--deepspeed", f"zero_stage{stage}_config.json"]
    run(tiny, tmp_path, *FULL, "--per_device_train_batch_size", "1", *zero, ranks=2)
    expected, found = history(one_process), history(tmp_path)
    keys = [key for key in expected[0] if "/" in key] + ["loss", "nll_loss", "grad_norm"]
    assert len(keys) == 9
    for key in keys:
        torch.testing.assert_close(
            [e[key] for e in found],
            [e[key] for e in expected],
            atol=1e-4,
            rtol=3e-4,
            msg=lambda text, key=key: f"{key}: {text}",
        )


def test_resume_equals_unbroken(tiny, one_process, tmp_path):
    """Also BCO's mean reward, which only the steps before know."""
    shutil.copytree(one_process / "checkpoint-2", tmp_path / "checkpoint-2")
    run(tiny, tmp_path, *FULL, "--per_device_train_batch_size", "2")
    assert [entry["loss"] for entry in history(tmp_path)] == [entry["loss"] for entry in history(one_process)]
    resumed = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(t, resumed[name]) for name, t in load_file(one_process / "model.safetensors").items())


def test_the_arguments_are_upstreams():
    from internvl.train import internvl_chat_mpo as entry

    assert entry.DataTrainingArguments is PreferenceDataArguments
    assert entry.DPOConfig is DPOConfig
    assert entry.LazySupervisedDataset is PreferenceDataset
    assert callable(entry.main)
