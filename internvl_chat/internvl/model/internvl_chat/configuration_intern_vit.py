"""Configuration of InternViT, with upstream's keys and defaults."""

from transformers import PretrainedConfig

from internvl.model.internvl_chat.config_values import check_chat_config, check_vision_config, describe_config_file
from internvl.model.internvl_chat.safe_loading import one_line_file_errors


class InternVisionConfig(PretrainedConfig):
    """Configuration of InternViT, 300M or 6B.

    The defaults are those of the first 6B model. Other keys of a checkpoint (mixture of experts, `auto_map`, ...) are
    kept as attributes and saved again, but have no effect.
    """

    model_type = "intern_vit_6b"

    def __init__(
        self,
        num_channels=3,
        patch_size=14,
        image_size=224,
        qkv_bias=False,
        hidden_size=3200,
        num_attention_heads=25,
        intermediate_size=12800,
        qk_normalization=True,
        num_hidden_layers=48,
        use_flash_attn=True,
        hidden_act="gelu",
        norm_type="rms_norm",
        layer_norm_eps=1e-6,
        dropout=0.0,
        drop_path_rate=0.0,
        attention_dropout=0.0,
        initializer_range=0.02,
        initializer_factor=0.1,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.image_size = image_size
        self.qkv_bias = qkv_bias
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.qk_normalization = qk_normalization
        self.num_hidden_layers = num_hidden_layers
        self.use_flash_attn = use_flash_attn
        self.hidden_act = hidden_act
        self.norm_type = norm_type
        self.layer_norm_eps = layer_norm_eps
        self.dropout = dropout
        self.drop_path_rate = drop_path_rate
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.initializer_factor = initializer_factor

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load the configuration of a vision encoder, also from a chat checkpoint.

        Raises:
            ValueError, OSError: the file or a value in it is invalid; in one line.
        """
        source = describe_config_file(pretrained_model_name_or_path)
        with one_line_file_errors(source):
            fields, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
            if "vision_config" in fields:
                check_chat_config(fields, source)
                fields = fields["vision_config"]
            check_vision_config(fields, source)
            return cls.from_dict(fields, **kwargs)
