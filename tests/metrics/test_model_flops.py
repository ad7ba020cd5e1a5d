"""FLOPs of a model against what torch counts while it runs, with the parts frozen, adapted and trained."""

import pytest
import torch
from helpers.tiny_models import LLM, LLMS, VITS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from internvl.metrics.model_flops import ModelFlops, model_flops
from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
from internvl.model.internvl_chat.decoder import decode
from internvl.model.lora import LoraSettings, unwrap_peft
from internvl.model.lora_linear import LoraLinear
from internvl.model.varlen_attention import use_varlen_attention
from internvl.planning.sample_cost import forward_flops

DOCUMENTS, TILES, TRAINED = [37, 3, 120], 3, 24  # labels: 11, 2, 11
PARTS = ("vision_model", "mlp1", "language_model")


def model_of(llm: str, vit: str = "300M", **fields) -> InternVLChatModel:
    torch.manual_seed(0)
    fields = {"force_image_size": 56, "template": "internvl2_5", "ps_version": "v2", **fields}
    model = InternVLChatModel(InternVLChatConfig(vision_config=VITS[vit], llm_config=LLM | LLMS[llm], **fields))
    model.img_context_token_id = 1000
    use_varlen_attention(model.language_model, packed=True)
    return model.train()


def batch_of(model: InternVLChatModel) -> dict:
    """One row of documents; the first holds the tiles, each has labels at its end."""
    lengths = torch.tensor(DOCUMENTS)
    ids = torch.randint(3, 900, (1, lengths.sum()))
    ids[0, : TILES * model.num_image_token] = model.img_context_token_id
    labels = torch.full_like(ids, -100)
    for end, number in zip(lengths.cumsum(0).tolist(), (11, 2, 11), strict=True):
        labels[0, end - number : end] = 5
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(n) for n in DOCUMENTS])[None],
        "pixel_values": torch.randn(TILES, 3, 56, 56),
        "image_flags": torch.ones(TILES, dtype=torch.int64),
        "cu_seqlens": [0, *lengths.cumsum(0).tolist()],
    }


def loss_of(model: InternVLChatModel, batch: dict) -> torch.Tensor:
    """The loss with every product computed once: the model itself makes the logits a second time."""
    llm, labels = unwrap_peft(model.language_model), batch["labels"]
    embeds = model._embed(batch["input_ids"], batch["pixel_values"], batch["image_flags"])
    outputs = decode(llm, embeds, None, batch["position_ids"], batch["cu_seqlens"], use_cache=False)
    trained = labels[:, 1:] != -100
    logits = llm.get_output_embeddings()(outputs.last_hidden_state[:, :-1][trained])
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:][trained])


def counted(model: InternVLChatModel, backward: bool) -> int:
    """FLOPs by torch's counter, of a forward pass or of both."""
    batch = batch_of(model)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.in_place = False  # the counter does not know `addmm_`
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward):
        loss = loss_of(model, batch)
        if backward:
            loss.backward()
    return counter.get_total_flops()


def as_counted(flops: ModelFlops) -> float:
    """Without the kernels that know what is causal, torch computes and counts all pairs of a document."""
    return flops.of(DOCUMENTS, TRAINED, TILES) + flops.attention(DOCUMENTS)


def freeze(model: InternVLChatModel, *parts: str) -> None:
    for part in parts:
        getattr(model, part).requires_grad_(False)


def adapt(model: InternVLChatModel, *parts: str, **settings) -> None:
    freeze(model, *PARTS)
    for part in parts:
        model.add_part_adapters(part, LoraSettings(**{"r": 4, "alpha": 8, **settings}))
        if part != "mlp1":  # PEFT makes embeddings need gradients, for which nothing has a use
            unwrap_peft(getattr(model, part)).disable_input_require_grads()


def last_vision_layer(model: InternVLChatModel) -> None:
    freeze(model, *PARTS)
    model.vision_model.encoder.layers[-1].requires_grad_(True)


