"""Upstream's path to the Phi-3 configuration: transformers' own, which no longer knows one older spelling."""

import transformers


class Phi3Config(transformers.Phi3Config):
    """transformers' `Phi3Config`, reading the published `rope_scaling` type `su` as what it is called today."""

    def convert_rope_params_to_dict(self, rope_scaling=None, **kwargs):
        if rope_scaling and rope_scaling.get("type") in ("su", "yarn"):
            rope_scaling = {**rope_scaling, "rope_type": "longrope"}
        return super().convert_rope_params_to_dict(rope_scaling=rope_scaling, **kwargs)
