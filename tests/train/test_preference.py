"""Preference optimization: pairs of answers, their log-probabilities, and losses."""

import math
from functools import partial

import pytest
import torch
from helpers.samples import are_samples_equal

from internvl.arguments.preference import PREFERENCE_ARGUMENTS
from internvl.arguments.training import parse_args
from internvl.constants import UnusableSample
from internvl.data.preference_dataset import PreferenceDataset, collate_pairs
from internvl.model import internvl_chat
from internvl.planning.packed_dataset import PackedDataset
from internvl.planning.sample_lengths import measure_dataset
from internvl.train.preference_loss import LOSSES, PreferenceLoss, PreferenceModel, label_log_probs

RECIPE = "--loss_type sigmoid,bco_pair --sigmoid_loss_weight 0.8 --bco_pair_loss_weight 0.2 --rpo_alpha 1".split()

# -- data --------------------------------------------------------------------------------------------------------------

TEXT_RECORD = {"question": "What is it?", "chosen": "A house by the river.", "rejected": "A cat, I think, or two."}
RECORDS = {
    "image": TEXT_RECORD | {"image": "a.png"},
    "images": TEXT_RECORD | {"image": ["a.png", "b.jpg"], "question": "<image> or <image>?"},
    "images without placeholder": TEXT_RECORD | {"image": ["a.png", "b.jpg"]},
    "video": TEXT_RECORD | {"video": "frames", "question": "<video>\nWhat is it?"},
    "text": TEXT_RECORD,
    "system prompt": TEXT_RECORD | {"image": "a.png", "system_prompt": "Be brief."},
}


@pytest.fixture
def make_pairs(make_dataset):
    """Return a function that builds a data set of pairs from records."""
    return partial(make_dataset, kind=PreferenceDataset)


def build_turns(record: dict, side: str) -> list[dict]:
    """Return the conversation with one of a pair's answers."""
    keys = {"system": "system_prompt", "human": "question", "gpt": side}
    return [{"from": role, "value": record[key]} for role, key in keys.items() if key in record]


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_pair_equals_two_samples_with_the_same_tiles(make_dataset, make_pairs, record):
    pair = make_pairs(record).get(0, epoch=1)
    for side in ("chosen", "rejected"):
        media = {key: record[key] for key in ("image", "video") if key in record}
        sample = make_dataset(media | {"conversations": build_turns(record, side)}).get(0, epoch=1)
        for key in ("input_ids", "labels", "position_ids"):
            assert torch.equal(pair[f"{side}_{key}"], sample[key])
        for key in ("pixel_values", "image_flags"):
            assert torch.equal(pair[key], sample[key])


def test_pair_is_deterministic_and_has_its_measured_lengths(make_pairs, tmp_path):
    dataset = make_pairs(*RECORDS.values(), meta={"data_augment": True})
    lengths = measure_dataset(dataset, cache_dir=str(tmp_path / "cache"), show_progress=False).lengths
    for index in range(len(dataset)):
        pair = dataset.get(index, epoch=2)
        labels = torch.cat([pair["chosen_labels"], pair["rejected_labels"]])
        assert lengths["tokens"][index] == len(labels)
        assert lengths["loss_tokens"][index] == (labels != -100).sum()
        assert lengths["tiles"][index] == len(pair["pixel_values"])
        assert are_samples_equal(pair, dataset.get(index, epoch=2))


def test_lengths_of_pairs_and_samples_are_cached_separately(make_dataset, make_pairs, tmp_path):
    """A file may be read as either."""
    both = TEXT_RECORD | {"conversations": build_turns(TEXT_RECORD, "chosen")}
    options = {"cache_dir": str(tmp_path / "cache"), "show_progress": False}
    sample, pair = (measure_dataset(dataset, **options) for dataset in (make_dataset(both), make_pairs(both)))
    assert sample.lengths["tokens"] < pair.lengths["tokens"]


UNUSABLE = {
    "no question": ({**TEXT_RECORD, "question": None}, "question must be a string, got None"),
    "no rejected answer": ({"question": "Hm?", "chosen": "Yes."}, "rejected must be a string, got None"),
    "system prompt is not text": ({**TEXT_RECORD, "system_prompt": 5}, "system_prompt must be a string, got 5"),
    "missing image": ({**TEXT_RECORD, "image": "absent.png"}, "absent.png does not exist"),
    "too few placeholders": (
        {**TEXT_RECORD, "image": ["a.png", "b.jpg"], "question": "<image>"},
        "chosen: .* for 2 images",
    ),
    "truncated before the answer": ({**TEXT_RECORD, "question": "word " * 500}, "chosen: no loss tokens: .* first"),
}


