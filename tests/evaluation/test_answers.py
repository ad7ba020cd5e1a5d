"""Questions of records are those of training; batched answers are those of `chat`, on any number of ranks."""

import os
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.tiny_models import build_tiny_model
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

from internvl.constants import IGNORE_INDEX, UnusableSample
from internvl.conversation import conv_templates
from internvl.data.images import NORMALIZATION_STATS, normalize_tiles
from internvl.evaluation.answers import (
    MeasuredQuestion,
    answer_questions,
    extract_final_answer,
    generate_answers,
    plan_batches,
    select_samples,
)
from internvl.evaluation.evaluation_data import EvaluationData, EvaluationSet
from internvl.evaluation.model_mode import disabled_adapters, evaluation_mode
from internvl.evaluation.questions import Question, build_prediction_record, build_question
from internvl.evaluation.settings import EvaluationSettings
from internvl.model.activation_checkpointing import apply_gradient_checkpointing
from internvl.planning.epoch_plan import SAMPLE_LENGTHS
from internvl.planning.packed_dataset import PackedDataset

MEAN, STD = NORMALIZATION_STATS["imagenet"]
SETTINGS = EvaluationSettings(4096, 16, 3, 6, None, MEAN, STD)
TILING = {"force_image_size": 56, "max_dynamic_patch": 4, "min_num_frame": 4, "max_num_frame": 4}


def turns(*values: str, system: str | None = None) -> list[dict]:
    first = [] if system is None else [{"from": "system", "value": system}]
    roles = ("human", "gpt") * len(values)
    return first + [{"from": role, "value": value} for role, value in zip(roles, values, strict=False)]


# Name -> record, and the arguments of `chat`: question, history, system message.
RECORDS = {
    "text": ({"conversations": turns("Who are you?", "Me.")}, ("Who are you?", [], None)),
    "longer text": (
        {"conversations": turns("Why is the sky blue? " * 9, "So.")},
        ("Why is the sky blue? " * 9, [], None),
    ),
    "history": (
        {"conversations": turns("One?", "Yes, one.", "Two?", "No.", "Three?", "Never.")},
        ("Three?", [("One?", "Yes, one."), ("Two?", "No.")], None),
    ),
    "system": ({"conversations": turns("Hm?", "Ah.", system="Be brief.")}, ("Hm?", [], "Be brief.")),
    "image": ({"image": "a.png", "conversations": turns("What is it?", "Noise.")}, ("<image>\nWhat is it?", [], None)),
    "image inside": (
        {"image": ["b.jpg"], "conversations": turns("Is <image> a dog?", "No.")},
        ("Is <image> a dog?", [], None),
    ),
    "images": (
        {"image": ["a.png", "b.jpg"], "conversations": turns("Compare.", "Equal.", "Sure?", "Yes.")},
        ("Sure?", [("<image>\n<image>\nCompare.", "Equal.")], None),
    ),
    "images in turns": (
        {
            "image": ["a.png", "b.jpg"],
            "conversations": turns("<image>\nA?", "A.", "<image>\nB?", "B.", system="Be kind."),
        },
        ("<image>\nB?", [("<image>\nA?", "A.")], "Be kind."),
    ),
    "video": (
        {"video": "frames", "conversations": turns("<video>\nWhat happens?", "Noise.")},
        ("".join(f"Frame-{n}: <image>\n" for n in range(1, 5)) + "What happens?", [], None),
    ),
}
# The header of an answer ends in a space in training, which `chat` (like upstream's) leaves to the answer.
WITH_SPACE_AFTER_HEADER = {"internvl_zh"}


@pytest.fixture
def dataset(make_dataset):
    return make_dataset(*(record for record, _ in RECORDS.values()), max_length=4096, **TILING).without_randomness()


@pytest.fixture
def model():
    return build_tiny_model("qwen2")


def build_data(*datasets, metrics=("exact_match",)) -> EvaluationData:
    """Evaluate all samples of datasets."""
    sets = [EvaluationSet(f"set {i}", metric) for i, metric in enumerate(metrics)]
    num_samples = sum(map(len, datasets))
    return EvaluationData(PackedDataset(datasets), sets, np.ones(num_samples, SAMPLE_LENGTHS))


def chat(model, dataset, index: int) -> str:
    """Answer a question of RECORDS by `chat`."""
    question, history, system_message = [*RECORDS.values()][index][1]
    images = dataset.load_image_tiles(index)
    tiles = normalize_tiles(torch.cat(images), MEAN, STD) if images else None
    own_message = model.system_message
    model.system_message = own_message if system_message is None else system_message
    settings = {"max_new_tokens": SETTINGS.max_new_tokens, "do_sample": False}
    answer = model.eval().chat(dataset.tokenizer, tiles, question, settings, history, False, [*map(len, images)])
    model.system_message = own_message
    return answer


