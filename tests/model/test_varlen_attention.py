"""Varlen attention equals attention with a mask.

Packing is refused for LLMs that do not support it.
"""

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from helpers.flash_kernels import flash_kernels_on_cpu
from helpers.operator_counter import OperatorCounter
from helpers.synchronizations import SynchronizationCounter, fake_device
from helpers.tiny_models import ARCHITECTURES, RANDOM_IDS, build_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from internvl.model import varlen_attention as varlen
from internvl.model.activation_checkpointing import SAVED_OPS, apply_gradient_checkpointing, compile_layers
from internvl.model.internvl_chat.decoder import DocumentBoundaries, run_decoder
from internvl.model.internvl_chat.documents import compute_cu_seqlens
from internvl.model.varlen_attention import can_use_kernel, compute_varlen_attention, use_varlen_attention

CPU = torch.device("cpu")
# Two rows: documents of 5 + 7 tokens, and of 12, which is longer than the sliding windows of 8.
POSITION_IDS = torch.stack([torch.cat([torch.arange(5), torch.arange(7)]), torch.arange(12)])


def make_documents(*lengths: int, device: torch.device = CPU) -> DocumentBoundaries:
    return DocumentBoundaries(list(accumulate(lengths, initial=0)), device)


@pytest.mark.parametrize(
    "architecture", [*ARCHITECTURES, "InternLM2ForCausalLM", "LlamaForCausalLM", "Phi3ForCausalLM"]
)
def test_logits_and_generation_equal_attention_with_a_mask(architecture):
    model = build_tiny_model(architecture).eval()
    llm, mask = model.language_model, torch.ones_like(RANDOM_IDS).index_fill(1, torch.tensor([0, 1]), 0)

    def compute_outputs(**kwargs) -> tuple:
        with torch.no_grad():
            logits = model(input_ids=RANDOM_IDS, position_ids=POSITION_IDS, **kwargs).logits
            generated = llm.generate(input_ids=RANDOM_IDS, attention_mask=mask, max_new_tokens=6, do_sample=False)
        return logits, generated

    expected = compute_outputs()
    use_varlen_attention(llm, packed=True)
    assert llm.config._attn_implementation == "varlen_torch"
    for kwargs in ({}, {"cu_seqlens": [0, 5, 12, 24]}):
        actual = compute_outputs(**kwargs)
        torch.testing.assert_close(actual[0], expected[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(actual[1], expected[1]), "generation with padding on the left"


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "GptOssForCausalLM", "InternLM2ForCausalLM"])
def test_documents_do_not_affect_each_other_in_training(architecture):
    """Gradient checkpointing is enabled."""
    model = build_tiny_model(architecture)
    use_varlen_attention(model.language_model, packed=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    row, positions = RANDOM_IDS.view(1, -1), torch.cat([torch.arange(9), torch.arange(15)])[None]
    labels = row.masked_fill(torch.arange(24) < 9, -100)
    results = []
    for ids in (row, torch.cat([row[:, :9] + 1, row[:, 9:]], dim=1)):
        model.zero_grad()
        loss = model(input_ids=ids, position_ids=positions, labels=labels).loss
        loss.backward()
        weight = model.language_model.get_input_embeddings().weight
        assert not weight.grad[list(set(ids[0, :9].tolist()) - set(row[0, 9:].tolist()))].any()
        results.append((loss.detach(), weight.grad.clone()))
    torch.testing.assert_close(results[0], results[1])


def test_each_document_is_computed_without_a_mask(monkeypatch):
    """Nothing of size L x L exists for L tokens."""
    model, calls = build_tiny_model("Qwen3ForCausalLM").eval(), []
    use_varlen_attention(model.language_model, packed=True)
    kernel = F.scaled_dot_product_attention

    def record_call(query, key, value, mask, *args, **kwargs):
        calls.append((query.shape[2], mask))
        return kernel(query, key, value, mask, *args, **kwargs)

    monkeypatch.setattr(varlen.F, "scaled_dot_product_attention", record_call)
    with torch.no_grad():
        model(input_ids=RANDOM_IDS, position_ids=POSITION_IDS)
    assert [length for length, _ in calls] == [5, 7, 12] * 2 and all(mask is None for _, mask in calls)


@pytest.mark.parametrize("sinks", [False, True])
def test_sliding_window_in_blocks_equals_one_mask(sinks, monkeypatch):
    monkeypatch.setattr(varlen, "QUERY_BLOCK_SIZE", 16)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 70, 8, generator=generator) for heads in (4, 2, 2))
    options = {"s_aux": torch.randn(4, generator=generator)} if sinks else {"softcap": 5.0}
    output, _ = compute_varlen_attention(
        torch.nn.Identity(), query, key, value, None, sliding_window=9, documents=make_documents(70), **options
    )
    distance = torch.arange(70)[:, None] - torch.arange(70)
    score_options = {"scaling": None, "dropout": 0.0, "softcap": options.get("softcap"), "sinks": options.get("s_aux")}
    expected = varlen._compute_attention(query, key, value, (distance >= 0) & (distance < 9), **score_options)
    torch.testing.assert_close(output.transpose(1, 2), expected)


