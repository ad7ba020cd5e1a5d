"""Preference optimization: flags, the reference model, and runs of a tiny model."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import training_runs
from helpers.evaluation_cases import make_settings
from helpers.paths import FINETUNE_PROGRAM
from helpers.synchronizations import assert_one_synchronization_a_step
from helpers.training_runs import (
    TRAIN_ADAPTERS,
    TRAIN_LLM_AND_PROJECTOR,
    copy_tiny_model,
    read_step_logs,
    remove_image_tokens,
    write_meta_file,
)
from safetensors.torch import load_file, save_file

from internvl.arguments.preference import PREFERENCE_ARGUMENTS, DPOConfig, PreferenceDataArguments
from internvl.arguments.training import parse_args
from internvl.arguments.validate import validate_preference_arguments
from internvl.checkpoint.resume_rules import RunRecord
from internvl.data.images import NORMALIZATION_STATS, normalize_tiles
from internvl.data.preference_dataset import PreferenceDataset, collate_pairs
from internvl.evaluation.evaluation_data import EvaluationData, EvaluationSet
from internvl.evaluation.model_mode import disabled_adapters, evaluation_mode
from internvl.evaluation.results import read_metrics, read_predictions
from internvl.metrics.model_flops import count_model_flops
from internvl.metrics.step_metrics import METRICS_FILE
from internvl.model import internvl_chat
from internvl.planning.packed_dataset import PackedDataset
from internvl.train import internvl_chat_mpo
from internvl.train.build_data import build_data
from internvl.train.build_model import build_model, build_tokenizer
from internvl.train.build_trainer import build_trainer
from internvl.train.preference_loss import PreferenceLoss, PreferenceModel
from internvl.train.trainer_dpo import MultimodalDPOTrainer

MPO_PROGRAM = FINETUNE_PROGRAM.with_name("internvl_chat_mpo.py")
RECIPE = "--loss_type sigmoid,bco_pair --sigmoid_loss_weight 0.8 --bco_pair_loss_weight 0.2 --rpo_alpha 1".split()
FEW_STEPS = ["--max_steps", "4", "--save_steps", "2", "--gradient_accumulation_steps", "1", *RECIPE]

# -- flags -------------------------------------------------------------------------------------------------------------

UPSTREAM_FLAGS = {  # of upstream's recipes for InternVL 2.5 and 3.5
    "2.5": "--conv_style internvl2_5 --use_liger True --pad2square False --use_data_resampling False --save_strategy no"
    " --evaluation_strategy no --max_seq_length 8192 --learning_rate 1e-6 --warmup_ratio 0.03 " + " ".join(RECIPE),
    "3.5": "--conv_style internvl2_5 --min_num_frame 8 --max_num_frame 32 --use_custom_flash_attn False"
    " --split_annotations False --gradient_checkpointing True --use_fast_tokenizer False --seed 42",
}


@pytest.mark.parametrize("flags", UPSTREAM_FLAGS.values(), ids=UPSTREAM_FLAGS)
def test_upstream_flags_are_parsed(flags):
    _, data_args, args = parse_args(["--output_dir", "unused", *flags.split()], PREFERENCE_ARGUMENTS)
    has_recipe = "loss_type" in flags
    assert args.loss_type == ("sigmoid,bco_pair" if has_recipe else "sigmoid")
    assert args.rpo_alpha == (1 if has_recipe else None)
    assert (data_args.sigmoid_loss_weight, data_args.bco_pair_loss_weight) == ((0.8, 0.2) if has_recipe else (1, 1))
    assert args.beta == 0.1


INVALID_FLAGS = {
    "loss over a batch": ("--loss_type aot", "--loss_type aot is not supported: choose"),
    "unknown loss": ("--loss_type kto", "invalid choice: 'kto'"),
    "beta of 0": ("--beta 0", "--beta 0.0 is invalid: expected a number > 0"),
    "label smoothing too large": ("--label_smoothing 0.5", r"a number in \[0, 0.5\)"),
    "label smoothing without effect": (
        "--loss_type hinge --label_smoothing 0.1",
        "is not supported with --loss_type hinge",
    ),
    "loss weight without effect": (
        "--loss_type hinge --sigmoid_loss_weight 0.8",
        "is not supported with --loss_type hinge",
    ),
    "packing": ("--use_packed_ds True", "--use_packed_ds True"),
    "base answers": ("--eval_base_answers a.json", "--eval_base_answers a.json is not supported with preference"),
}


@pytest.mark.parametrize(("flags", "message"), INVALID_FLAGS.values(), ids=INVALID_FLAGS)
def test_invalid_flags_are_an_error(flags, message):
    argv = "--output_dir unused --meta_path m --model_name_or_path n --conv_style internvl2_5".split()
    with pytest.raises(ValueError, match=message):
        validate_preference_arguments(*parse_args([*argv, *flags.split()], PREFERENCE_ARGUMENTS))


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_inputs(goldens, tmp_path_factory) -> Path:
    """Write the inputs of a tiny run on pairs of answers.

    Like the fixture of this name in `helpers/fixtures.py`. The rejected answer is the chosen one reversed.
    """
    folder = tmp_path_factory.mktemp("tiny_mpo")
    copy_tiny_model(goldens, folder)
    (folder / "model/modeling_internvl_chat.py").write_text("# upstream's published code\n")
    records = []
    for line in (goldens / "dataset/ds_main.jsonl").read_text().splitlines():
        record = json.loads(line)
        turns = record.pop("conversations")
        question, answer = (next((t["value"] for t in turns if t["from"] == role), "") for role in ("human", "gpt"))
        if question and answer and isinstance(record.get("image", ""), str):
            records.append(record | {"question": question, "chosen": answer, "rejected": answer[::-1]})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    write_meta_file(folder, goldens / "dataset/images")
    return folder


def build_flags(tiny_inputs: Path, output: Path) -> list[str]:
    return [*training_runs.build_run_flags(tiny_inputs, output), *FEW_STEPS]


def prepare_trainer(*argv: str) -> MultimodalDPOTrainer:
    """Build the trainer as `main` does, ready for its first step."""
    model_args, data_args, args = parse_args(list(argv), PREFERENCE_ARGUMENTS)
    validate_preference_arguments(model_args, data_args, args)
    tokenizer = build_tokenizer(model_args, data_args)
    model = build_model(model_args, data_args, args, tokenizer, PreferenceModel)
    reference = internvl_chat_mpo.build_reference(model, model_args, data_args, args)
    data = build_data(data_args, args, tokenizer, model.num_image_token, PreferenceDataset)
    return build_trainer(
        *(model, tokenizer, data, data_args, args, RunRecord(model_args, data_args, args)),
        *(MultimodalDPOTrainer, collate_pairs),
        loss=PreferenceLoss(data_args, args),
        reference=reference,
    )


def collate_samples(trainer: MultimodalDPOTrainer, *ids: int) -> dict:
    batch = trainer.data_collator([trainer.train_dataset[(0, index)] for index in ids])
    del batch["bad_samples"], batch["documents"]
    return batch


def run_training(tiny_inputs: Path, output: Path, *flags: str, ranks: int = 1) -> None:
    training_runs.run_training(tiny_inputs, output, *FEW_STEPS, *flags, ranks=ranks, entry=MPO_PROGRAM)


@pytest.mark.parametrize(
    "flags", [TRAIN_ADAPTERS, TRAIN_LLM_AND_PROJECTOR, [*TRAIN_LLM_AND_PROJECTOR, "--reference_free", "True"]]
)
def test_metrics_count_both_answers_and_the_reference(tiny_inputs, tmp_path, monkeypatch, flags):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    trainer = prepare_trainer(*build_flags(tiny_inputs, tmp_path), *flags, "--max_steps", "1", "--save_strategy", "no")
    trainer.train()
    (entry,) = map(json.loads, (tmp_path / METRICS_FILE).read_text().splitlines())
    (row,) = trainer.schedule.plan(0).steps[0].flatten().tolist()
    (sample,) = trainer.schedule.plan(0).get_row_samples(row)
    pair = trainer.train_dataset[(0, sample)]
    documents = [len(pair[f"{side}_input_ids"]) for side in ("chosen", "rejected")]
    num_loss_tokens = sum(int((pair[f"{side}_labels"] != -100).sum()) for side in ("chosen", "rejected"))
    assert entry["tokens_per_second"] * entry["step_seconds"] == pytest.approx(sum(documents))
    assert entry["padding_percent"] == pytest.approx(100 * (1 - sum(documents) / (2 * max(documents))))
    amounts = documents, num_loss_tokens, len(pair["pixel_values"])
    expected = count_model_flops(trainer.model).count(*amounts)
    if "--reference_free" not in flags:
        # The reference: a forward pass with the adapters disabled.
        expected += count_model_flops(trainer.model, backward=False, adapters=False).count(*amounts)
    assert entry["tflops"] * 1e12 * entry["step_seconds"] == pytest.approx(expected)
    assert "rewards/margins" in entry


def test_sigmoid_loss_starts_at_log_2_and_decreases(tiny_inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    flags = """--loss_type sigmoid --sigmoid_loss_weight 1 --bco_pair_loss_weight 1 --rpo_alpha 0
        --per_device_train_batch_size 4 --max_steps 8 --save_strategy no""".split()
    trainer = prepare_trainer(*build_flags(tiny_inputs, tmp_path), *TRAIN_LLM_AND_PROJECTOR, *flags)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    assert steps[-1]["rewards/margins"] > 0.1
    assert steps[-1]["rewards/accuracies"] == 1
    assert "nll_loss" not in steps[0]


def test_disabled_adapters_equal_a_second_model_as_reference(tiny_inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    flags = [*build_flags(tiny_inputs, tmp_path), *TRAIN_ADAPTERS]
    without_copy = prepare_trainer(*flags)
    with_copy = prepare_trainer(*flags, "--freeze_mlp", "False")  # the projector has no adapter to disable
    assert without_copy.reference is None
    assert not any(parameter.requires_grad for parameter in with_copy.reference.parameters())
    batch = collate_samples(without_copy, 0, 1, 4)
    for trainer in (without_copy, with_copy):
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    model = without_copy.model.train()
    trainable = list_trainable(model)
    log_probs = without_copy.compute_reference_log_probs(model, batch)
    torch.testing.assert_close(log_probs, with_copy.compute_reference_log_probs(with_copy.model, batch))
    assert not torch.allclose(log_probs, model(**batch)), "the adapters have an effect"
    assert model.training and list_trainable(model) == trainable, "both are restored"


def list_trainable(model: PreferenceModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_reference_gets_new_tokens_tile_size_and_adapters_of_the_checkpoint(tiny_inputs, tmp_path, monkeypatch):
    """Adapters of the checkpoint belong to the reference."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    model = internvl_chat.InternVLChatModel.from_pretrained(tiny_inputs / "model")
    model.wrap_llm_lora(r=4, lora_alpha=8)
    model.config.use_llm_lora = 4
    model.save_pretrained(tmp_path / "model")
    for file in (tiny_inputs / "model").glob("*token*"):
        shutil.copy(file, tmp_path / "model")
    remove_image_tokens(tmp_path / "model")
    flags = [*TRAIN_ADAPTERS, "--use_backbone_lora", "0", "--model_name_or_path", f"{tmp_path}/model"]
    trainer = prepare_trainer(*build_flags(tiny_inputs, tmp_path / "out"), *flags, "--force_image_size", "112")
    policy, reference = trainer.model.eval(), trainer.reference
    assert policy.img_context_token_id == reference.img_context_token_id
    assert policy.num_image_token == reference.num_image_token == 16
    weights = reference.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in policy.state_dict().items())
    torch.testing.assert_close(policy(**collate_samples(trainer, 0)), reference(**collate_samples(trainer, 0)))


