"""Upstream's path to the Phi-3 configuration."""

import transformers

PHI3_PRETRAINED_CONFIG_ARCHIVE_MAP: dict[str, str] = {}  # upstream's name


class Phi3Config(transformers.Phi3Config):
    """transformers' Phi3Config that accepts older names of `longrope`.

    Published checkpoints have `rope_scaling` of type `su` or `yarn`, which transformers 5 does not accept.
    """

    def convert_rope_params_to_dict(self, rope_scaling=None, **kwargs):
        if rope_scaling and rope_scaling.get("type") in ("su", "yarn"):
            rope_scaling = {**rope_scaling, "rope_type": "longrope"}
        return super().convert_rope_params_to_dict(rope_scaling=rope_scaling, **kwargs)
