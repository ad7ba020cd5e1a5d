"""How the towers of a model run in training: which activations are computed again, and whether layers are compiled.

Called by `build.py` when it is settled what trains; `model/recompute.py` and `model/compiled.py` do the work.
"""

import json

from internvl.model.compiled import compile_layers
from internvl.model.internvl_chat import InternVLChatModel
from internvl.model.lora import plain
from internvl.model.recompute import recompute
from internvl.train.arguments import ModelArguments, TrainingArguments


def set_up_towers(model: InternVLChatModel, args: ModelArguments) -> None:
    """Checkpoints and compiles the layers of both towers as the flags say."""
    vision = args.grad_checkpoint if args.vit_grad_checkpoint is None else args.vit_grad_checkpoint
    for tower, on in ((model.vision_model, vision), (model.language_model, args.grad_checkpoint)):
        recompute(tower, args.checkpoint_every if on else 0, args.checkpoint_keep)
        if args.compile:
            compile_layers(tower)
    # Adapters' hook on the embeddings serves reentrant checkpoints, and is a graph through frozen layers below them.
    plain(model.language_model).disable_input_require_grads()


def check_towers(args: ModelArguments, training_args: TrainingArguments) -> None:
    """Refuses, before anything is loaded, flags of the towers that exclude each other.

    Raises:
        ValueError: one sentence with the flags and their values.
    """
    if args.checkpoint_every < 1:
        raise ValueError(f"--checkpoint_every {args.checkpoint_every:g}: every n-th layer, n at least 1.")
    chosen = [] if args.checkpoint_every == 1 else [f"--checkpoint_every {args.checkpoint_every:g}"]
    chosen += [] if args.checkpoint_keep == "none" else [f"--checkpoint_keep {args.checkpoint_keep}"]
    if chosen and not (args.grad_checkpoint or args.vit_grad_checkpoint):
        raise ValueError(f"{' '.join(chosen)} does not act with --grad_checkpoint False.")
    if args.vit_grad_checkpoint is False:
        chosen.append("--vit_grad_checkpoint False")
    if training_args.activation_checkpointing and chosen:
        raise ValueError(
            f"{' '.join(chosen)} and --gradient_checkpointing True: the latter recomputes all layers of both towers; "
            "leave it out, --grad_checkpoint True is enough."
        )
    kwargs = training_args.activation_checkpointing_kwargs or {}
    if (json.loads(kwargs) if isinstance(kwargs, str) else kwargs).get("use_reentrant"):
        raise ValueError(f"--gradient_checkpointing_kwargs {kwargs}: reentrant checkpoints lose gradients of adapters.")
    if args.compile and args.checkpoint_keep != "none":
        raise ValueError(
            f"--compile True and --checkpoint_keep {args.checkpoint_keep}: the kernels of compiled layers cannot be "
            "told apart from outside; --checkpoint_every goes with both."
        )
    if args.compile and args.drop_path_rate:
        raise ValueError(
            f"--compile True and --drop_path_rate {args.drop_path_rate}: every vision layer drops at a rate of its own "
            "and would be compiled anew."
        )
    if args.compile and (training_args.deepspeed or {}).get("zero_optimization", {}).get("stage") == 3:
        raise ValueError(
            "--compile True under ZeRO-3: compiled code breaks where DeepSpeed gathers weights, before every linear "
            "layer, so that there is nothing to gain; use ZeRO-2, or leave it out."
        )
