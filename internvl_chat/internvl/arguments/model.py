"""Flags of the model: weights, trainable parts, gradient checkpointing, kernels."""

from dataclasses import dataclass
from typing import Literal

from internvl.arguments.flags import option
from internvl.arguments.per_part import LoraArguments


@dataclass
class ModelArguments(LoraArguments):
    """Flags on loading the model and choosing its trainable parameters."""

    model_name_or_path: str | None = option(None, "chat checkpoint to start from; overrides the two paths below")
    vision_path: str | None = option(None, "vision encoder checkpoint, to compose a chat model from")
    llm_path: str | None = option(None, "LLM checkpoint, to compose a chat model from")
    mlp_path: str | None = option(None, "projector state dict, loaded after the checkpoints above")
    allow_pickle: bool = option(False, "also read pickled weights (*.bin); only tensors are read from them")
    freeze_llm: bool = option(False, "freeze the LLM")
    freeze_backbone: bool = option(False, "freeze the vision encoder")
    freeze_mlp: bool = option(False, "freeze the projector")
    unfreeze_vit_layers: int = option(
        0, "unfreeze vision encoder layers [n:]; -8: the last eight layers; 0: unfreeze none"
    )
    vision_select_layer: int = option(-1, "index of the vision encoder's hidden state that the projector reads")
    use_backbone_lora: int = option(0, "LoRA rank in the vision encoder; 0: no LoRA")
    use_llm_lora: int = option(0, "LoRA rank in the LLM; 0: no LoRA")
    use_mlp_lora: int = option(0, "LoRA rank in the projector; 0: no LoRA")
    quantize_backbone: bool = option(False, "QLoRA: 4-bit (NF4) base weights in the vision encoder; needs bitsandbytes")
    quantize_llm: bool = option(False, "QLoRA: 4-bit (NF4) base weights in the LLM; needs bitsandbytes")
    merge_before_training: bool = option(False, "merge the checkpoint's adapters before new adapters are added")
    unfreeze_lm_head: bool = option(False, "unfreeze the LM head of a frozen LLM")
    train_new_tokens: bool = option(
        False,
        "with --use_llm_lora, train the rows of tokens that were added to the tokenizer, in embeddings and LM head",
    )
    grad_checkpoint: bool = option(True, "gradient checkpointing in the vision encoder and the LLM")
    vit_grad_checkpoint: bool | None = option(
        None, "gradient checkpointing in the vision encoder; default: --grad_checkpoint"
    )
    grad_checkpoint_ratio: float = option(
        1.0, "share of layers whose activations are recomputed; 1: all, 0.8: four of five, 0.5: every second"
    )
    grad_checkpoint_keep: Literal["none", "attention", "matmul"] = option(
        "none", "outputs kept in a recomputed layer: none, those of attention, or those of attention and linear layers"
    )
    compile: bool = option(False, "compile the layers of the vision encoder and the LLM with torch.compile")
    drop_path_rate: float = option(0.0, "stochastic depth rate of the vision encoder")
    ps_version: Literal["v1", "v2"] = option("v2", "pixel shuffle version")
    use_fast_tokenizer: bool = option(False, "accepted for upstream's recipes, ignored: all tokenizers are fast")
    use_liger: bool = option(False, "Liger kernels in LLM, vision encoder and loss; needs CUDA")
    use_custom_flash_attn: bool = option(
        False, "accepted for InternVL 3.5's recipes, ignored: attention is always the fastest that transformers has"
    )