# -- questions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", conv_templates)
def test_prompts_are_those_of_training(dataset, model, template, monkeypatch):
    dataset.data_args.conv_style = model.template = template
    model.system_message = conv_templates[template].system_message
    prompts = {}

    def record_prompt(pixel_values, input_ids, attention_mask, **kwargs):
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompts[len(prompts)] = ids[mask == 1].tolist()
        return input_ids[:, :0]

    monkeypatch.setattr(model, "generate", record_prompt)
    for index in range(len(dataset)):
        answer_questions(model, dataset.tokenizer, PackedDataset([dataset]), [index], SETTINGS)
        sample = dataset.get(index, 0)
        has_loss = (sample["labels"] != IGNORE_INDEX).tolist()
        starts = [i + 1 for i, (before, now) in enumerate(pairwise(has_loss)) if now and not before]
        expected = sample["input_ids"][: starts[-1]].tolist()
        if template in WITH_SPACE_AFTER_HEADER:
            expected = expected[: len(prompts[index])]
        assert prompts[index] == expected, [*RECORDS][index]
        assert len(dataset.load_image_tiles(index)) == len(build_question(dataset, index).num_tiles)
        assert torch.equal(
            torch.cat(dataset.load_image_tiles(index) or [sample["pixel_values"]]), sample["pixel_values"]
        )


@pytest.mark.parametrize(
    ("record", "template", "part"),
    [
        ({"conversations": [{"from": "pretrain", "value": "Text."}]}, "internvl2_5", "turn 1 is from pretrain"),
        (
            {"conversations": [*turns("Q?", "A."), {"from": "function", "value": "3"}]},
            "internvl3_5_gpt_oss",
            "turn 3 is from function",
        ),
        ({"conversations": [{"from": "gpt", "value": "Hi."}, *turns("Q?", "A.")]}, "internvl2_5", "turn 1 is from gpt"),
        ({"conversations": [*turns("Q?"), *turns("Q?", "A.")]}, "internvl2_5", "turn 2 is from human"),
        (
            {"conversations": [*turns("Q?"), {"from": "system", "value": "S"}, *turns("Q")]},
            "Hermes-2",
            "turn 2 is from system",
        ),
        ({"conversations": turns("Q?", "", "R?", "A.")}, "internvl2_5", "turn 2 (gpt) is empty"),
        ({"conversations": [{"from": "gpt", "value": "Hi."}]}, "internvl2_5", "no question"),
        ({"conversations": [{"from": "system", "value": "Hi."}]}, "internvl2_5", "no question"),
        ({"conversations": turns("<IMG_CONTEXT>?", "A.")}, "internvl2_5", "reserved for images"),
        (
            {"image": "a.png", "conversations": turns("<image>\n<image>", "A.")},
            "internvl2_5",
            "2 <image> in human turns",
        ),
        ({"image": "gone.png", "conversations": turns("What?", "A.")}, "internvl2_5", "gone.png"),
        (
            {"image": "a.png", "conversations": turns("<image>\nQ?", "A.", system="An <image> follows.")},
            "internvl2_5",
            "turn 1 (system) contains <image>",
        ),
    ],
)
def test_records_that_chat_cannot_ask_are_unusable(make_dataset, record, template, part):
    with pytest.raises(UnusableSample) as error:
        build_question(make_dataset(record, conv_style=template), 0)
    assert part in str(error.value)


def test_leading_and_trailing_answers_are_left_out(make_dataset):
    greeting, late = {"from": "gpt", "value": "Hi."}, {"from": "gpt", "value": "Late."}
    records = [{"conversations": [greeting, *turns("Q?", "A.")]}, {"conversations": [*turns("Q?", "A."), late]}]
    records.append({"conversations": turns("Q?")})
    dataset = make_dataset(*records, conv_style="Hermes-2")
    assert [build_question(dataset, index)[:2] for index in range(3)] == [("Q?", [])] * 3


def test_history_of_gpt_oss_has_channels_and_answers_have_none(make_dataset):
    dataset = make_dataset({"conversations": turns("A?", "a", "B?", "b")}, conv_style="internvl3_5_gpt_oss")
    assert build_question(dataset, 0).history == [("A?", "<|channel|>final<|message|>a")]
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|> Seven"
    assert extract_final_answer("internvl3_5_gpt_oss", text) == "Seven"
    assert extract_final_answer("internvl2_5", text) == text