def head_alone(model: InternVLChatModel) -> None:
    freeze(model, *PARTS)
    model.language_model.get_output_embeddings().requires_grad_(True)


TRAINS = {
    "everything": lambda model: None,
    "projector": lambda model: freeze(model, "vision_model", "language_model"),
    "projector and llm": lambda model: freeze(model, "vision_model"),
    "vision": lambda model: freeze(model, "mlp1", "language_model"),
    "last vision layer": last_vision_layer,
    "head": head_alone,
    "adapters in vision": lambda model: adapt(model, "vision_model"),
    "adapters in llm": lambda model: adapt(model, "language_model"),
    "adapters in both": lambda model: adapt(model, "vision_model", "language_model"),
    "adapters everywhere": lambda model: adapt(model, *PARTS),
    "adapters in the upper layer": lambda model: adapt(model, "language_model", layers=(1, None)),
}


EXPERTS = ["qwen3_moe", "gpt_oss"]
DENSE = [llm for llm in LLMS if llm not in EXPERTS]


@pytest.mark.parametrize("trains", TRAINS)
@pytest.mark.parametrize("llm", DENSE)
def test_flops_are_those_that_torch_counts(llm, trains):
    model = model_of(llm, "6B" if llm == "internlm2" else "300M")
    TRAINS[trains](model)
    for backward in (False, True):
        assert as_counted(model_flops(model, backward)) == counted(model, backward)


@pytest.mark.parametrize("trains", ["everything", "projector"])
@pytest.mark.parametrize("llm", EXPERTS)
def test_of_experts_those_count_that_a_token_meets(llm, trains):
    model = model_of(llm)
    model.language_model.set_experts_implementation("eager")
    TRAINS[trains](model)
    for backward in (False, True):
        assert as_counted(model_flops(model, backward)) == counted(model, backward)


@pytest.mark.parametrize("llm", DENSE)
def test_a_forward_pass_costs_what_the_plan_takes_it_for(llm):
    model = model_of(llm)
    found, planned = model_flops(model, backward=False), forward_flops(model.config)
    assert found.token == planned["token"] and found.trained == planned["head"] and found.tile == planned["tile"]
    assert found.pairs == {None: planned["pair"]}


def test_adapters_can_be_left_out():
    model = model_of("qwen2")
    without = model_flops(model, backward=False)
    adapt(model, "vision_model", "language_model")
    assert model_flops(model, backward=False, adapters=False) == without
    assert model_flops(model, backward=False).token > without.token


def test_vision_layers_that_nobody_reads_do_not_count():
    whole, cut = (model_flops(model_of("qwen2", select_layer=layer), backward=False) for layer in (-1, -2))
    model = model_of("qwen2", select_layer=-2)
    model.vision_model.encoder.layers = model.vision_model.encoder.layers[:-1]
    assert cut.tile < whole.tile and as_counted(cut) == counted(model, backward=False)


@pytest.mark.parametrize("window", [1, 7, 40, 1000, None])
@pytest.mark.parametrize("length", DOCUMENTS)
def test_a_window_slides_over_long_documents(window, length):
    pairs = sum(min(position, window or length) for position in range(1, length + 1))
    # A token counts for half of the pair that it is with itself.
    assert ModelFlops(0, 0, 0, {window: 1.0}).attention([length]) == pytest.approx(
        pairs - min(length, window or length) / 2
    )


def test_layers_have_the_windows_of_their_configuration():
    phi3 = model_of("phi3_su")
    pair = model_flops(phi3, backward=False).pairs[None]
    phi3.language_model.config.sliding_window = 50
    phi3.language_model.config.layer_types = None
    assert model_flops(phi3, backward=False).pairs == {50: pair}
    pairs = model_flops(model_of("gpt_oss"), backward=False).pairs
    assert set(pairs) == {None, 128} and pairs[None] == pairs[128]