@pytest.mark.parametrize(
    ("architecture", "llm_fields"),
    [
        ("BloomForCausalLM", {"n_head": 4}),
        ("FalconForCausalLM", {"new_decoder_architecture": False}),
        ("MambaForCausalLM", {"state_size": 4}),
    ],
)
def test_packing_is_refused_for_llms_without_varlen_attention(architecture, llm_fields):
    model = build_tiny_model(architecture, **llm_fields)
    before = model.language_model.config._attn_implementation
    use_varlen_attention(model.language_model, packed=False)
    assert model.language_model.config._attn_implementation == before
    with pytest.raises(ValueError, match="--use_packed_ds True is not supported for LLMs of type"):
        use_varlen_attention(model.language_model, packed=True)


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Gemma2ForCausalLM", "InternLM2ForCausalLM"])
def test_packed_rows_do_not_synchronize(architecture):
    """Gemma 2 has soft caps and sliding windows."""
    llm = build_tiny_model(architecture).language_model
    use_varlen_attention(llm, packed=True)
    embeds = llm.get_input_embeddings()(RANDOM_IDS).detach()
    with SynchronizationCounter() as counter:
        run_decoder(llm, embeds, None, POSITION_IDS, [0, 5, 12, 24])
    assert not counter.counts


def test_the_backward_pass_of_the_loop_makes_no_row_for_each_document():
    created = []

    class SizeRecorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                created.append(output.numel())
            return output

    states = [torch.randn(1, 2, 64, 8, requires_grad=True) for _ in range(3)]
    output, _ = compute_varlen_attention(torch.nn.Identity(), *states, None, documents=make_documents(*[4] * 16))
    with SizeRecorder():
        output.sum().backward()
    num_rows = sum(size >= states[0].numel() for size in created)
    assert num_rows <= 12, "each of 16 documents has its own tensors of the size of the row"


# -- one kernel for all documents --------------------------------------------------------------------------------------

needs_kernel = pytest.mark.skipif(not varlen.VARLEN_ATTN_ARGUMENTS, reason="torch >= 2.10 has the kernel")


@pytest.fixture
def kernel_on_cpu(monkeypatch):
    """Use the kernel on the CPU too."""
    monkeypatch.setattr(varlen, "_has_flash_kernel", lambda device: True)
    with flash_kernels_on_cpu():
        yield


KERNEL = "torch_attn::_varlen_attn"


