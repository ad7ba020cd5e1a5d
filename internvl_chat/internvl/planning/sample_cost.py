"""FLOPs of a chat model's parts in one forward pass, from its configuration alone, and what a plan makes of them.

A multiplication and an addition are two. Attention is counted by document, as it is computed.
"""

from typing import NamedTuple

from internvl.model.internvl_chat.configuration_internvl_chat import InternVLChatConfig
from internvl.planning.epoch_plan import SampleCost


class Passes(NamedTuple):
    """How many forward passes' worth of work a step does: 1 forward, 1 for gradients of inputs, 1 of weights, 1 to
    compute activations again."""

    vision: float
    llm: float


def forward_flops(config: InternVLChatConfig) -> dict[str, float]:
    """FLOPs of a `tile` (vision encoder and projector), a `token`, a `pair` of tokens (attention) and of the `head` (a
    token's logits)."""
    vision, llm = config.vision_config, config.llm_config
    patches = (vision.image_size // vision.patch_size) ** 2
    width, length = vision.hidden_size, patches + 1
    layer = length * (4 * width**2 + 2 * width * vision.intermediate_size) + 2 * length**2 * width
    tile = vision.num_hidden_layers * layer + patches * 3 * vision.patch_size**2 * width
    merged = round(1 / config.downsample_ratio) ** 2
    tile += patches / merged * llm.hidden_size * (width * merged + llm.hidden_size)

    hidden, heads = llm.hidden_size, llm.num_attention_heads
    head_dim = getattr(llm, "head_dim", None) or hidden // heads
    key_heads = getattr(llm, "num_key_value_heads", None) or heads
    attention = 2 * hidden * head_dim * (heads + key_heads)
    experts = getattr(llm, "num_experts_per_tok", None) or 1
    inner = getattr(llm, "intermediate_size", 4 * hidden)
    inner = getattr(llm, "moe_intermediate_size", inner) if experts > 1 else inner
    token = llm.num_hidden_layers * (attention + 3 * experts * hidden * inner)
    pair = llm.num_hidden_layers * 2 * heads * head_dim
    return {"tile": 2.0 * tile, "token": 2.0 * token, "pair": 2.0 * pair, "head": 2.0 * hidden * llm.vocab_size}


def step_cost(config: InternVLChatConfig, passes: Passes) -> SampleCost:
    """FLOPs of a sample in a training step, as a plan weighs it. Attention is causal: n tokens are n^2 / 2 pairs."""
    flops = forward_flops(config)
    return SampleCost(
        token=flops["token"] * passes.llm,
        trained=flops["head"] * 2,  # forward, and gradients of its inputs; never computed again
        tile=flops["tile"] * passes.vision,
        pair=flops["pair"] / 2 * passes.llm,
    )
