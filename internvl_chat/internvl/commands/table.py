"""The commands: which module has the `main(argv)` of each."""

from typing import NamedTuple


class Command(NamedTuple):
    """A row of the table of commands."""

    module: str
    summary: str
    is_rank: bool = False  # handles preemption signals before torch is imported, as a rank of torchrun


COMMANDS = {
    "train": Command("internvl.commands.train", "train by a recipe, by flags, or by the run.yaml of a run"),
    "check-data": Command(
        "internvl.tools.check_data", "check the data of a run: unusable samples, lengths, epoch plan"
    ),
    "plan": Command("internvl.tools.estimate_memory", "estimate the GPU memory of a run, without a GPU"),
    "evaluate": Command("internvl.tools.evaluate", "evaluate a model, and compare it with another one", is_rank=True),
    "chat": Command("internvl.tools.chat", "ask a model, or answer all questions of a file"),
    "merge": Command("internvl.tools.merge_lora", "merge LoRA adapters into the weights of a checkpoint"),
    "export": Command("internvl.tools.export_adapters", "export adapters for PEFT and vLLM"),
    "report": Command("internvl.tools.report", "write a page about a run: curves, settings, predictions"),
    "inspect": Command("internvl.tools.inspect_checkpoint", "show what a checkpoint contains"),
    "convert": Command("internvl.commands.convert", "convert a checkpoint, or take parts of it"),
    "doctor": Command("internvl.tools.doctor", "check this machine and its packages; bug reports need it"),
}
CONVERSIONS = {
    "to-hf": Command("internvl.tools.internvl_custom2hf", "to the InternVL class of transformers"),
    "from-hf": Command("internvl.tools.internvl_hf2custom", "from the InternVL class of transformers"),
    "safetensors": Command("internvl.tools.pickle2safetensors", "from pickled weights to safetensors"),
    "int8": Command("internvl.tools.convert_to_int8", "to 8-bit weights of bitsandbytes"),
    "resize": Command("internvl.tools.resize_pos_embed", "to another image size"),
    "replace-llm": Command("internvl.tools.replace_llm", "to another LLM"),
    "extract-vit": Command("internvl.tools.extract_vit", "to its vision encoder alone"),
    "extract-mlp": Command("internvl.tools.extract_mlp", "to its projector alone"),
    "remote-code": Command("internvl.tools.write_remote_code", "add the code that `trust_remote_code` runs"),
}
