"""flash-attn and torch's own attention give the same numbers, in the vision encoder and in packed rows."""

import pytest
import torch
from helpers.model_cases import Case

from internvl.model.internvl_chat.modeling_intern_vit import attention, has_flash_attn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_flash_attn, reason="flash-attn is not installed"),
]


def test_vision_attention():
    q, k, v = torch.randn(3, 2, 65, 4, 64, device="cuda", dtype=torch.bfloat16).unbind()
    flash, plain = attention(q, k, v), attention(q, k, v, use_flash=False)
    torch.testing.assert_close(flash, plain, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["qwen2", "internlm2", "llama", "phi3"])
@torch.no_grad()
def test_packed_rows(goldens, name):
    case = Case(goldens / "models" / name)
    batch = {k: v.cuda() for k, v in case.packed_batch.items()}
    text = {k: batch[k] for k in ("input_ids", "position_ids", "labels")}
    twice = {k: torch.cat([v, v]) for k, v in text.items()}  # two rows: flash-attn gets them as one
    images = {k: torch.cat([batch[k], batch[k]]) for k in ("pixel_values", "image_flags")}
    results = []
    for use_flash_attn in (True, False):
        model = case.model(dtype=torch.bfloat16, use_flash_attn=use_flash_attn).cuda()
        assert (model.language_model.config._attn_implementation == "flash_attention_2") == use_flash_attn
        results.append(model(**twice, **images))
    torch.testing.assert_close(results[0].loss, results[1].loss, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(results[0].logits[0], results[0].logits[1], atol=2e-2, rtol=2e-2)