def test_micro_batches_do_not_synchronize(tiny_inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    flags = "--max_steps 2 --gradient_accumulation_steps 2 --per_device_train_batch_size 2".split()
    no_dropout = "--backbone_lora_dropout 0 --llm_lora_dropout 0".split()
    argv = [*build_flags(tiny_inputs, tmp_path / "out"), *TRAIN_ADAPTERS, *flags, *no_dropout]
    assert_one_synchronization_a_step(prepare_trainer(*argv))


# -- evaluation --------------------------------------------------------------------------------------------------------


def make_evaluation(trainer: MultimodalDPOTrainer) -> EvaluationData:
    """Make two evaluation sets of the training pairs; the first pair of the second set is left out."""
    first = trainer.train_dataset.datasets[0]
    lengths = np.tile(trainer.schedule.lengths, 2)
    lengths[len(first)] = 0
    sets = [EvaluationSet(name=name) for name in ("first", "second")]
    return EvaluationData(dataset=PackedDataset([first, first], lengths), sets=sets, lengths=lengths)


def compute_log_probs(model: PreferenceModel, pair: dict) -> tuple[list[float], list[int]]:
    """Compute log-probability and number of labels of both answers of a pair, from the full logits."""
    log_probs, counts = [], []
    for side in ("chosen", "rejected"):
        ids, labels = pair[f"{side}_input_ids"], pair[f"{side}_labels"][1:]
        tiles = normalize_tiles(pair["pixel_values"], *NORMALIZATION_STATS["imagenet"])
        with torch.no_grad():
            embeds = model.embed_inputs(ids[None], tiles, pair["image_flags"])
            logits = model.language_model(inputs_embeds=embeds).logits[0, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        log_probs.append(-loss.item())
        counts.append(int((labels != -100).sum()))
    return log_probs, counts


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


MEAN_REWARD = 0.3  # of the training so far


def compute_pair_metrics(policy: list[float], reference: list[float], num_chosen: int) -> dict[str, float]:
    """Compute the recipe's loss and metrics of a pair by their formulas."""
    chosen, rejected = (0.1 * (p - r) for p, r in zip(policy, reference, strict=True))
    nll = -policy[0] / num_chosen
    bco = -log_sigmoid(chosen - MEAN_REWARD) - log_sigmoid(MEAN_REWARD - rejected)
    return {
        "loss": -0.8 * log_sigmoid(chosen - rejected) + 0.2 * bco + nll,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": float(chosen > rejected),
        "logps/chosen": policy[0],
        "logps/rejected": policy[1],
        "nll_loss": nll,
    }


@pytest.fixture(params=["adapters disabled", "copy"])
def measured_trainer(request, tiny_inputs, tmp_path, monkeypatch) -> MultimodalDPOTrainer:
    """Prepare a trainer whose model has moved away from the reference, and which has seen some rewards."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tiny_inputs / "cache"))
    flags = ["--freeze_mlp", "False"] if request.param == "copy" else []
    trainer = prepare_trainer(*build_flags(tiny_inputs, tmp_path), *TRAIN_ADAPTERS, "--llm_lora_dropout", "0.5", *flags)
    assert (trainer.reference is None) == (request.param == "adapters disabled")
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    trainer.loss.rewards_seen = torch.tensor([10 * MEAN_REWARD, 10], dtype=torch.float64)
    trainer.model.train()
    trainer.model.vision_model.eval()
    return trainer


def test_evaluation_of_pairs_equals_its_formulas(measured_trainer):
    trainer, data = measured_trainer, make_evaluation(measured_trainer)
    model = trainer.model
    modes, trainable = [module.training for module in model.modules()], list_trainable(model)
    random_state = torch.get_rng_state()
    results = [trainer.measure_pairs(data, make_settings(batch_size=size)) for size in (1, 3)]
    assert trainer.loss.rewards_seen.tolist() == [10 * MEAN_REWARD, 10] and not trainer.pair_metrics
    assert [module.training for module in model.modules()] == modes and list_trainable(model) == trainable
    assert torch.equal(torch.get_rng_state(), random_state)

    num_pairs = len(data.lengths) // 2
    for pairs in results:
        assert pairs["tokens"][num_pairs] == 0 and np.count_nonzero(pairs["tokens"]) == 2 * num_pairs - 1
    with evaluation_mode(model):
        for index in range(num_pairs):
            pair = data.dataset[(0, index)]
            policy, counts = compute_log_probs(model, pair)
            with disabled_adapters(model):
                reference, _ = compute_log_probs(model, pair)
            expected = compute_pair_metrics(policy, reference, counts[0])
            for pairs in results:
                assert pairs["tokens"][index] == sum(counts)
                values = {name: pairs[name][index] for name in expected}
                assert values == pytest.approx(expected, rel=1e-4, abs=1e-4), index
                others = pairs[num_pairs + index] if index else pairs[0]
                np.testing.assert_allclose(others.tolist(), pairs[index].tolist(), rtol=1e-4, atol=1e-4)


def test_evaluation_of_pairs_writes_means_by_set(measured_trainer, tmp_path):
    trainer, data = measured_trainer, make_evaluation(measured_trainer)
    pairs = trainer.measure_pairs(data, make_settings())
    metrics = trainer.measure(data, make_settings(), tmp_path / "evaluation")
    first, second = np.split(pairs, 2)
    for name in pairs.dtype.names[1:]:
        assert metrics[f"first/{name}"] == pytest.approx(np.mean(first[name]))
        assert metrics[f"second/{name}"] == pytest.approx(np.mean(second[name][1:]))
        assert metrics[name] == pytest.approx(np.append(first[name], second[name][1:]).mean())
    assert len(metrics) == 3 * len(pairs.dtype.names[1:]) and {"loss", "rewards/accuracies"} <= metrics.keys()
    content, lines = read_metrics(tmp_path / "evaluation"), read_predictions(tmp_path / "evaluation")
    assert content["metrics"] == {f"eval/{name}": value for name, value in metrics.items()}
    assert [entry["samples"] for entry in content["sets"].values()] == [len(first), len(first) - 1]
    assert len(lines) == 2 * len(first) - 1 and lines[0]["chosen"] != lines[0]["rejected"]
    assert lines[0]["rewards/margins"] == pytest.approx(first["rewards/margins"][0])


def test_evaluation_does_not_drop_metrics_of_training_pairs(measured_trainer):
    trainer = measured_trainer
    is_usable = torch.tensor([True, False, True])  # the second is an empty row
    trainer.pair_metrics = [{"rewards/margins": torch.tensor([1.0, 7.0, 2.0]), "is_usable": is_usable}]
    trainer.log({"eval_loss": 1.0})
    logs = {"loss": 1.0}
    trainer.reports.add_step_metrics = lambda logs: None
    trainer.log(logs)
    assert logs["rewards/margins"] == 1.5 and not trainer.pair_metrics


@pytest.fixture(scope="module")
def one_rank(tiny_inputs, tmp_path_factory) -> Path:
    """Train in one rank without DeepSpeed; return the output folder."""
    output = tmp_path_factory.mktemp("runs") / "one_rank"
    run_training(tiny_inputs, output, *TRAIN_LLM_AND_PROJECTOR, "--per_device_train_batch_size", "2")
    return output


@pytest.mark.multiprocess
def test_saved_model_is_loaded_as_a_chat_model(one_rank):
    assert json.loads((one_rank / "config.json").read_text())["architectures"] == ["InternVLChatModel"]
    internvl_chat.InternVLChatModel.from_pretrained(one_rank)
    assert (one_rank / "modeling_internvl_chat.py").read_text() == "# upstream's published code\n"


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_and_zero_stage_change_no_metric(tiny_inputs, one_rank, stage, tmp_path):
    zero = ["--deepspeed", f"zero_stage{stage}_config.json"]
    run_training(tiny_inputs, tmp_path, *TRAIN_LLM_AND_PROJECTOR, "--per_device_train_batch_size", "1", *zero, ranks=2)
    expected, entries = read_step_logs(one_rank), read_step_logs(tmp_path)
    names = [name for name in expected[0] if "/" in name] + ["loss", "nll_loss", "grad_norm"]
    assert len(names) == 9
    for name in names:
        values, expected_values = ([entry[name] for entry in log] for log in (entries, expected))
        torch.testing.assert_close(
            values, expected_values, atol=1e-4, rtol=3e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def read_evaluations(output: Path) -> list[dict]:
    entries = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in entries if "eval_loss" in entry]


@pytest.mark.multiprocess
def test_evaluation_in_a_run_changes_nothing_and_is_the_same_under_zero3(tiny_inputs, one_rank, tmp_path):
    """Also for BCO, whose mean reward an evaluation would change."""
    flags = f"--eval_meta_path {tiny_inputs}/meta.json --eval_strategy steps --eval_steps 1 --eval_on_start".split()
    flags += [*TRAIN_LLM_AND_PROJECTOR, "--per_device_eval_batch_size", "3", "--no_smoke_save", "--save_strategy", "no"]
    run_training(tiny_inputs, tmp_path / "one", *flags, "--per_device_train_batch_size", "2")
    assert [entry["loss"] for entry in read_step_logs(tmp_path / "one")] == [
        entry["loss"] for entry in read_step_logs(one_rank)
    ]
    zero3 = ["--per_device_train_batch_size", "1", "--deepspeed", "zero_stage3_config.json"]
    run_training(tiny_inputs, tmp_path / "two", *flags, *zero3, ranks=2)
    expected, entries = read_evaluations(tmp_path / "one"), read_evaluations(tmp_path / "two")
    assert len(expected) == len(entries) == 5
    names = ["eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_tiny/nll_loss", "eval_tiny/loss"]
    for name in names:
        values, expected_values = ([entry[name] for entry in log] for log in (entries, expected))
        torch.testing.assert_close(
            values, expected_values, atol=1e-4, rtol=3e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert expected[0]["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert expected[-1]["eval_rewards/margins"] > expected[0]["eval_rewards/margins"] + 1e-3


@pytest.mark.multiprocess
def test_best_preference_model_is_loaded_at_the_end(tiny_inputs, tmp_path):
    """These pairs are trained, so their margins grow: with the smallest ones, the first evaluation is the best."""
    output = tmp_path / "out"
    flags = (
        f"--eval_meta_path {tiny_inputs}/meta.json --eval_strategy steps --eval_steps 1 --save_steps 1 --max_steps 4"
    )
    flags += (
        " --load_best_model_at_end True --metric_for_best_model eval/tiny/rewards/margins --greater_is_better False"
    )
    flags += " --early_stopping_patience 2 --save_total_limit 1"
    run_training(tiny_inputs, output, *flags.split(), *TRAIN_ADAPTERS)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    saved, best = (
        load_file(path / "language_model/adapter_model.safetensors") for path in (output, output / "checkpoint-1")
    )
    assert all(torch.equal(tensor, best[name]) for name, tensor in saved.items())


@pytest.mark.multiprocess
def test_resume_equals_unbroken_run(tiny_inputs, one_rank, tmp_path):
    """Also for BCO, whose mean reward depends on all earlier steps."""
    shutil.copytree(one_rank / "checkpoint-2", tmp_path / "checkpoint-2")
    run_training(tiny_inputs, tmp_path, *TRAIN_LLM_AND_PROJECTOR, "--per_device_train_batch_size", "2")
    assert [entry["loss"] for entry in read_step_logs(tmp_path)] == [
        entry["loss"] for entry in read_step_logs(one_rank)
    ]
    weights, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path, one_rank))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in expected.items())


def test_program_has_upstreams_names():
    assert internvl_chat_mpo.DataTrainingArguments is PreferenceDataArguments
    assert internvl_chat_mpo.DPOConfig is DPOConfig
    assert internvl_chat_mpo.LazySupervisedDataset is PreferenceDataset
    assert callable(internvl_chat_mpo.main)


@pytest.mark.multiprocess
def test_finished_preference_run_is_left_as_it_is(tiny_inputs, tmp_path):
    run_training(tiny_inputs, tmp_path / "out", *TRAIN_ADAPTERS)
    names = ["language_model/adapter_model.safetensors", "trainer_state.json", METRICS_FILE, "train_results.json"]
    before = [(tmp_path / "out" / name).read_bytes() for name in names]
    run_training(tiny_inputs, tmp_path / "out", *TRAIN_ADAPTERS)
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == before


@pytest.mark.multiprocess
def test_reference_model_of_another_base_is_refused_on_resume(tiny_inputs, tmp_path):
    """The checkpoint holds all weights, but not those of the reference model."""
    run_training(tiny_inputs, tmp_path / "out", *TRAIN_LLM_AND_PROJECTOR)
    shutil.copytree(tiny_inputs / "model", tmp_path / "other")
    (file,) = (tmp_path / "other").glob("*.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    command = [*FEW_STEPS, *TRAIN_LLM_AND_PROJECTOR, "--model_name_or_path", str(tmp_path / "other")]
    refused = training_runs.run_training(
        tiny_inputs, tmp_path / "out", *command, "--max_steps", "9", entry=MPO_PROGRAM, status=1
    )
    assert "was trained on another base model" in refused.stderr
