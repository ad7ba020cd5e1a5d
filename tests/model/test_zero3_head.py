"""ZeRO-3 on two ranks gathers the LM head once per step.

Losses equal those of training in one process.
"""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.tiny_models import TINY_LLM, build_tiny_model
from helpers.token_loss_cases import HEADS

from internvl.data.collators import compute_indices
from internvl.model import token_loss
from internvl.model.internvl_chat import InternVLChatModel
from internvl.train import preference_loss

NUM_STEPS = 5
WORLD_SIZE = 2
DEEPSPEED_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
    # Partition small parameters, too.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
# State of the head -> number of gathers of its weight in each step. In the first step, DeepSpeed records the order of
# modules. Later it keeps a trainable weight from the end of the forward pass to the start of the backward pass. A tied
# weight is also gathered for the embedding. An adapted head has no entry: it is gathered for each chunk.
NUM_GATHERS = {"trained": [2, 1, 1, 1, 1], "tied": [4, 1, 1, 1, 1], "frozen": [1] * NUM_STEPS}


@pytest.mark.multiprocess
def test_the_head_is_gathered_once_a_step_and_losses_are_equal(tmp_path):
    mp.spawn(_on_rank, args=(f"file://{tmp_path}/store",), nprocs=WORLD_SIZE)


def make_batch(step: int, rank: int) -> dict:
    """Make a batch of 3 to 30 loss tokens.

    On the second rank there are none in odd steps.
    """
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(3, 1000, (1, 32), generator=generator)
    num_loss_tokens = 0 if rank and step % 2 else int(torch.randint(3, 31, (), generator=generator))
    batch = {
        "input_ids": ids,
        "position_ids": torch.arange(32)[None],
        "labels": ids.masked_fill(torch.arange(32) > num_loss_tokens, -100),
        "pixel_values": torch.zeros(0, 3, 28, 28),
        "image_flags": torch.zeros(0),
    }
    return batch | compute_indices(batch, image_token_id=0)


def build_model(kind: str, head: str, model_class: type) -> InternVLChatModel:
    change_head, _ = HEADS[head]
    model = build_tiny_model(kind, change_head, model_class=model_class)
    model.vision_model.requires_grad_(False)
    model.mlp1.requires_grad_(False)
    return model.train()


def compute_loss(model, step: int, rank: int) -> torch.Tensor:
    """Compute the loss; for the preference model, from its log-probabilities."""
    output = model(**make_batch(step, rank))
    return -output.sum() / 30 if torch.is_tensor(output) else output.loss


def make_optimizer(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train_in_one_process(model: InternVLChatModel, rank: int) -> list[float]:
    """Train on the batches of all ranks; return this rank's losses."""
    optimizer, losses = make_optimizer(model), []
    for step in range(NUM_STEPS):
        rank_losses = [compute_loss(model, step, rank) for rank in range(WORLD_SIZE)]
        (sum(rank_losses) / WORLD_SIZE).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(rank_losses[rank].item())
    return losses


def count_gathers(weight: torch.nn.Parameter, weights: list) -> list[str]:
    """Return a list that grows with each gather of `weight`.

    It may be gathered alone or among other `weights`.
    """
    gathers = []

    def wrap(gather_fn):
        def gather_and_count(params, *args, **kwargs):
            params = list(params)
            gathers.extend("gathered" for param in params if param is weight)
            return gather_fn(params, *args, **kwargs)

        return gather_and_count

    for parameter in weights:
        parameter.all_gather_coalesced = wrap(parameter.all_gather_coalesced)
    return gathers


def train_under_zero3(model: InternVLChatModel, rank: int) -> tuple[list[float], list[int]]:
    """Return this rank's losses and the head's gathers of each step."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=DEEPSPEED_CONFIG)
    gathers = count_gathers(model.get_output_embeddings().weight, list(model.parameters()))
    losses, num_gathers = [], []
    for step in range(NUM_STEPS):
        num_before = len(gathers)
        loss = compute_loss(engine, step, rank)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        num_gathers.append(len(gathers) - num_before)
    engine.destroy()
    return losses, num_gathers


def _on_rank(rank: int, store: str):
    os.environ["LOCAL_RANK"] = str(rank)
    import deepspeed

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    token_loss.CHUNK_BYTES = 4 * 4 * TINY_LLM["vocab_size"]  # 4 tokens: ranks have different numbers of chunks
    preference_model = preference_loss.PreferenceModel
    cases = [(kind, head, InternVLChatModel) for kind in ("qwen2", "internlm2") for head in HEADS]
    cases += [("qwen2", head, preference_model) for head in ("trained", "frozen")]
    for case in cases:
        expected = train_in_one_process(build_model(*case), rank)
        losses, num_gathers = train_under_zero3(build_model(*case), rank)
        assert losses == pytest.approx(expected, abs=1e-5), case
        # The preference model recomputes logits in the backward pass, and needs a frozen head there, too.
        head = "trained" if case[2] is preference_model else case[1]
        assert num_gathers == NUM_GATHERS.get(head, num_gathers), case
    dist.barrier()
    dist.destroy_process_group()
