"""Estimated memory equals what torch's allocators count; states by ZeRO stage."""

import json
from itertools import accumulate

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from internvl.model.activation_checkpointing import apply_gradient_checkpointing
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.internvl_chat.configuration_internvl_chat import count_image_tokens
from internvl.model.varlen_attention import use_varlen_attention
from internvl.planning.memory_estimate import (
    CONTEXT_BYTES,
    MemoryEstimate,
    MemoryTracker,
    Row,
    estimate_memory,
    measure_step,
    trace_step,
    use_fused_kernels,
)
from internvl.tools.benchmark.sizes import (
    INTERNLM_1_8B,
    MODEL_SIZES,
    build_config,
    get_image_token_id,
    set_default_dtype,
)

ROW = Row(tokens=256, tiles=6)
QWEN = MODEL_SIZES["test"]
INTERNLM = QWEN._replace(llm=INTERNLM_1_8B | {key: QWEN.llm[key] for key in QWEN.llm.keys() & INTERNLM_1_8B.keys()})
INTERNLM = INTERNLM._replace(llm=INTERNLM.llm | {"architectures": ["InternLM2ForCausalLM"]})


def build_model(size, device: str, ratio: float, dtype=torch.float32) -> InternVLChatModel:
    """Build a model with LoRA in vision encoder and LLM, prepared for packed rows."""
    with torch.device(device), set_default_dtype(dtype):
        model = InternVLChatModel(build_config(size))
        model.requires_grad_(False)
        model.wrap_backbone_lora(4, 8, 0.05)
        model.wrap_llm_lora(4, 8, 0.05)
        model = model.to(dtype)
    use_varlen_attention(model.language_model, packed=True)
    model.config.use_cache = model.language_model.config.use_cache = False
    for part in (model.vision_model, model.language_model):
        apply_gradient_checkpointing(part, ratio)
    return model.train()


def build_batch(model: InternVLChatModel, device: str = "cpu") -> dict:
    """Build a row with `ROW.tiles` tiles, whose other tokens are loss tokens."""
    num_image_tokens = ROW.tiles * count_image_tokens(model.config)
    model.img_context_token_id = get_image_token_id(model.config)
    ids = torch.zeros(1, ROW.tokens, dtype=torch.long)
    ids[:, :num_image_tokens] = model.img_context_token_id
    labels = ids.clone()
    labels[:, : num_image_tokens + 1] = -100
    size = model.config.vision_config.image_size
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(ROW.tokens)[None]}
    batch["pixel_values"] = torch.zeros(ROW.tiles, 3, size, size, dtype=torch.uint8)
    batch["loss_indices"] = torch.arange(num_image_tokens, ROW.tokens - 1)
    batch["image_token_indices"] = torch.arange(num_image_tokens)
    return {name: tensor.to(device) for name, tensor in batch.items()} | {"cu_seqlens": [0, ROW.tokens]}


def count_allocator_peak(model: nn.Module, batch: dict, path) -> int:
    """Return the most bytes that torch's CPU allocator has given out during a forward and backward pass.

    As in `measure_step`, gradients of parameters are freed.
    """
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(**batch).loss.backward()
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    return max(accumulate(event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])))


# With all layers recomputed the peak is in a layer's backward pass: the CPU's attention kernel has a workspace inside.
@pytest.mark.parametrize(("ratio", "tolerance"), [(0, 0.03), (0.5, 0.03), (1, 0.12)])
def test_tracker_counts_what_the_allocator_gives_out(ratio, tolerance, tmp_path):
    model = build_model(QWEN, "cpu", ratio)
    use_fused_kernels(model)
    batch = build_batch(model)
    model(**batch).loss.backward()  # what is created once
    model.zero_grad()
    measured = measure_step(model, batch)
    allocated = count_allocator_peak(model, batch, tmp_path / "trace.json")
    assert measured.peak == pytest.approx(allocated, rel=tolerance)
    assert 0 < measured.kept <= measured.peak


def test_fake_tensors_need_what_real_ones_do():
    peaks = []
    for ratio in (0, 1):
        real = build_model(QWEN, "cpu", ratio)
        use_fused_kernels(real)
        batch = build_batch(real)
        measured = measure_step(real, batch)
        inputs = sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))
        traced = trace_step(build_model(QWEN, "meta", ratio), ROW)
        assert traced.peak == pytest.approx(measured.peak + inputs, rel=0.01)
        assert traced.kept == pytest.approx(measured.kept + inputs, rel=0.01)
        peaks.append(traced.peak)
    assert peaks[0] > 1.5 * peaks[1], "recomputation saves memory"


@pytest.mark.parametrize("size", [QWEN, INTERNLM], ids=["qwen2", "internlm2"])
def test_activations_grow_with_rows_and_shrink_with_the_dtype(size):
    one, two = (trace_step(build_model(size, "meta", 0), ROW, num_rows).peak for num_rows in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.2)
    assert trace_step(build_model(size, "meta", 0, torch.bfloat16), ROW).peak < 0.8 * one  # the loss stays in fp32


