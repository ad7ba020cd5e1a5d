"""Configuration of InternLM2 language models (`llm_config` of a checkpoint)."""

from transformers import PretrainedConfig

INTERNLM2_PRETRAINED_CONFIG_ARCHIVE_MAP = {}


class InternLM2Config(PretrainedConfig):
    """Configuration of an InternLM2 model, with upstream's keys and defaults.

    Args:
        bias: whether `wqkv` and `wo` have a bias.

    Raises:
        ValueError: `rope_scaling` is neither None nor `{"type": "linear" | "dynamic", "factor": float >= 1}`.
    """

    model_type = "internlm2"
    keys_to_ignore_at_inference = ["past_key_values"]
    # transformers 5 makes this name a property over `rope_parameters`. A plain attribute keeps the key as stored.
    rope_scaling = None
    # Fields that transformers' Llama blocks read and that are the same for all InternLM2 models.
    attention_bias = False
    mlp_bias = False
    attention_dropout = 0.0
    pretraining_tp = 1

    def __init__(
        self,
        vocab_size=103168,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=None,
        hidden_act="silu",
        max_position_embeddings=2048,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        use_cache=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        bias=True,
        rope_theta=10000,
        rope_scaling=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.bias = bias
        self.rope_theta = rope_theta
        self.rope_scaling = _validate_rope_scaling(rope_scaling)
        super().__init__(
            # Fields that a configuration keeps as attributes.
            pad_token_id=pad_token_id,  # pyrefly: ignore[unexpected-keyword]
            bos_token_id=bos_token_id,  # pyrefly: ignore[unexpected-keyword]
            eos_token_id=eos_token_id,  # pyrefly: ignore[unexpected-keyword]
            tie_word_embeddings=tie_word_embeddings,  # pyrefly: ignore[unexpected-keyword]
            **kwargs,
        )


def _validate_rope_scaling(rope_scaling: dict | None) -> dict | None:
    if rope_scaling is None:
        return None
    if not isinstance(rope_scaling, dict) or set(rope_scaling) != {"type", "factor"}:
        raise ValueError(f"rope_scaling must have exactly the keys 'type' and 'factor', got {rope_scaling}")
    if rope_scaling["type"] not in ("linear", "dynamic"):
        raise ValueError(f"rope_scaling['type'] must be 'linear' or 'dynamic', got {rope_scaling['type']!r}")
    factor = rope_scaling["factor"]
    if not isinstance(factor, float) or factor < 1.0:
        raise ValueError(f"rope_scaling['factor'] must be a float of at least 1, got {factor!r}")
    return rope_scaling
