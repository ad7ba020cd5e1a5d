"""Flags of gradient checkpointing and compilation that exclude each other."""

import pytest
import torch

from internvl.arguments.validate import validate_arguments
from internvl.model.activation_checkpointing import find_transformer_layers
from internvl.model.lora import unwrap_peft

REFUSED = {
    "ratio 0": (
        ["--grad_checkpoint_ratio", "0"],
        r"--grad_checkpoint_ratio 0.0 is invalid: expected a share .* \(0, 1\]",
    ),
    "ratio above 1": (["--grad_checkpoint_ratio", "1.25"], "--grad_checkpoint_ratio 1.25 is invalid"),
    "no gradient checkpointing": (
        ["--grad_checkpoint", "False", "--grad_checkpoint_ratio", "0.5", "--grad_checkpoint_keep", "matmul"],
        "--grad_checkpoint_ratio 0.5 --grad_checkpoint_keep matmul is not supported with --grad_checkpoint False: "
        ".* add --grad_checkpoint_ratio 1 if a recipe sets another",
    ),
    "transformers' flag": (
        ["--gradient_checkpointing", "True", "--grad_checkpoint_ratio", "0.5"],
        "--grad_checkpoint_ratio 0.5 is not supported with --gradient_checkpointing True, which recomputes all layers",
    ),
    "transformers' flag, vision encoder excluded": (
        ["--gradient_checkpointing", "True", "--vit_grad_checkpoint", "False"],
        "--vit_grad_checkpoint False is not supported with --gradient_checkpointing True",
    ),
    "reentrant": (
        ["--gradient_checkpointing", "True", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}'],
        "reentrant checkpoints lose gradients of adapters",
    ),
    "kernels of compiled layers": (
        ["--compile", "True", "--grad_checkpoint_keep", "attention"],
        "--compile True is not supported with --grad_checkpoint_keep attention",
    ),
    "compiled layers under ZeRO-3": (
        ["--compile", "True", "--deepspeed", "zero_stage3_config.json"],
        "--compile True is not supported under ZeRO-3: DeepSpeed gathers weights",
    ),
    "compiled layers with different drop rates": (
        ["--compile", "True", "--drop_path_rate", "0.1"],
        "--compile True is not supported with --drop_path_rate 0.1",
    ),
}


@pytest.mark.parametrize(("flags", "message"), REFUSED.values(), ids=REFUSED)
def test_flags_that_exclude_each_other_are_refused(parse_flags, flags, message):
    with pytest.raises(ValueError, match=message):
        validate_arguments(*parse_flags(*flags))


@pytest.mark.parametrize("flags", [[], ["--vit_grad_checkpoint", "True", "--grad_checkpoint", "False"]])
def test_compatible_flags_are_accepted(parse_flags, flags):
    validate_arguments(*parse_flags("--gradient_checkpointing", "True", *flags))


def test_llm_layers_below_all_adapters_build_no_graph(build_from_flags):
    """PEFT's hook on the embeddings, which reentrant checkpoints need, would build one."""
    flags = "--freeze_backbone True --freeze_llm True --freeze_mlp True --use_llm_lora 2 --llm_lora_layers=-1:".split()
    model, has_graph = build_from_flags(*flags).train(), []
    for layer in find_transformer_layers(model.language_model):
        layer.register_forward_hook(lambda module, args, output: has_graph.append(output.requires_grad))
    ids = torch.arange(1, 33)[None]
    loss = model(input_ids=ids, labels=ids, position_ids=torch.arange(32)[None], cu_seqlens=[0, 32]).loss
    assert has_graph == [False, True]
    loss.backward()
    adapters = [p for n, p in unwrap_peft(model.language_model).named_parameters() if "lora_B" in n]
    assert adapters and all(p.grad.any() for p in adapters)
