"""Attention kernels of a GPU equal torch's attention with one document at a time."""

from itertools import accumulate

import pytest
import torch
from helpers.model_cases import ModelCase

from internvl.model import varlen_attention as varlen
from internvl.model.internvl_chat.decoder import FLASH_VERSIONS, DocumentBoundaries, is_flash_available, run_decoder
from internvl.model.internvl_chat.modeling_intern_vit import compute_attention, has_flash_attn

pytestmark = pytest.mark.gpu

needs_kernel = pytest.mark.skipif(not varlen.VARLEN_ATTN_ARGUMENTS, reason="torch >= 2.10 has the kernel")
needs_flash_attn = pytest.mark.skipif(not has_flash_attn, reason="flash-attn is not installed")
LENGTHS = (190, 1, 517, 64, 300)


def compute_with_gradients(states, **kwargs) -> list[torch.Tensor]:
    documents = DocumentBoundaries(list(accumulate(LENGTHS, initial=0)), states[0].device)
    states = [x.detach().requires_grad_() for x in states]
    output, _ = varlen.compute_varlen_attention(torch.nn.Identity(), *states, None, documents=documents, **kwargs)
    (output * torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)).sum().backward()
    return [output.detach(), *(x.grad for x in states)]


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_the_kernel_is_as_exact_as_the_loop(head_dim, heads, window, dtype, monkeypatch):
    """Both are compared with the loop in float32. The error may be twice that of the loop in the same dtype."""
    generator = torch.Generator("cuda").manual_seed(0)
    states = [
        torch.randn(1, num_heads, sum(LENGTHS), head_dim, generator=generator, device="cuda").to(dtype)
        for num_heads in (heads[0], heads[1], heads[1])
    ]
    if window is None or "window_size" in varlen.VARLEN_ATTN_ARGUMENTS:
        assert varlen.can_use_kernel(states[0], states[2], None, window)
    actual = compute_with_gradients(states, sliding_window=window)
    monkeypatch.setattr(varlen, "_has_flash_kernel", lambda device: False)
    loop = compute_with_gradients(states, sliding_window=window)
    expected = compute_with_gradients([x.float() for x in states], sliding_window=window)
    for ours, same_dtype, exact in zip(actual, loop, expected, strict=True):
        assert ours.dtype == dtype
        tolerance = 2 * (same_dtype - exact).abs().max() + 1e-3 * exact.abs().max()
        assert (ours - exact).abs().max() <= tolerance


@needs_kernel
@pytest.mark.parametrize("name", ["qwen2", "internlm2", "llama", "phi3"])
def test_packed_rows_do_not_synchronize(goldens, name):
    """Neither the first row of its lengths nor a later one waits for the GPU, forward or backward."""
    llm = ModelCase(goldens / "models" / name).model(dtype=torch.bfloat16, use_flash_attn=False).cuda().language_model
    varlen.use_varlen_attention(llm, packed=True)
    for lengths in ((5, 7), (12,), (3, 1, 8)):
        embeds = torch.randn(1, 12, llm.config.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        positions = torch.cat([torch.arange(length) for length in lengths])[None].cuda()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            cu_seqlens = list(accumulate(lengths, initial=0))
            run_decoder(llm, embeds, None, positions, cu_seqlens).last_hidden_state.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert embeds.grad is not None and embeds.grad.isfinite().all()


@needs_flash_attn
def test_vision_attention_equals_torchs():
    q, k, v = torch.randn(3, 2, 65, 4, 64, device="cuda", dtype=torch.bfloat16).unbind()
    flash, sdpa = compute_attention(q, k, v), compute_attention(q, k, v, use_flash=False)
    torch.testing.assert_close(flash, sdpa, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["qwen2", "internlm2", "llama", "phi3"])
@pytest.mark.parametrize("implementation", ["varlen_torch", *FLASH_VERSIONS])
@torch.no_grad()
def test_packed_rows_equal_torchs_attention(goldens, name, implementation):
    if implementation in FLASH_VERSIONS and not is_flash_available(implementation):
        pytest.skip(f"{FLASH_VERSIONS[implementation].package} is not available")
    case = ModelCase(goldens / "models" / name)
    batch = {k: v.cuda() for k, v in case.packed_batch.items()}
    text = {k: batch[k] for k in ("input_ids", "position_ids", "labels")}
    two_rows = {k: torch.cat([v, v]) for k, v in text.items()}  # varlen attention gets them as one row
    images = {k: torch.cat([batch[k], batch[k]]) for k in ("pixel_values", "image_flags")}
    results = []
    for requested in (implementation, "sdpa"):
        is_torch = requested == "varlen_torch"
        model = case.model(dtype=torch.bfloat16, attn_implementation="sdpa" if is_torch else requested).cuda().eval()
        if is_torch:
            varlen.use_varlen_attention(model.language_model, packed=True)
        assert model.language_model.config._attn_implementation == requested
        results.append(model(**two_rows, **images, use_cache=False))
    torch.testing.assert_close(results[0].loss, results[1].loss, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(results[0].logits[0], results[0].logits[1], atol=2e-2, rtol=2e-2)
