"""FLOPs of models against torch's FLOP counter, and sample costs."""

import pytest
import torch
from helpers.tiny_models import TINY_LLM, TINY_LLMS, TINY_VITS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from internvl.metrics.model_flops import ModelFlops, count_model_flops
from internvl.model.activation_checkpointing import apply_gradient_checkpointing
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.decoder import run_decoder
from internvl.model.lora import LoraSettings, unwrap_peft
from internvl.model.lora_linear import LoraLinear
from internvl.model.varlen_attention import use_varlen_attention
from internvl.planning.epoch_plan import SampleCost
from internvl.planning.sample_cost import compute_sample_cost, count_forward_flops, scale_to_training
from internvl.tools.benchmark.sizes import MODEL_SIZES, build_config

DOCUMENTS, NUM_TILES, LOSS_TOKENS = [37, 3, 120], 3, [11, 2, 11]
PARTS = ("vision_model", "mlp1", "language_model")


def build_model(llm: str, vit: str = "300M", **fields) -> InternVLChatModel:
    torch.manual_seed(0)
    fields = {"force_image_size": 56, "template": "internvl2_5", "ps_version": "v2", **fields}
    model = InternVLChatModel(
        InternVLChatConfig(vision_config=TINY_VITS[vit], llm_config=TINY_LLM | TINY_LLMS[llm], **fields)
    )
    model.img_context_token_id = 1000
    use_varlen_attention(model.language_model, packed=True)
    return model.train()


def make_batch(model: InternVLChatModel) -> dict:
    """Make a packed row; the first document has the tiles."""
    lengths = torch.tensor(DOCUMENTS)
    ids = torch.randint(3, 900, (1, lengths.sum()))
    ids[0, : NUM_TILES * model.num_image_token] = model.img_context_token_id
    labels = torch.full_like(ids, -100)
    for end, number in zip(lengths.cumsum(0).tolist(), LOSS_TOKENS, strict=True):
        labels[0, end - number : end] = 5
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(n) for n in DOCUMENTS])[None],
        "pixel_values": torch.randn(NUM_TILES, 3, 56, 56),
        "image_flags": torch.ones(NUM_TILES, dtype=torch.int64),
        "cu_seqlens": [0, *lengths.cumsum(0).tolist()],
    }


def compute_loss(model: InternVLChatModel, batch: dict) -> torch.Tensor:
    """Compute the loss; unlike the model's chunked loss, logits only once."""
    llm, labels = unwrap_peft(model.language_model), batch["labels"]
    embeds = model.embed_inputs(batch["input_ids"], batch["pixel_values"], batch["image_flags"])
    outputs = run_decoder(llm, embeds, None, batch["position_ids"], batch["cu_seqlens"], use_cache=False)
    is_loss_token = labels[:, 1:] != -100
    logits = llm.get_output_embeddings()(outputs.last_hidden_state[:, :-1][is_loss_token])
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:][is_loss_token])


def count_with_torch(model: InternVLChatModel, backward: bool) -> int:
    """Count FLOPs with torch's counter, of a forward pass or of both."""
    batch = make_batch(model)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.is_in_place = False  # the counter ignores `addmm_`
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward):
        loss = compute_loss(model, batch)
        if backward:
            loss.backward()
    return counter.get_total_flops()


def count_as_torch(flops: ModelFlops) -> float:
    """Count attention twice: SDPA's math backend computes non-causal pairs, too."""
    return flops.count(DOCUMENTS, sum(LOSS_TOKENS), NUM_TILES) + flops.count_attention(DOCUMENTS)


def freeze(model: InternVLChatModel, *parts: str) -> None:
    for part in parts:
        getattr(model, part).requires_grad_(False)


def adapt(model: InternVLChatModel, *parts: str, **settings) -> None:
    freeze(model, *PARTS)
    for part in parts:
        model.add_part_adapters(part, LoraSettings(**{"r": 4, "alpha": 8, **settings}))
        if part != "mlp1":  # PEFT lets embeddings require gradients, which nothing uses here
            unwrap_peft(getattr(model, part)).disable_input_require_grads()


def train_last_vision_layer(model: InternVLChatModel) -> None:
    freeze(model, *PARTS)
    model.vision_model.encoder.layers[-1].requires_grad_(True)


def train_head(model: InternVLChatModel) -> None:
    freeze(model, *PARTS)
    model.language_model.get_output_embeddings().requires_grad_(True)