# -- answers -----------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_chat_one_at_a_time(dataset, model):
    data = build_data(dataset)
    expected = {index: chat(model, dataset, index) for index in range(len(dataset))}
    model.train()
    model.mlp1.eval()  # frozen parts may be in another mode
    assert generate_answers(model, dataset.tokenizer, data, SETTINGS) == expected
    assert len(set(expected.values())) > 5  # the model does look at the question
    assert model.training and model.vision_model.training and not model.mlp1.training and not model.mlp1[1].training
    assert generate_answers(model, dataset.tokenizer, data, replace(SETTINGS, batch_size=1)) == expected
    workers = replace(SETTINGS, batch_size=20, num_workers=1)
    assert generate_answers(model, dataset.tokenizer, data, workers) == expected


def test_answers_in_training_use_cache_without_noise_and_recomputation(dataset, model, monkeypatch):
    expected = {index: chat(model, dataset, index) for index in range(len(dataset))}
    for part in (model.vision_model, model.language_model):
        apply_gradient_checkpointing(part)
    model.language_model.config.use_cache = False
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 50.0
    embeddings.register_forward_hook(neftune_post_forward_hook)
    dropout = nn.Dropout(0.9)
    model.mlp1.append(dropout)
    num_queries = []
    model.language_model.model.layers[0].register_forward_hook(
        lambda layer, args, kwargs, output: num_queries.append(args[0].shape[1]), with_kwargs=True
    )
    state = torch.get_rng_state()
    model.train()
    assert generate_answers(model, dataset.tokenizer, build_data(dataset), SETTINGS) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert num_queries.count(1) >= 2 * SETTINGS.max_new_tokens  # after the prompt, one token at a time
    assert dropout.training and not model.language_model.config.use_cache
    assert all(layer.gradient_checkpointing for layer in model.language_model.model.layers)


