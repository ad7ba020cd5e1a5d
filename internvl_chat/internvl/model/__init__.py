"""Loading a chat model for use, on one device or spread over several."""

import math

import torch

__all__ = ["load_model_and_tokenizer", "split_model"]


def split_model(num_layers: int, vit_alpha: float = 0.5) -> dict[str, int]:
    """A device map over the visible GPUs; GPU 0, which has the vision encoder, gets fewer layers by `vit_alpha`."""
    gpus = max(torch.cuda.device_count(), 1)
    per_gpu = math.ceil(num_layers / (gpus - vit_alpha))
    sizes = [math.ceil(per_gpu * (1 - vit_alpha)), *[per_gpu] * (gpus - 1)]
    owners = [gpu for gpu, size in enumerate(sizes) for _ in range(size)]
    first = ["tok_embeddings", "embed_tokens", "norm", "rotary_emb", f"layers.{num_layers - 1}"]
    return {
        **{f"language_model.model.layers.{layer}": gpu for layer, gpu in enumerate(owners)},
        **dict.fromkeys(("vision_model", "mlp1", "language_model.output", "language_model.lm_head"), 0),
        **{f"language_model.model.{name}": 0 for name in first},
    }


def load_model_and_tokenizer(args):
    """The model in bfloat16, ready for `chat`, and its tokenizer; on the GPU where there is one.

    `args` has `checkpoint`, `auto` (spread over all GPUs), `load_in_8bit` and `load_in_4bit` (with bitsandbytes).
    """
    from internvl.model.internvl_chat import InternVLChatConfig, InternVLChatModel
    from internvl.model.tokenizers.loading import load_tokenizer

    tokenizer = load_tokenizer(args.checkpoint)
    options = {"low_cpu_mem_usage": True, "torch_dtype": torch.bfloat16}
    quantized = args.load_in_8bit or args.load_in_4bit
    if quantized:
        from transformers import BitsAndBytesConfig

        bits = BitsAndBytesConfig(load_in_8bit=args.load_in_8bit, load_in_4bit=args.load_in_4bit)
        options["quantization_config"] = bits
    if args.auto:
        config = InternVLChatConfig.from_pretrained(args.checkpoint)
        options["device_map"] = split_model(config.llm_config.num_hidden_layers)
    model = InternVLChatModel.from_pretrained(args.checkpoint, **options).eval()
    if torch.cuda.is_available() and not quantized and not args.auto:
        model = model.cuda()
    return model, tokenizer
