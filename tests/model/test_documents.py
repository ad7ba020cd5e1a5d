"""A row holds several documents; restarting positions are their only boundary. And the two ways to the same loss."""

import torch
from helpers.model_cases import close

from internvl.model.token_loss import token_loss


def rows(case, seed: int) -> dict:
    """Two rows of two text documents (5 + 11 tokens), the first documents drawn by `seed`, the second ones fixed."""
    vocabulary = min(200, case.meta["img_context_token_id"] - 1)
    first = torch.randint(3, vocabulary, (2, 5), generator=torch.Generator().manual_seed(seed))
    second = torch.randint(3, vocabulary, (2, 11), generator=torch.Generator().manual_seed(99))
    ids = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(5), torch.arange(11)]).expand(2, -1)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.clone()}


@torch.no_grad()
def test_changing_one_document_does_not_move_the_other(model_case):
    model, one, other = model_case.model(), rows(model_case, 1), rows(model_case, 2)
    a, b = model(**one).logits, model(**other).logits
    assert not torch.equal(a[:, :5], b[:, :5])
    assert torch.equal(a[:, 5:], b[:, 5:])
    alone = {k: v[:, 5:] for k, v in one.items()}
    close(model(**alone).logits, a[:, 5:], atol=1e-5)


def test_gradients_do_not_cross_documents(model_case):
    """Also through the loss: the last token of a document is not trained to predict the first of the next."""
    model, row = model_case.model().train(), rows(model_case, 1)
    row["labels"][:, :5] = -100
    model(**row).loss.backward()
    embeddings = model.get_input_embeddings().weight.grad
    only_first = sorted(
        set(row["input_ids"][:, :5].flatten().tolist()) - set(row["input_ids"][:, 5:].flatten().tolist())
    )
    assert only_first and not embeddings[only_first].any()


@torch.no_grad()
def test_loss_of_a_row_is_that_of_its_documents(model_case):
    model, row = model_case.model(), rows(model_case, 1)
    documents = [{k: v[:, part] for k, v in row.items()} for part in (slice(0, 5), slice(5, 16))]
    losses = [model(**document).loss for document in documents]
    counts = [document["labels"][:, 1:].numel() for document in documents]
    apart = sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
    close(model(**row).loss, apart, atol=1e-6)


def test_training_loss_equals_evaluation_loss(model_case):
    """In chunks over trained tokens, or from the full logits: the same loss and the same gradients."""
    weight, results = model_case.inputs["loss_weight_square"], []
    for training in (True, False):
        model = model_case.model().train(training)
        output = model(**model_case.batch, loss_weight=weight)
        output.loss.backward()
        assert (output.logits is None) == training
        results.append((output.loss, [p.grad for p in model.parameters() if p.grad is not None]))
    close(results[0][0], results[1][0], atol=1e-6)
    for chunked, full in zip(results[0][1], results[1][1], strict=True):
        close(chunked, full, atol=1e-6)


def test_weights_are_averaged_over_ranks(tmp_path):
    """`loss_reduction_all_gather` divides by the mean over ranks of the summed weights; one rank trains nothing."""
    import torch.multiprocessing as mp

    mp.spawn(_on_rank, args=(f"file://{tmp_path}/store",), nprocs=2)


def _on_rank(rank: int, store: str):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    labels = torch.tensor([[0, 1, 2, -100]]) if rank == 0 else torch.full((1, 4), -100)
    states = torch.zeros(1, 4, 8)
    head = torch.nn.Linear(8, 10, bias=False)
    loss = token_loss(states, head, labels, loss_weight=torch.full((1, 4), 3.0), average_weight_over_ranks=True)
    expected = 2 * torch.log(torch.tensor(10.0)) if rank == 0 else torch.tensor(0.0)  # 6 ln 10 / (6 / 2)
    torch.testing.assert_close(loss, expected)
    dist.barrier()  # a rank that leaves early takes the connection with it
    dist.destroy_process_group()


def test_a_mask_would_join_the_documents(packed_case):
    """So the tests above can fail: with a mask given, transformers takes a packed row for one document."""
    model, batch = packed_case.model(), packed_case.packed_batch
    with torch.no_grad():
        packed = model(**batch).logits
        leaking = model(**batch, attention_mask=torch.ones_like(batch["input_ids"])).logits
    assert (packed - leaking).abs().max() > 0.01
