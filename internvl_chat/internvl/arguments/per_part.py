"""Flags that each part of the model has: `--<part>_<setting>`, where part is backbone, mlp or llm.

Two tables, made into the dataclasses that `ModelArguments` and `TrainingArguments` inherit. A setting that is not given
is None: the checkpoint's own, the flag of the whole run, or the default that its help tells.
"""

from dataclasses import field, make_dataclass

# setting -> (type, help)
LORA = {
    "lora_alpha": (float, "scale of the LoRA updates of the {part}, over the rank; default twice the rank"),
    "lora_dropout": (float, "dropout before the adapters of the {part}; default 0.05"),
    "lora_targets": (list[str], "ends of the names of adapted layers of the {part}; default all its linear layers"),
    "lora_layers": (str, "START:STOP, as in a slice: which layers of the {part} are adapted; default all"),
    "lora_variant": (str, "LoRA of the {part}: lora, rslora, dora or pissa; default lora"),
}
RATES = {
    "lr": (float, "learning rate of the {part}; default --learning_rate"),
    "weight_decay": (float, "weight decay of the {part}; default --weight_decay"),
    "loraplus_lr_ratio": (float, "LoRA+: how many times higher the learning rate of the B of the {part}'s adapters is"),
}
# What the flags call a part, and its name for people.
NAMES = {"backbone": "vision encoder", "mlp": "projector", "llm": "language model"}


def _table(name: str, settings: dict) -> type:
    fields = [
        (f"{part}_{setting}", kind | None, field(default=None, metadata={"help": text.format(part=NAMES[part])}))
        for part in NAMES
        for setting, (kind, text) in settings.items()
        if (part, setting) != ("mlp", "lora_layers")  # it has none
    ]
    return make_dataclass(name, fields, kw_only=True, namespace={"__module__": __name__})


LoraArguments = _table("LoraArguments", LORA)
RateArguments = _table("RateArguments", RATES)


def given(args, part: str, settings: dict) -> dict:
    """Those of a table's settings that the command line gives for a part, a key of `NAMES`."""
    values = {setting: getattr(args, f"{part}_{setting}", None) for setting in settings}
    return {setting: value for setting, value in values.items() if value is not None}
