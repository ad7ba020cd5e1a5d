"""flash-attn equals torch's attention, in the vision encoder and in packed rows."""

import pytest
import torch
from helpers.model_cases import ModelCase

from internvl.model.internvl_chat.modeling_intern_vit import compute_attention, has_flash_attn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_flash_attn, reason="flash-attn is not installed"),
]


def test_vision_attention_equals_torchs():
    q, k, v = torch.randn(3, 2, 65, 4, 64, device="cuda", dtype=torch.bfloat16).unbind()
    flash, sdpa = compute_attention(q, k, v), compute_attention(q, k, v, use_flash=False)
    torch.testing.assert_close(flash, sdpa, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["qwen2", "internlm2", "llama", "phi3"])
@torch.no_grad()
def test_packed_rows_equal_torchs_attention(goldens, name):
    case = ModelCase(goldens / "models" / name)
    batch = {k: v.cuda() for k, v in case.packed_batch.items()}
    text = {k: batch[k] for k in ("input_ids", "position_ids", "labels")}
    two_rows = {k: torch.cat([v, v]) for k, v in text.items()}  # flash-attn gets them as one row
    images = {k: torch.cat([batch[k], batch[k]]) for k in ("pixel_values", "image_flags")}
    results = []
    for use_flash_attn in (True, False):
        model = case.model(dtype=torch.bfloat16, use_flash_attn=use_flash_attn).cuda()
        assert (model.language_model.config._attn_implementation == "flash_attention_2") == use_flash_attn
        results.append(model(**two_rows, **images))
    torch.testing.assert_close(results[0].loss, results[1].loss, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(results[0].logits[0], results[0].logits[1], atol=2e-2, rtol=2e-2)