SETUPS = {  # which parameters are trainable
    "everything": lambda model: None,
    "projector": lambda model: freeze(model, "vision_model", "language_model"),
    "projector and LLM": lambda model: freeze(model, "vision_model"),
    "vision encoder": lambda model: freeze(model, "mlp1", "language_model"),
    "last vision layer": train_last_vision_layer,
    "head": train_head,
    "adapters in vision encoder": lambda model: adapt(model, "vision_model"),
    "adapters in LLM": lambda model: adapt(model, "language_model"),
    "adapters in both": lambda model: adapt(model, "vision_model", "language_model"),
    "adapters everywhere": lambda model: adapt(model, *PARTS),
    "adapters in the upper layer": lambda model: adapt(model, "language_model", layers=(1, None)),
}


EXPERTS = ["qwen3_moe", "gpt_oss"]
DENSE = [llm for llm in TINY_LLMS if llm not in EXPERTS]


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("llm", DENSE)
def test_flops_equal_torchs_counter(llm, setup):
    model = build_model(llm, "6B" if llm == "internlm2" else "300M")
    SETUPS[setup](model)
    for backward in (False, True):
        assert count_as_torch(count_model_flops(model, backward)) == count_with_torch(model, backward)


@pytest.mark.parametrize("setup", ["everything", "projector"])
@pytest.mark.parametrize("llm", EXPERTS)
def test_experts_count_by_the_share_that_a_token_is_routed_to(llm, setup):
    model = build_model(llm)
    model.language_model.set_experts_implementation("eager")
    SETUPS[setup](model)
    for backward in (False, True):
        assert count_as_torch(count_model_flops(model, backward)) == count_with_torch(model, backward)


@pytest.mark.parametrize("llm", TINY_LLMS)
def test_configuration_alone_gives_the_same_flops(llm):
    model = build_model(llm)
    assert count_forward_flops(model.config) == count_model_flops(model, backward=False)


def test_sample_cost_counts_the_passes_of_a_step():
    """Forward, gradients of inputs and of weights, recomputed layers."""
    forward = count_forward_flops(build_model("qwen2").config)

    model = build_model("qwen2")
    assert compute_sample_cost(model) == scale_to_training(forward, vision_passes=3, llm_passes=3)
    apply_gradient_checkpointing(model.language_model, ratio=0.5)  # one of two layers
    assert compute_sample_cost(model) == scale_to_training(forward, vision_passes=3, llm_passes=3.5)

    freeze(model, "vision_model", "language_model")
    assert compute_sample_cost(model) == scale_to_training(forward, vision_passes=1, llm_passes=2)

    model = build_model("qwen2")
    adapt(model, "vision_model", "language_model")
    assert compute_sample_cost(model) == scale_to_training(forward, vision_passes=2, llm_passes=2)
    apply_gradient_checkpointing(model.vision_model)
    assert compute_sample_cost(model) == scale_to_training(forward, vision_passes=3, llm_passes=3)


def test_sample_cost_of_a_published_model():
    """InternVL2.5-1B with LoRA; these ratios determine the order of rows."""
    forward = count_forward_flops(build_config(MODEL_SIZES["1b"]))
    assert scale_to_training(forward, vision_passes=3, llm_passes=3) == SampleCost(
        per_token=2146959360, per_loss_token=543599616, per_tile=2177649377280, per_token_pair=129024
    )


def test_adapters_can_be_excluded():
    model = build_model("qwen2")
    without = count_model_flops(model, backward=False)
    adapt(model, "vision_model", "language_model")
    assert count_model_flops(model, backward=False, adapters=False) == without
    assert count_model_flops(model, backward=False).per_token > without.per_token


def test_vision_layers_after_select_layer_do_not_count():
    all_layers, cut = (
        count_model_flops(build_model("qwen2", select_layer=layer), backward=False) for layer in (-1, -2)
    )
    model = build_model("qwen2", select_layer=-2)
    model.vision_model.encoder.layers = model.vision_model.encoder.layers[:-1]
    assert cut.per_tile < all_layers.per_tile and count_as_torch(cut) == count_with_torch(model, backward=False)


@pytest.mark.parametrize("window", [1, 7, 40, 1000, None])
@pytest.mark.parametrize("length", DOCUMENTS)
def test_a_window_slides_over_long_documents(window, length):
    pairs = sum(min(position, window or length) for position in range(1, length + 1))
    # The pair of a token with itself counts half.
    assert ModelFlops(0, 0, 0, {window: 1.0}).count_attention([length]) == pytest.approx(
        pairs - min(length, window or length) / 2
    )


def test_windows_come_from_the_configuration():
    phi3 = build_model("phi3_su")
    pair = count_model_flops(phi3, backward=False).per_token_pair[None]
    phi3.language_model.config.sliding_window = 50
    phi3.language_model.config.layer_types = None
    assert count_model_flops(phi3, backward=False).per_token_pair == {50: pair}
    pairs = count_model_flops(build_model("gpt_oss"), backward=False).per_token_pair
    assert set(pairs) == {None, 128} and pairs[None] == pairs[128]
