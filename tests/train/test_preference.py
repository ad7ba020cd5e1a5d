"""Preference optimisation below its trainer: records to pairs, pairs to scores, scores to losses."""

import math
from functools import partial

import pytest
import torch
from helpers.samples import samples_equal

from internvl.arguments.preference import PREFERENCE_ARGUMENTS
from internvl.arguments.training import parse_args
from internvl.constants import UnusableSample
from internvl.data.preference_dataset import PreferenceDataset, pair_collator
from internvl.model import internvl_chat
from internvl.planning.packed_dataset import PackedDataset
from internvl.planning.sample_lengths import measure_dataset
from internvl.train.preference_loss import LOSSES, InternVLChatModel, PreferenceLoss, label_log_probs

RECIPE = "--loss_type sigmoid,bco_pair --sigmoid_loss_weight 0.8 --bco_pair_loss_weight 0.2 --rpo_alpha 1".split()

# -- data --------------------------------------------------------------------------------------------------------------

TEXTS = {"question": "What is it?", "chosen": "A house by the river.", "rejected": "A cat, I think, or two."}
KINDS = {
    "image": TEXTS | {"image": "a.png"},
    "images": TEXTS | {"image": ["a.png", "b.jpg"], "question": "<image> or <image>?"},
    "images without placeholder": TEXTS | {"image": ["a.png", "b.jpg"]},
    "video": TEXTS | {"video": "film", "question": "<video>\nWhat is it?"},
    "text": TEXTS,
    "system prompt": TEXTS | {"image": "a.png", "system_prompt": "Be brief."},
}


@pytest.fixture
def pairs(make):
    return partial(make, kind=PreferenceDataset)


def turns_of(record: dict, side: str) -> list[dict]:
    keys = {"system": "system_prompt", "human": "question", "gpt": side}
    return [{"from": role, "value": record[key]} for role, key in keys.items() if key in record]


@pytest.mark.parametrize("record", KINDS.values(), ids=KINDS)
def test_a_pair_is_two_samples_over_the_same_tiles(make, pairs, record):
    pair = pairs(record).get(0, epoch=1)
    for side in ("chosen", "rejected"):
        sample = make(record | {"conversations": turns_of(record, side)}).get(0, epoch=1)
        for key in ("input_ids", "labels", "position_ids"):
            assert torch.equal(pair[f"{side}_{key}"], sample[key])
        for key in ("pixel_values", "image_flags"):
            assert torch.equal(pair[key], sample[key])


def test_a_pair_is_measured_as_it_is_made_and_made_again_the_same(pairs, tmp_path):
    dataset = pairs(*KINDS.values(), meta={"data_augment": True})
    lengths = measure_dataset(dataset, cache_dir=str(tmp_path / "cache"), progress=False).lengths
    for index in range(len(dataset)):
        pair = dataset.get(index, epoch=2)
        labels = torch.cat([pair["chosen_labels"], pair["rejected_labels"]])
        assert lengths.tokens[index] == len(labels)
        assert lengths.trained[index] == (labels != -100).sum()
        assert lengths.tiles[index] == len(pair["pixel_values"])
        assert samples_equal(pair, dataset.get(index, epoch=2))


def test_lengths_of_pairs_and_of_samples_are_not_mixed_up(make, pairs, tmp_path):
    """One file may hold both, and lengths are kept on disk."""
    both = TEXTS | {"conversations": turns_of(TEXTS, "chosen")}
    cache = {"cache_dir": str(tmp_path / "cache"), "progress": False}
    assert measure_dataset(make(both), **cache).lengths.tokens < measure_dataset(pairs(both), **cache).lengths.tokens


BAD = {
    "no question": ({**TEXTS, "question": None}, "question must be a text, not None"),
    "no rejected answer": ({"question": "Hm?", "chosen": "Yes."}, "rejected must be a text, not None"),
    "system prompt is no text": ({**TEXTS, "system_prompt": 5}, "system_prompt must be a text, not 5"),
    "missing image": ({**TEXTS, "image": "absent.png"}, "absent.png does not exist"),
    "too few placeholders": ({**TEXTS, "image": ["a.png", "b.jpg"], "question": "<image>"}, "chosen: .* for 2 images"),
    "cut before the answer": ({**TEXTS, "question": "word " * 500}, "chosen: it has no answer to train on in"),
}


