"""Documents of a packed row do not affect each other.

Training and evaluation compute the same loss.
"""

import pytest
import torch
from helpers.model_cases import assert_close

from internvl.model.internvl_chat.documents import normalize_document_boundaries
from internvl.model.token_loss import compute_token_loss


def make_rows(case, seed: int) -> dict:
    """Make two rows of two text documents, 5 + 11 tokens.

    Only the first document of a row depends on `seed`.
    """
    vocabulary = min(200, case.meta["img_context_token_id"] - 1)
    first = torch.randint(3, vocabulary, (2, 5), generator=torch.Generator().manual_seed(seed))
    second = torch.randint(3, vocabulary, (2, 11), generator=torch.Generator().manual_seed(99))
    ids = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(5), torch.arange(11)]).expand(2, -1)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.clone()}


@torch.no_grad()
def test_changing_one_document_does_not_change_the_logits_of_another(model_case):
    model, one, other = model_case.model(), make_rows(model_case, 1), make_rows(model_case, 2)
    a, b = model(**one).logits, model(**other).logits
    assert not torch.equal(a[:, :5], b[:, :5])
    assert torch.equal(a[:, 5:], b[:, 5:])
    alone = {k: v[:, 5:] for k, v in one.items()}
    assert_close(model(**alone).logits, a[:, 5:], atol=1e-5)


def test_gradients_do_not_cross_documents(model_case):
    """A document's last token has no loss for the next document."""
    model, row = model_case.model().train(), make_rows(model_case, 1)
    row["labels"][:, :5] = -100
    model(**row).loss.backward()
    embeddings = model.get_input_embeddings().weight.grad
    ids_of_first = sorted(
        set(row["input_ids"][:, :5].flatten().tolist()) - set(row["input_ids"][:, 5:].flatten().tolist())
    )
    assert ids_of_first and not embeddings[ids_of_first].any()


@torch.no_grad()
def test_loss_of_a_row_is_the_mean_over_its_documents(model_case):
    model, row = model_case.model(), make_rows(model_case, 1)
    documents = [{k: v[:, part] for k, v in row.items()} for part in (slice(0, 5), slice(5, 16))]
    losses = [model(**document).loss for document in documents]
    counts = [document["labels"][:, 1:].numel() for document in documents]
    expected = sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
    assert_close(model(**row).loss, expected, atol=1e-6)


def test_training_loss_equals_evaluation_loss(model_case):
    """Training computes it in chunks, evaluation from the full logits."""
    weight, results = model_case.inputs["loss_weight_square"], []
    for training in (True, False):
        model = model_case.model().train(training)
        output = model(**model_case.batch, loss_weight=weight)
        output.loss.backward()
        assert (output.logits is None) == training
        results.append((output.loss, [p.grad for p in model.parameters() if p.grad is not None]))
    assert_close(results[0][0], results[1][0], atol=1e-6)
    for chunked, full in zip(results[0][1], results[1][1], strict=True):
        assert_close(chunked, full, atol=1e-6)


@pytest.mark.multiprocess
def test_weights_are_averaged_over_ranks(tmp_path):
    """`loss_reduction_all_gather` divides by the mean of summed weights.

    One rank has no loss tokens.
    """
    import torch.multiprocessing as mp

    mp.spawn(_on_rank, args=(f"file://{tmp_path}/store",), nprocs=2)


def _on_rank(rank: int, store: str):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    labels = torch.tensor([[0, 1, 2, -100]]) if rank == 0 else torch.full((1, 4), -100)
    states = torch.zeros(1, 4, 8)
    head = torch.nn.Linear(8, 10, bias=False)
    loss = compute_token_loss(states, head, labels, loss_weight=torch.full((1, 4), 3.0), average_weight_over_ranks=True)
    expected = 2 * torch.log(torch.tensor(10.0)) if rank == 0 else torch.tensor(0.0)  # 6 ln 10 / (6 / 2)
    torch.testing.assert_close(loss, expected)
    dist.barrier()  # a rank that exits early would close the connection
    dist.destroy_process_group()


def test_with_a_mask_a_packed_row_is_one_document(packed_case):
    """The tests above can fail: with a mask, restarting positions are ignored."""
    model, batch = packed_case.model(), packed_case.packed_batch
    with torch.no_grad():
        packed = model(**batch).logits
        leaking = model(**batch, attention_mask=torch.ones_like(batch["input_ids"])).logits
    assert (packed - leaking).abs().max() > 0.01


def test_callers_forms_of_document_boundaries_are_normalized():
    mask, bounds = torch.ones(1, 4, dtype=torch.int64), torch.tensor([[0, 2, 4]], dtype=torch.int32)
    cases = {
        "padding": ((mask, None), (mask, None)),
        "one document": ((None, None), (None, None)),
        "upstream's packed batch": ((bounds, None), (None, None)),
        "InternVL 3.5's packed batch": ((mask, bounds[0]), (None, None)),
        "our packed batch": ((None, [0, 2, 4]), (None, [0, 2, 4])),
    }
    for name, (arguments, expected) in cases.items():
        assert normalize_document_boundaries(*arguments) == expected, name