@pytest.mark.parametrize(("record", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_pair_has_a_reason(make_pairs, record, reason):
    dataset = make_pairs(record)
    with pytest.raises(UnusableSample, match=reason):
        dataset.get(0, 0)
    with pytest.raises(UnusableSample, match=reason):
        dataset.measure(0)


def test_batch_has_chosen_then_rejected_answers_and_tiles_once(make_pairs):
    rows = PackedDataset([make_pairs(RECORDS["image"], RECORDS["text"], {"question": 1})])
    items = [rows[(0, index)] for index in range(3)]
    batch = collate_pairs(items, pad_id=7)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape
    # Rows 0 to 2 are the chosen answers, 3 to 5 the rejected ones. The last pair is unusable: its rows have no labels.
    rows_and_answers = [(0, "chosen", 0), (1, "chosen", 1), (3, "rejected", 0), (4, "rejected", 1)]
    for row, side, index in rows_and_answers:
        length = len(items[index][f"{side}_labels"])
        for key, padding in (("input_ids", 7), ("labels", -100)):
            assert torch.equal(batch[key][row, :length], items[index][f"{side}_{key}"])
            assert (batch[key][row, length:] == padding).all()
    assert (batch["labels"][[2, 5]] == -100).all()
    assert set((batch["loss_indices"] // batch["labels"].shape[1]).tolist()) == {0, 1, 3, 4}
    assert len(batch["pixel_values"]) == sum(len(item["pixel_values"]) for item in items)
    assert len(batch["bad_samples"]) == 1
    answers = [item[f"{side}_input_ids"] for item in items[:2] for side in ("chosen", "rejected")]
    assert batch["documents"] == [len(input_ids) for input_ids in answers]


# -- log-probabilities and losses --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(goldens) -> PreferenceModel:
    return PreferenceModel.from_pretrained(goldens / "e2e/qwen2").eval()


def test_log_probs_of_a_batch_equal_those_of_single_answers(make_pairs, goldens, model):
    """The reference is the chat model with full logits and a softmax."""
    chat_model = internvl_chat.InternVLChatModel.from_pretrained(goldens / "e2e/qwen2").eval()
    dataset = make_pairs(RECORDS["image"], RECORDS["images"], RECORDS["text"], force_image_size=56)
    model.img_context_token_id = chat_model.img_context_token_id = dataset.img_context_id
    rows = PackedDataset([dataset])
    items = [rows[(0, index)] for index in range(3)]
    batch = collate_pairs(items, image_token_id=dataset.img_context_id)
    del batch["bad_samples"], batch["documents"]
    model.train()  # the model has no dropout
    log_probs = model(**batch)
    expected = []
    for side in ("chosen", "rejected"):
        for item in items:
            ids, tiles, flags = item[f"{side}_input_ids"], item["pixel_values"], item["image_flags"]
            logits = chat_model(tiles, ids[None], image_flags=flags).logits
            labels = item[f"{side}_labels"][1:]
            token_log_probs = logits[0, :-1].log_softmax(-1)[torch.arange(len(labels)), labels.clamp(min=0)]
            expected.append(token_log_probs[labels != -100].sum())
    torch.testing.assert_close(log_probs, torch.stack(expected), rtol=1e-5, atol=1e-4)
    log_probs.sum().backward()
    assert all(p.grad is not None for p in model.mlp1.parameters())


def test_rows_without_labels_have_log_prob_zero_and_a_gradient():
    head, states = torch.nn.Linear(4, 9), torch.randn(2, 5, 4, requires_grad=True)
    labels = torch.tensor([[-100, -100, 3, 5, -100], [-100] * 5])
    expected = head(states).log_softmax(-1)  # (2, 5, 9); position i predicts label i + 1
    expected = torch.stack([expected[0, 1, 3] + expected[0, 2, 5], torch.tensor(0.0)])
    torch.testing.assert_close(label_log_probs(states, head, labels, torch.tensor([1, 2])), expected)
    label_log_probs(states, head, torch.full((2, 5), -100), torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert not states.grad.any()


def build_loss(*flags: str) -> PreferenceLoss:
    _, data_args, args = parse_args(["--output_dir", "unused", *flags], PREFERENCE_ARGUMENTS)
    return PreferenceLoss(data_args, args)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


# One pair by hand. Log-ratios of policy and reference; the answers have 4 and 5 tokens.
CHOSEN, REJECTED, BETA, SMOOTHING = 1.7, -0.6, 0.3, 0.1
MARGIN, MEAN_REWARD = BETA * (CHOSEN - REJECTED), BETA * (CHOSEN + REJECTED) / 2
EXPECTED_LOSSES = {
    "sigmoid": -(1 - SMOOTHING) * log_sigmoid(MARGIN) - SMOOTHING * log_sigmoid(-MARGIN),
    "hinge": max(0.0, 1 - MARGIN),
    "ipo": (CHOSEN / 4 - REJECTED / 5 - 1 / (2 * BETA)) ** 2,
    "bco_pair": -log_sigmoid(BETA * CHOSEN - MEAN_REWARD) - log_sigmoid(-(BETA * REJECTED - MEAN_REWARD)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_equals_its_formula(name):
    smoothing = ["--label_smoothing", str(SMOOTHING)] if name == "sigmoid" else []
    loss = build_loss("--loss_type", name, "--beta", str(BETA), *smoothing)
    policy, reference = torch.tensor([-3.0 + CHOSEN, -8.0 + REJECTED]), torch.tensor([-3.0, -8.0])
    assert loss(policy, reference, torch.tensor([4, 5]))[0].item() == pytest.approx(EXPECTED_LOSSES[name], rel=1e-5)


def test_weighted_sum_of_losses_and_metrics_over_two_micro_batches():
    """BCO subtracts the mean of all rewards so far."""
    loss = build_loss(*RECIPE, "--beta", "0.5")
    torch.manual_seed(0)
    tokens, rewards = torch.tensor([3, 4, 5, 6]), []
    for _ in range(2):
        policy, reference = -10 * torch.rand(4), -10 * torch.rand(4)
        value, is_usable, metrics = loss(policy, reference, tokens)
        assert is_usable.all()
        reward = 0.5 * (policy - reference)
        rewards.append(reward)
        shift = torch.cat(rewards).mean().item()
        expected = 0.0
        pairs = zip(reward[:2].tolist(), reward[2:].tolist(), policy[:2].tolist(), (3, 4), strict=True)
        for chosen, rejected, log_prob, num_tokens in pairs:
            sigmoid = -log_sigmoid(chosen - rejected)
            bco = -log_sigmoid(chosen - shift) - log_sigmoid(shift - rejected)
            expected += (0.8 * sigmoid + 0.2 * bco - log_prob / num_tokens) / 2  # mean of two pairs
        assert value.item() == pytest.approx(expected, rel=1e-5)
    expected_metrics = {
        "rewards/chosen": reward[:2],
        "rewards/rejected": reward[2:],
        "rewards/margins": reward[:2] - reward[2:],
        "rewards/accuracies": (reward[:2] > reward[2:]).float(),
        "logps/chosen": policy[:2],
        "logps/rejected": policy[2:],
        "nll_loss": -policy[:2] / tokens[:2],
    }
    assert expected_metrics.keys() == metrics.keys()
    for name, values in expected_metrics.items():
        torch.testing.assert_close(metrics[name], values)


def test_empty_pair_does_not_count():
    policy, reference = torch.tensor([-1.0, 0.0, -2.0, 0.0]), torch.tensor([-2.0, 0.0, -1.0, 0.0])
    with_empty, without_empty, only_empty = (build_loss(*RECIPE) for _ in range(3))
    value, is_usable, _ = with_empty(policy, reference, torch.tensor([3, 0, 3, 0]))
    assert value == without_empty(policy[::2], reference[::2], torch.tensor([3, 3]))[0]
    assert is_usable.tolist() == [True, False]
    assert torch.equal(with_empty.rewards_seen, without_empty.rewards_seen)
    assert only_empty(policy[1::2], reference[1::2], torch.tensor([0, 0]))[0] == 0