def test_evaluation_mode_restores_dynamic_rope():
    model = build_tiny_model("llama", max_position_embeddings=16, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    rotary = model.language_model.model.rotary_emb
    before, length = rotary.inv_freq.clone(), rotary.max_seq_len_cached
    with evaluation_mode(model):
        model(input_ids=torch.arange(3, 43)[None])
        assert not torch.equal(rotary.inv_freq, before)
    assert torch.equal(rotary.inv_freq, before) and rotary.max_seq_len_cached == length


def test_disabled_adapters_leave_trainable_parameters_as_they_are():
    model = build_tiny_model("qwen2", lambda model: model.wrap_llm_lora(r=4, lora_alpha=8))
    frozen = next(p for n, p in model.named_parameters() if ".lora_A." in n).requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        adapted = model.eval()(input_ids=ids).logits
        with disabled_adapters(model):
            base = model(input_ids=ids).logits
        assert not torch.equal(base, adapted) and torch.equal(model(input_ids=ids).logits, adapted)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert not frozen.requires_grad


def test_batches_are_longest_first_and_have_one_system_message():
    lengths = {0: 5, 1: 90, 2: 7, 3: 40, 4: 41, 5: 6}
    questions = {
        sample: MeasuredQuestion(Question("Q?", [], "Be brief." if sample in (3, 5) else None, []), length)
        for sample, length in lengths.items()
    }
    assert plan_batches(questions, 2) == [[1, 4], [3, 5], [2, 0]]
    assert plan_batches({}, 2) == []


def test_a_subset_depends_only_on_the_name_of_the_set(make_dataset):
    dataset = make_dataset(*({"conversations": turns(f"{i}?", "A.")} for i in range(20)))
    data = build_data(dataset, dataset, metrics=("exact_match", None))
    selected = select_samples(data, 5)
    assert len(selected) == 5 and selected == sorted(selected) and max(selected) < 20
    state = np.random.get_state()[1].copy()
    assert select_samples(data, 5) == selected and (np.random.get_state()[1] == state).all()
    shifted = build_data(dataset, dataset, metrics=(None, "exact_match"))
    shifted.sets[1] = data.sets[0]
    assert select_samples(shifted, 5) == [20 + sample for sample in selected]
    renamed = data._replace(sets=[data.sets[0]._replace(name="other"), data.sets[1]])
    assert select_samples(renamed, 5) != selected
    assert select_samples(data, None) == select_samples(data, 20) == [*range(20)]
    unused = data._replace(lengths=data.lengths.copy())
    unused.lengths["tokens"][3] = 0
    assert 3 not in select_samples(unused, None)


def test_unusable_samples_are_reported_and_the_others_answered(make_dataset, model):
    records = [
        {"image": "half_a.png", "conversations": turns("A?", "A.")},  # only decoding finds the damage
        {"conversations": turns("B?", "B.")},
        {"conversations": [{"from": "gpt", "value": "No question."}]},
    ]
    dataset, reports, stops = make_dataset(*records, **TILING), [], []
    settings = replace(SETTINGS, report_skipped_fn=reports.append, check_stop_fn=lambda: stops.append(1), batch_size=1)
    answers = generate_answers(model, dataset.tokenizer, build_data(dataset), settings)
    assert list(answers) == [1] and len(stops) == 2
    [[no_question, damaged]] = reports
    assert no_question.startswith("mine line 3 (") and no_question.endswith("has no question")
    assert damaged.startswith("mine line 1 (") and "half_a.png" in damaged


def test_an_abandoned_generation_restores_the_mode(dataset, model):
    def stop():
        raise KeyboardInterrupt

    model.train()
    with pytest.raises(KeyboardInterrupt):
        generate_answers(model, dataset.tokenizer, build_data(dataset), replace(SETTINGS, check_stop_fn=stop))
    assert all(module.training for module in model.modules())


# -- lines of predictions ----------------------------------------------------------------------------------------------


def test_prediction_records_have_question_images_and_references(make_dataset, tmp_path):
    box = {"image": "a.png", "conversations": turns("Where?", "[[1, 2, 3, 4]]")}
    choice = {"conversations": turns("A?", "A.", "B?", "B."), "answers": ["B", "b"], "choices": {"A": "x", "B": "y"}}
    records = [box, box | {"width": 100, "height": 50, "answers": [[1, 2, 3, 4]]}, choice]
    records.append({"video": "frames", "conversations": turns("Then?"), "answer_type": "float", "precision": 1.0})
    dataset = make_dataset(*records)
    image = str(tmp_path / "a.png")
    assert [build_prediction_record(dataset, index, "box_iou") for index in range(4)] == [
        {"images": [image], "question": "Where?", "references": ["[[1, 2, 3, 4]]"], "width": 60, "height": 40},
        {"images": [image], "question": "Where?", "references": [[1, 2, 3, 4]], "width": 100, "height": 50},
        {
            "images": [],
            "question": "B?",
            "history": [["A?", "A."]],
            "references": ["B", "b"],
            "choices": {"A": "x", "B": "y"},
        },
        {
            "video": str(tmp_path / "frames"),
            "question": "Then?",
            "references": [],
            "answer_type": "float",
            "precision": 1.0,
        },
    ]


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
def test_answers_are_equal_under_zero_on_two_ranks_and_training_goes_on_as_without(dataset, model, tmp_path):
    expected = {index: chat(model, dataset, index) for index in range(len(dataset))}
    mp.spawn(_answer_on_rank, args=(f"file://{tmp_path}/store", dataset, expected), nprocs=2)


def _answer_on_rank(rank: int, store: str, dataset, expected: dict[int, str]):
    os.environ["LOCAL_RANK"] = str(rank)
    import deepspeed

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    data = build_data(dataset)
    # 9 questions, 2 of which have a system message of their own, make 5 batches: the second rank has one less.
    settings = replace(SETTINGS, batch_size=3)
    assert generate_answers(build_tiny_model("qwen2"), dataset.tokenizer, data, settings) == expected
    outcomes = []
    for stage in (1, 2, 3):
        losses, answers = _train(stage, rank, data, settings)
        assert losses == _train(stage, rank, data, None)[0], stage
        outcomes.append(answers)
    assert outcomes[0] == outcomes[1] == outcomes[2] and outcomes[0][0] != outcomes[0][1]
    dist.barrier()
    dist.destroy_process_group()


def _train(
    stage: int, rank: int, data: EvaluationData, settings: EvaluationSettings | None
) -> tuple[list[float], list[dict[int, str]]]:
    """Train 4 steps; with settings, answer the questions before the first and the third.

    Returns:
        The loss of each step, and the answers.
    """
    import deepspeed

    model = build_tiny_model("qwen2", lambda model: model.wrap_llm_lora(r=4, lora_alpha=8, lora_dropout=0.1))
    [dataset] = data.dataset.datasets
    expected = {index: chat(model, dataset, index) for index in range(len(dataset))}
    model.train()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        # Some parameters stay on each rank.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    torch.manual_seed(rank)
    ids, losses, answers = torch.arange(3 + rank, 33 + rank)[None], [], []
    for step in range(4):
        if settings and step in (0, 2):
            answers.append(generate_answers(model, dataset.tokenizer, data, settings))
            assert step or answers == [expected], stage
        loss = engine(input_ids=ids, labels=ids, position_ids=torch.arange(30)[None]).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return losses, answers