@pytest.mark.parametrize(("record", "reason"), BAD.values(), ids=BAD)
def test_a_bad_pair_is_reported(pairs, record, reason):
    for use in (lambda dataset: dataset.get(0, 0), lambda dataset: dataset.measure(0)):
        with pytest.raises(UnusableSample, match=reason):
            use(pairs(record))


def test_a_batch_has_all_chosen_then_all_rejected_answers_and_tiles_once(pairs):
    rows = PackedDataset([pairs(KINDS["image"], KINDS["text"], {"question": 1})])
    items = [rows[(0, index)] for index in range(3)]
    batch = pair_collator(items, pad_id=7)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape
    for row, (side, item) in enumerate([(side, item) for side in ("chosen", "rejected") for item in items[:2]]):
        row += row // 2
        length = len(item[f"{side}_labels"])
        for key, fill in (("input_ids", 7), ("labels", -100)):
            assert torch.equal(batch[key][row, :length], item[f"{side}_{key}"])
            assert (batch[key][row, length:] == fill).all()
    assert (batch["labels"][[2, 5]] == -100).all(), "an empty pair"
    assert len(batch["pixel_values"]) == sum(len(item["pixel_values"]) for item in items)
    assert len(batch["bad_samples"]) == 1
    sides = [(item, side) for item in items[:2] for side in ("chosen", "rejected")]
    assert batch["documents"] == [len(item[f"{side}_input_ids"]) for item, side in sides]


# -- scores and losses -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(goldens) -> InternVLChatModel:
    return InternVLChatModel.from_pretrained(goldens / "e2e/qwen2").eval()


def test_scores_of_a_pair_are_those_of_its_answers_alone(pairs, goldens, model):
    """By the ordinary model, full logits and a softmax; each answer with the tiles for itself."""
    plain = internvl_chat.InternVLChatModel.from_pretrained(goldens / "e2e/qwen2").eval()
    dataset = pairs(KINDS["image"], KINDS["images"], KINDS["text"], force_image_size=56)
    model.img_context_token_id = plain.img_context_token_id = dataset.img_context_id
    rows = PackedDataset([dataset])
    items = [rows[(0, index)] for index in range(3)]
    batch = pair_collator(items)
    del batch["bad_samples"], batch["documents"]
    model.train()  # frozen dropout or not, the numbers of this model do not depend on it
    scores = model(**batch)
    expected = []
    for side in ("chosen", "rejected"):
        for item in items:
            ids, tiles, flags = item[f"{side}_input_ids"], item["pixel_values"], item["image_flags"]
            logits = plain(tiles, ids[None], image_flags=flags).logits
            labels = item[f"{side}_labels"][1:]
            log_probs = logits[0, :-1].log_softmax(-1)[torch.arange(len(labels)), labels.clamp(min=0)]
            expected.append(log_probs[labels != -100].sum())
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-5, atol=1e-4)
    scores.sum().backward()
    assert all(p.grad is not None for p in model.mlp1.parameters())


def test_rows_without_labels_score_zero_and_keep_a_graph():
    head, states = torch.nn.Linear(4, 9), torch.randn(2, 5, 4, requires_grad=True)
    labels = torch.tensor([[-100, -100, 3, 5, -100], [-100] * 5])
    scores = label_log_probs(states, head, labels)
    logits = head(states).log_softmax(-1)
    torch.testing.assert_close(scores, torch.stack([logits[0, 1, 3] + logits[0, 2, 5], torch.tensor(0.0)]))
    label_log_probs(states, head, torch.full((2, 5), -100)).sum().backward()
    assert not states.grad.any()


def loss_of(*flags: str) -> PreferenceLoss:
    _, data_args, args = parse_args(["--output_dir", "unused", *flags], PREFERENCE_ARGUMENTS)
    return PreferenceLoss(data_args, args)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# One pair by hand: log-ratios w (chosen) and l (rejected) to the reference, beta 0.3, smoothing 0.1 where it acts.