def test_tracker_frees_what_the_graph_frees():
    x = torch.ones(1024, requires_grad=True)
    with MemoryTracker() as tracker:
        tracker.ignore([x])
        y = (x * 2).exp()
        assert tracker.live == 2 * 4096 - 4096  # exp saves its result; that of the product is gone
        y.view(2, 512).sum().backward()
        del y
    assert tracker.live == 4096, "the gradient of x"


LINEAR = 64 * 64  # elements


@pytest.fixture
def two_layers() -> nn.Module:
    model = nn.ModuleDict({"frozen": nn.Linear(64, 64, bias=False), "trained": nn.Linear(64, 64, bias=False)})
    model["frozen"].requires_grad_(False)
    return model.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("zero", "gpus", "gradients", "optimizer", "buffers"),
    [
        (None, 1, 2, 8, 0),
        (None, 4, 2, 8, 2),
        ({"stage": 1, "overlap_comm": True}, 4, 2, 16 / 4, 4),
        ({"stage": 2, "overlap_comm": True, "reduce_bucket_size": LINEAR / 2}, 4, 2 / 4, 16 / 4, 2),
        ({"stage": 2}, 1, 2, 16, 2),
    ],
    ids=["alone", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-2, one GPU"],
)
def test_states_by_zero_stage(two_layers, zero, gpus, gradients, optimizer, buffers):
    """Expected: bytes per trainable element of a rank."""
    estimate = estimate_memory(two_layers, 1000, zero, gpus)
    bytes_of_states = [int(LINEAR * factor) for factor in (gradients, optimizer)]
    assert estimate == MemoryEstimate(4 * LINEAR, *bytes_of_states, 1000, LINEAR * buffers, CONTEXT_BYTES)
    assert estimate.total == 4 * LINEAR + sum(bytes_of_states) + 1000 + LINEAR * buffers + CONTEXT_BYTES


def test_zero3_divides_large_weights(two_layers):
    zero = {"stage": 3, "stage3_param_persistence_threshold": LINEAR}
    kept = estimate_memory(two_layers, 0, zero, 4)
    assert kept.weights == 4 * LINEAR / 4 + 4 * LINEAR, "small weights stay on every rank"
    zero |= {"stage3_param_persistence_threshold": 10, "stage3_max_live_parameters": 1, "reduce_bucket_size": 0}
    divided = estimate_memory(two_layers, 0, zero | {"stage3_prefetch_bucket_size": 1}, 4)
    assert divided.weights == 4 * LINEAR / 4
    assert divided.buffers == 2 * 2 * LINEAR, "the largest weight, gathered and in flight"


def test_the_host_keeps_what_is_offloaded(two_layers):
    zero = {"stage": 3, "stage3_param_persistence_threshold": 10}
    offload = {"device": "cpu"}
    kept = estimate_memory(two_layers, 0, zero | {"offload_optimizer": {"device": "none"}}, 4)
    assert (kept.weights, kept.optimizer) == (LINEAR, 16 * LINEAR / 4)
    moved = estimate_memory(two_layers, 0, zero | dict.fromkeys(["offload_optimizer", "offload_param"], offload), 4)
    assert (moved.weights, moved.optimizer) == (0, 0) and moved.buffers == kept.buffers


def test_quantized_weights():
    model = nn.ModuleDict({"language_model": nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64))})
    model.to(torch.bfloat16).requires_grad_(False)
    model["language_model"][1].requires_grad_(True)
    model.language_model = model["language_model"]
    plain, quantized = (estimate_memory(model, 0, None, 1, quantized_parts=parts) for parts in ((), ["language_model"]))
    assert plain.weights - quantized.weights == 2 * LINEAR - 2113  # half a byte, and scales
    assert quantized.activations == 2 * LINEAR, "one weight at a time is dequantized"


@pytest.mark.gpu
@pytest.mark.parametrize("size", [QWEN, INTERNLM], ids=["qwen2", "internlm2"])
@pytest.mark.parametrize("ratio", [0, 1])
def test_estimate_equals_the_peak_of_a_gpu(size, ratio):
    """Of a wider model: workspaces of kernels, which the estimate lacks, have a fixed size."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    size = size._replace(vision=size.vision | shape, llm=size.llm | shape | {"num_key_value_heads": 2})
    model = build_model(size, "cuda", ratio, torch.bfloat16)
    batch = build_batch(model, "cuda")
    model(**batch).loss.backward()
    model.zero_grad()
    inputs = sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(**batch).loss.backward()
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    peak = torch.cuda.max_memory_allocated() - before
    traced = trace_step(build_model(size, "meta", ratio, torch.bfloat16), ROW)
    assert traced.peak - inputs == pytest.approx(peak, rel=0.1, abs=gradients)