def compute_with_gradients(documents: DocumentBoundaries, heads=(4, 2), head_dim=64, dtype=torch.bfloat16, **kwargs):
    """Return the output, gradients of queries, keys and values, and the operators that ran."""
    generator = torch.Generator().manual_seed(0)
    length = sum(documents.lengths)
    states = [
        torch.randn(1, num_heads, length, head_dim, generator=generator).to(dtype).requires_grad_()
        for num_heads in (heads[0], heads[1], heads[1])
    ]
    with OperatorCounter() as counter:
        output, _ = compute_varlen_attention(torch.nn.Identity(), *states, None, documents=documents, **kwargs)
        (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    return [output, *(x.grad for x in states)], counter.calls


CALLS = {
    "plain": {},
    "one head of keys": {"heads": (4, 1)},
    "equal heads": {"heads": (3, 3)},
    "scaled": {"scaling": 0.1},
    "window": {"sliding_window": 9},
    "window of one token": {"sliding_window": 1},
    "window as long as the longest document": {"sliding_window": 31},
    "float16": {"dtype": torch.float16},
    **{f"head dim {head_dim}": {"head_dim": head_dim} for head_dim in (8, 80, 96, 128, 256)},
}


@needs_kernel
@pytest.mark.parametrize("call", CALLS)
def test_the_kernel_equals_the_loop(call, kernel_on_cpu, monkeypatch):
    documents = make_documents(9, 31, 1, 30)
    actual, calls = compute_with_gradients(documents, **CALLS[call])
    supports_options = "window_size" in varlen.VARLEN_ATTN_ARGUMENTS  # torch >= 2.11
    is_supported = supports_options or call not in ("scaled", "window", "window of one token")
    assert (calls[KERNEL], calls[f"{KERNEL}_backward"]) == (is_supported, is_supported)
    monkeypatch.setattr(varlen, "_has_flash_kernel", lambda device: False)
    expected, calls = compute_with_gradients(documents, **CALLS[call])
    assert not calls[KERNEL]
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=2e-2 * max(1.0, b.abs().max().item()), rtol=2e-2)


@needs_kernel
def test_the_kernel_has_the_arguments_of_torch_2_10(kernel_on_cpu, monkeypatch):
    """It has neither a scale nor a window: such calls use the loop."""
    newest = varlen.varlen_attn

    def varlen_attn_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        assert is_causal
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        return newest(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=(-1, 0))

    documents = make_documents(9, 31, 30)
    calls = [{}, {"scaling": 64**-0.5}, {"sliding_window": 31}, {"scaling": 0.1}, {"sliding_window": 30}]
    expected = [compute_with_gradients(documents, **call)[0] for call in calls]
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn_2_10)
    monkeypatch.setattr(varlen, "VARLEN_ATTN_ARGUMENTS", {"is_causal", "return_aux"})
    results = [compute_with_gradients(documents, **call) for call in calls]
    assert [counts[KERNEL] for _, counts in results] == [1, 1, 1, 0, 0]
    for (actual, _), tensors in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, tensors, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize(
    "call",
    [
        {"dtype": torch.float32},
        {"head_dim": 12},
        {"head_dim": 264},
        {"dropout": 0.5},
        {"softcap": 5.0},
        {"s_aux": torch.zeros(4)},
    ],
    ids=str,
)
def test_other_calls_use_the_loop(call, kernel_on_cpu):
    assert not compute_with_gradients(make_documents(9, 31), **call)[1][KERNEL]


def test_only_gpus_from_ampere_on_have_the_kernel(monkeypatch):
    query = torch.zeros(1, 4, 8, 64, dtype=torch.float16)
    assert not can_use_kernel(query, query, None, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)):
        varlen._has_flash_kernel.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert varlen._has_flash_kernel(torch.device("cuda", 0)) == expected
    varlen._has_flash_kernel.cache_clear()
    monkeypatch.setattr(varlen, "VARLEN_ATTN_ARGUMENTS", frozenset())  # torch < 2.10
    monkeypatch.setattr(varlen, "_has_flash_kernel", lambda device: True)
    assert not can_use_kernel(query, query, None, None)


@needs_kernel
def test_the_kernel_computes_in_the_dtype_of_autocast(kernel_on_cpu):
    """The norm of a float32 weight makes queries of float32, while values are those of a bfloat16 product."""
    states = [torch.randn(1, 4, 40, 64, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.bfloat16)]
    with torch.autocast("cpu", torch.bfloat16), OperatorCounter() as counter:
        output, _ = compute_varlen_attention(torch.nn.Identity(), *states, None, documents=make_documents(9, 31))
    assert output.dtype == torch.bfloat16 and counter.calls[KERNEL] == 1


