"""Import what a training run imports, before ranks are forked (see `forked_ranks`)."""

import gc
import importlib
import os
from contextlib import suppress

import torch
from PIL import Image

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed probes for devices and warns
MODULES = """
    internvl.train.internvl_chat_finetune internvl.train.internvl_chat_mpo transformers.models.qwen2.modeling_qwen2
    peft.utils.transformers_weight_conversion torch._dynamo torch._inductor.compile_fx torch.utils.cpp_extension
    deepspeed.ops.adam deepspeed.ops.op_builder.all_ops deepspeed.runtime.zero.stage3 deepspeed.moe.ep_count
    deepspeed.runtime.superoffload.superoffload_stage3 deepspeed.checkpoint.ds_to_universal
""".split()
for module in MODULES:
    with suppress(ModuleNotFoundError):  # PEFT 0.18 lacks one
        importlib.import_module(module)
from deepspeed.accelerator import get_accelerator  # noqa: E402

Image.init()
for builder in ("CPUAdamBuilder", "ShareMemCommBuilder"):  # compiled once per machine
    get_accelerator().create_op_builder(builder).load()
torch.set_num_threads(1)
gc.freeze()  # no garbage collection in a fork visits these objects, which would copy their pages
