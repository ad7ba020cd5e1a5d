"""One adapter from those of all parts: the product of its factors, scaled, stays the same."""

import pytest
import torch
from peft import LoraConfig

from internvl.model.united_adapter import unite_adapters


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaled_products_stay_the_same(use_rslora):
    def factors(layer: str, rank: int) -> dict[str, torch.Tensor]:
        return {f"{layer}.lora_A.weight": torch.randn(rank, 5), f"{layer}.lora_B.weight": torch.randn(6, rank)}

    adapters = {  # the rank of layer 1 is an exception of its part
        "language_model": (LoraConfig(r=4, lora_alpha=6, use_rslora=use_rslora), factors("0.up", 4)),
        "vision_model": (
            LoraConfig(r=2, lora_alpha=8, use_rslora=use_rslora, rank_pattern={"1.fc1": 3}),
            factors("0.fc1", 2) | factors("1.fc1", 3),
        ),
    }
    settings, tensors = unite_adapters(adapters, lambda weights: weights.items(), lambda names: set())
    assert settings.r == 4 and not settings.use_rslora and not settings.rank_pattern
    for part, (original, own) in adapters.items():
        for name in [name for name in own if "lora_A" in name]:
            a, b = own[name], own[name.replace("lora_A", "lora_B")]
            scale = original.lora_alpha / (len(a) ** 0.5 if use_rslora else len(a))
            united_a = tensors[f"base_model.model.{part}.{name}"]
            united_b = tensors[f"base_model.model.{part}.{name.replace('lora_A', 'lora_B')}"]
            assert united_a.shape == (4, 5) and united_b.shape == (6, 4)
            torch.testing.assert_close(settings.lora_alpha / 4 * united_b @ united_a, scale * b @ a)
