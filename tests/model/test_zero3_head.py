"""ZeRO-3 on two ranks: the head is gathered once a step, whatever each rank trains on, and the losses stay."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.tiny_models import LLM, LLMS, VITS
from model.test_token_loss import HEADS

from internvl.model import token_loss as module
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.train import preference_loss

STEPS = 5
RANKS = 2
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
    # No weight is too small to be sliced.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
# How often the head's weight is gathered in each of the steps. DeepSpeed learns the order of layers in the first; from
# then on it knows that the backward pass, where a weight that trains must be there, begins with the head. A tied one is
# the embedding's, too. An adapted one is gathered by the hooks of its parts, which run for each chunk.
GATHERED = {"trained": [2, 1, 1, 1, 1], "tied": [4, 1, 1, 1, 1], "frozen": [1] * STEPS}


@pytest.mark.slow
def test_the_head_is_gathered_once_a_step_and_losses_stay(tmp_path):
    mp.spawn(_on_rank, args=(f"file://{tmp_path}/store",), nprocs=RANKS)


def batch(step: int, rank: int) -> dict:
    """3 to 30 trained tokens, on the second rank none in some steps."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(3, 1000, (1, 32), generator=generator)
    trained = 0 if rank and step % 2 else int(torch.randint(3, 31, (), generator=generator))
    return {
        "input_ids": ids,
        "position_ids": torch.arange(32)[None],
        "labels": ids.masked_fill(torch.arange(32) > trained, -100),
        "pixel_values": torch.zeros(0, 3, 28, 28),
        "image_flags": torch.zeros(0),
    }


def tiny(kind: str, head: str, model_class: type) -> InternVLChatModel:
    torch.manual_seed(0)
    model = model_class(InternVLChatConfig(VITS["300M"], LLM | LLMS[kind], template="internvl2_5"))
    model.vision_model.requires_grad_(False)
    model.mlp1.requires_grad_(False)
    HEADS[head][0](model)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model.train()


def loss_of(model, step: int, rank: int) -> torch.Tensor:
    """The loss of the chat model, or one of the log-probabilities that the preference model gives."""
    output = model(**batch(step, rank))
    return -output.sum() / 30 if torch.is_tensor(output) else output.loss


def optimizer_of(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def losses_of_one_process(model: InternVLChatModel, rank: int) -> list[float]:
    """Those of this rank's batches, where each step takes the mean gradient over the ranks' batches."""
    optimizer, losses = optimizer_of(model), []
    for step in range(STEPS):
        of_ranks = [loss_of(model, step, rank) for rank in range(RANKS)]
        (sum(of_ranks) / RANKS).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(of_ranks[rank].item())
    return losses


def count_gathers(weight: torch.nn.Parameter, weights: list) -> list[str]:
    """A list that grows with each gather of `weight`, alone or among other `weights`."""
    seen = []

    def counting(gather):
        def gather_and_count(params, *args, **kwargs):
            params = list(params)
            seen.extend("gathered" for param in params if param is weight)
            return gather(params, *args, **kwargs)

        return gather_and_count

    for each in weights:
        each.all_gather_coalesced = counting(each.all_gather_coalesced)
    return seen


def losses_under_zero3(model: InternVLChatModel, rank: int) -> tuple[list[float], list[int]]:
    """Losses of this rank's batches, and how often the head's weight was gathered in each step."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=CONFIG)
    seen = count_gathers(model.get_output_embeddings().weight, list(model.parameters()))
    losses, gathered = [], []
    for step in range(STEPS):
        before = len(seen)
        loss = loss_of(engine, step, rank)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        gathered.append(len(seen) - before)
    engine.destroy()
    return losses, gathered


def _on_rank(rank: int, store: str):
    os.environ["LOCAL_RANK"] = str(rank)
    import deepspeed

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    module.CHUNK_BYTES = 4 * 4 * LLM["vocab_size"]  # 4 tokens: ranks have different numbers of chunks
    chat, preference = InternVLChatModel, preference_loss.InternVLChatModel
    cases = [(kind, head, chat) for kind in ("qwen2", "internlm2") for head in HEADS]
    for case in [*cases, ("qwen2", "trained", preference), ("qwen2", "frozen", preference)]:
        expected = losses_of_one_process(tiny(*case), rank)
        losses, gathered = losses_under_zero3(tiny(*case), rank)
        assert losses == pytest.approx(expected, abs=1e-5), case
        # The preference model computes logits again in the backward pass, where it needs a frozen head, too.
        likewise = "trained" if case[2] is preference else case[1]
        assert gathered == GATHERED.get(likewise, gathered), case
    dist.barrier()
    dist.destroy_process_group()
