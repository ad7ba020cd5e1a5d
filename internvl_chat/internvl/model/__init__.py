"""Loading a chat model for inference, on one or several devices."""

import math
from typing import Any

import torch

__all__ = ["load_model_and_tokenizer", "split_model"]


def split_model(num_layers: int, vit_alpha: float = 0.5) -> dict[str, int]:
    """Build a device map of the model over the visible GPUs.

    GPU 0 also holds the vision encoder, which counts as `vit_alpha` of a GPU, and gets fewer layers of the LLM.
    """
    num_gpus = max(torch.cuda.device_count(), 1)
    layers_per_gpu = math.ceil(num_layers / (num_gpus - vit_alpha))
    layer_counts = [math.ceil(layers_per_gpu * (1 - vit_alpha)), *[layers_per_gpu] * (num_gpus - 1)]
    gpu_of_layer = [gpu for gpu, count in enumerate(layer_counts) for _ in range(count)]
    # The last layer is on GPU 0, too, with the LM head.
    first_gpu_modules = ["tok_embeddings", "embed_tokens", "norm", "rotary_emb", f"layers.{num_layers - 1}"]
    return {
        **{f"language_model.model.layers.{layer}": gpu for layer, gpu in enumerate(gpu_of_layer)},
        **dict.fromkeys(("vision_model", "mlp1", "language_model.output", "language_model.lm_head"), 0),
        **{f"language_model.model.{name}": 0 for name in first_gpu_modules},
    }


def load_model_and_tokenizer(args):
    """Load a model in bfloat16, ready for `chat`, and its tokenizer.

    The model is on the GPU if there is one.

    Args:
        args: namespace with `checkpoint`, `auto` (spread over all GPUs), `load_in_8bit` and `load_in_4bit` (by
            bitsandbytes).
    """
    from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
    from internvl.model.tokenizers.loading import load_tokenizer

    tokenizer = load_tokenizer(args.checkpoint)
    options: dict[str, Any] = {"low_cpu_mem_usage": True, "torch_dtype": torch.bfloat16}
    is_quantized = args.load_in_8bit or args.load_in_4bit
    if is_quantized:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=args.load_in_8bit, load_in_4bit=args.load_in_4bit
        )
    if args.auto:
        config = InternVLChatConfig.from_pretrained(args.checkpoint)
        options["device_map"] = split_model(config.llm_config.num_hidden_layers)
    model = InternVLChatModel.from_pretrained(args.checkpoint, **options).eval()
    if torch.cuda.is_available() and not is_quantized and not args.auto:
        model = model.cuda()
    return model, tokenizer