@needs_kernel
@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "InternLM2ForCausalLM", "MistralForCausalLM"])
def test_documents_stay_apart_in_the_kernel(architecture, kernel_on_cpu):
    """A row of documents gives the states of each document alone, and another document gets no gradient."""
    torch.manual_seed(0)
    llm = build_tiny_model(architecture).bfloat16().eval().language_model
    use_varlen_attention(llm, packed=True)
    lengths = (9, 5, 10)
    row = torch.randn(1, 24, llm.config.hidden_size).bfloat16().requires_grad_()
    positions = [torch.arange(length) for length in lengths]
    with OperatorCounter() as counter:
        states = run_decoder(llm, row, None, torch.cat(positions)[None]).last_hidden_state
    assert counter.calls[KERNEL] == llm.config.num_hidden_layers
    for part, alone, position_ids in zip(states.split(lengths, 1), row.split(lengths, 1), positions, strict=True):
        expected = run_decoder(llm, alone, None, position_ids[None]).last_hidden_state
        torch.testing.assert_close(part, expected, atol=2e-2, rtol=2e-2)
    states[:, 9:14].float().square().sum().backward()
    assert [bool(part.any()) for part in row.grad.split(lengths, 1)] == [False, True, False]


@needs_kernel
@pytest.mark.parametrize(("keep", "num_calls"), [("none", 4), ("attention", 2), ("matmul", 2)])
def test_the_kernel_is_not_called_again_in_the_recomputation(keep, num_calls, kernel_on_cpu):
    """Two layers are recomputed."""
    assert set(SAVED_OPS) == {"none", "attention", "matmul"}
    torch.manual_seed(0)
    model = build_tiny_model("Qwen3ForCausalLM").bfloat16().train()
    use_varlen_attention(model.language_model, packed=True)
    batch = {"input_ids": RANDOM_IDS, "labels": RANDOM_IDS, "position_ids": POSITION_IDS}
    results = []
    for ratio in (0, 1):
        apply_gradient_checkpointing(model.language_model, ratio, keep)
        model.zero_grad()
        with OperatorCounter() as counter:
            model(**batch).loss.backward()
        results.append({name: p.grad for name, p in model.language_model.named_parameters()})
    assert (counter.calls[KERNEL], counter.calls[f"{KERNEL}_backward"]) == (num_calls, 2)
    torch.testing.assert_close(results[1], results[0])


@needs_kernel
@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "InternLM2ForCausalLM"])
def test_the_number_of_operators_does_not_depend_on_the_number_of_documents(architecture):
    """The model and the row are on a fake GPU."""
    llm = build_tiny_model(architecture).bfloat16().language_model
    use_varlen_attention(llm, packed=True)
    counts = []
    with fake_device(llm, "cuda"), torch.no_grad():
        embeds = torch.empty(1, 128, llm.config.hidden_size, dtype=torch.bfloat16, device="cuda")
        positions = torch.empty(1, 128, dtype=torch.int64, device="cuda")
        for num_documents in (1, 9, 64):
            with OperatorCounter() as counter:
                run_decoder(llm, embeds, None, positions, [*range(num_documents), 128])
            counts.append(counter.calls)
    assert counts[0][KERNEL] == llm.config.num_hidden_layers
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_kernel)])
def test_compiled_layers_are_not_compiled_again_for_other_documents(dtype, kernel_on_cpu):
    """float32 is computed by the loop, bfloat16 by the kernel."""
    llm = build_tiny_model("Qwen3ForCausalLM").to(dtype).eval().language_model
    use_varlen_attention(llm, packed=True)
    original = build_tiny_model("Qwen3ForCausalLM").to(dtype).eval().language_model
    original.load_state_dict(llm.state_dict())
    use_varlen_attention(original, packed=True)
    compile_layers(llm)
    torch._dynamo.reset()
    for i, lengths in enumerate([(9, 15), (11, 20, 5), (30,), (7, 3, 1, 1, 29)]):
        embeds = torch.randn(1, sum(lengths), llm.config.hidden_size, dtype=dtype)
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=i > 0):
            actual, expected = (run_decoder(m, embeds, None, positions).last_hidden_state for m in (llm, original))
        tolerance = 1e-5 if dtype == torch.float32 else 1e-1
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# -- boundaries --------------------------------------------------------------------------------------------------------


def test_cu_seqlens_of_position_ids():
    assert compute_cu_seqlens(POSITION_IDS) == [0, 5, 12, 24]
    assert compute_cu_seqlens(torch.tensor([[3, 4, 0, 1]])) == [0, 2, 4], "a row may begin inside a document"
