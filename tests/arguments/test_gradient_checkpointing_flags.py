"""Flags of the towers that exclude each other; and that frozen layers of the language model make no graph."""

import pytest
import torch

from internvl.arguments.validate import validate_gradient_checkpointing
from internvl.model.activation_checkpointing import transformer_layers
from internvl.model.lora import unwrap_peft

REFUSED = {
    "no layer": (["--checkpoint_every", "0"], "--checkpoint_every 0: every n-th layer, n at least 1"),
    "nothing to choose from": (
        ["--grad_checkpoint", "False", "--checkpoint_every", "2", "--checkpoint_keep", "matmul"],
        "--checkpoint_every 2 --checkpoint_keep matmul does not act with --grad_checkpoint False",
    ),
    "transformers' flag": (
        ["--gradient_checkpointing", "True", "--checkpoint_every", "2"],
        "--checkpoint_every 2 and --gradient_checkpointing True: the latter recomputes all layers",
    ),
    "transformers' flag, one tower": (
        ["--gradient_checkpointing", "True", "--vit_grad_checkpoint", "False"],
        "--vit_grad_checkpoint False and --gradient_checkpointing True",
    ),
    "reentrant": (
        ["--gradient_checkpointing", "True", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}'],
        "reentrant checkpoints lose gradients of adapters",
    ),
    "kernels of compiled layers": (
        ["--compile", "True", "--checkpoint_keep", "attention"],
        "--compile True and --checkpoint_keep attention",
    ),
    "weights that are not there": (
        ["--compile", "True", "--deepspeed", "zero_stage3_config.json"],
        "--compile True under ZeRO-3: compiled code breaks",
    ),
    "layers that all differ": (["--compile", "True", "--drop_path_rate", "0.1"], "--compile True and --drop_path_rate"),
}


@pytest.mark.parametrize(("flags", "message"), REFUSED.values(), ids=REFUSED)
def test_flags_that_exclude_each_other(parse, flags, message):
    model_args, _, training_args = parse(*flags)
    with pytest.raises(ValueError, match=message):
        validate_gradient_checkpointing(model_args, training_args)


@pytest.mark.parametrize("flags", [[], ["--vit_grad_checkpoint", "True", "--grad_checkpoint", "False"]])
def test_what_does_not_exclude_each_other(parse, flags):
    model_args, _, training_args = parse("--gradient_checkpointing", "True", *flags)
    validate_gradient_checkpointing(model_args, training_args)


def test_layers_of_the_language_model_below_all_adapters_make_no_graph(build):
    """Although adapters' hook on the embeddings, which reentrant checkpoints need, would make one."""
    flags = "--freeze_backbone True --freeze_llm True --freeze_mlp True --use_llm_lora 2 --llm_lora_layers=-1:".split()
    model, graphs = build(*flags).train(), []
    for layer in transformer_layers(model.language_model):
        layer.register_forward_hook(lambda module, args, output: graphs.append(output.requires_grad))
    ids = torch.arange(1, 33)[None]
    loss = model(input_ids=ids, labels=ids, position_ids=torch.arange(32)[None], cu_seqlens=[0, 32]).loss
    assert graphs == [False, True]
    loss.backward()
    adapters = [p for n, p in unwrap_peft(model.language_model).named_parameters() if "lora_B" in n]
    assert adapters and all(p.grad.any() for p in adapters)