W, L, BETA, EPS = 1.7, -0.6, 0.3, 0.1
H = BETA * (W - L)
BY_HAND = {
    "sigmoid": -0.9 * log_sigmoid(H) - 0.1 * log_sigmoid(-H),
    "robust": (-0.9 * log_sigmoid(H) + 0.1 * log_sigmoid(-H)) / 0.8,
    "hinge": max(0.0, 1 - H),
    "ipo": (W / 4 - L / 5 - 1 / (2 * BETA)) ** 2,
    "exo_pair": sigmoid(H) * math.log(sigmoid(H) / 0.9) + sigmoid(-H) * math.log(sigmoid(-H) / 0.1),
    "nca_pair": -log_sigmoid(BETA * W) - 0.5 * log_sigmoid(-BETA * W) - 0.5 * log_sigmoid(-BETA * L),
    "sppo_hard": (W - 0.5 / BETA) ** 2 + (L + 0.5 / BETA) ** 2,
    "bco_pair": -log_sigmoid(BETA * W - BETA * (W + L) / 2) - log_sigmoid(-(BETA * L - BETA * (W + L) / 2)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_is_its_formula(name):
    smoothing = ["--label_smoothing", str(EPS)] if name in ("sigmoid", "robust", "exo_pair") else []
    loss = loss_of("--loss_type", name, "--beta", str(BETA), *smoothing)
    policy, reference = torch.tensor([-3.0 + W, -8.0 + L]), torch.tensor([-3.0, -8.0])
    assert loss(policy, reference, torch.tensor([4, 5]))[0].item() == pytest.approx(BY_HAND[name], rel=1e-5)


def test_the_sum_of_losses_and_the_moving_mean_reward():
    """Two micro-batches: the second one's shift is the mean of all eight rewards."""
    loss = loss_of(*RECIPE, "--beta", "0.5")
    torch.manual_seed(0)
    tokens, rewards = torch.tensor([3, 4, 5, 6]), []
    for _ in range(2):
        policy, reference = -10 * torch.rand(4), -10 * torch.rand(4)
        found, metrics = loss(policy, reference, tokens)
        reward = 0.5 * (policy - reference)
        rewards.append(reward)
        shift = torch.cat(rewards).mean().item()
        expected = 0.0
        for w, r, logp, n in zip(reward[:2].tolist(), reward[2:].tolist(), policy[:2].tolist(), (3, 4), strict=True):
            expected += (
                -0.8 * log_sigmoid(w - r) - 0.2 * (log_sigmoid(w - shift) + log_sigmoid(shift - r)) - logp / n
            ) / 2
        assert found.item() == pytest.approx(expected, rel=1e-5)
    by_hand = {
        "rewards/chosen": reward[:2],
        "rewards/rejected": reward[2:],
        "rewards/margins": reward[:2] - reward[2:],
        "rewards/accuracies": (reward[:2] > reward[2:]).float(),
        "logps/chosen": policy[:2],
        "logps/rejected": policy[2:],
        "nll_loss": -policy[:2] / tokens[:2],
    }
    assert by_hand.keys() == metrics.keys()
    for name, values in by_hand.items():
        torch.testing.assert_close(metrics[name], values)


def test_an_empty_pair_counts_for_nothing():
    policy, reference = torch.tensor([-1.0, 0.0, -2.0, 0.0]), torch.tensor([-2.0, 0.0, -1.0, 0.0])
    with_empty, alone, nothing = loss_of(*RECIPE), loss_of(*RECIPE), loss_of(*RECIPE)
    found, metrics = with_empty(policy, reference, torch.tensor([3, 0, 3, 0]))
    assert found == alone(policy[::2], reference[::2], torch.tensor([3, 3]))[0]
    assert metrics["rewards/margins"].shape == (1,)
    assert torch.equal(with_empty.seen, alone.seen)
    assert nothing(policy[1::2], reference[1::2], torch.tensor([0, 0]))[0] == 0
