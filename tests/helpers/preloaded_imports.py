"""What a training imports sooner or later; `ranks.py` forks the processes of a run from one that has imported it."""

import gc
import importlib
import os

import torch
from PIL import Image

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed need not find out by itself, and warn
for name in """
    internvl.train.internvl_chat_finetune internvl.train.internvl_chat_mpo transformers.models.qwen2.modeling_qwen2
    peft.utils.transformers_weight_conversion torch._dynamo torch._inductor.compile_fx torch.utils.cpp_extension
    deepspeed.ops.adam deepspeed.ops.op_builder.all_ops deepspeed.runtime.zero.stage3 deepspeed.moe.ep_count
    deepspeed.runtime.superoffload.superoffload_stage3 deepspeed.checkpoint.ds_to_universal
""".split():
    importlib.import_module(name)
from deepspeed.accelerator import get_accelerator  # noqa: E402

Image.init()
for name in ("CPUAdamBuilder", "ShareMemCommBuilder"):  # compiled once a machine
    get_accelerator().create_op_builder(name).load()
torch.set_num_threads(1)
gc.freeze()  # a collection in a fork need not look at all this, nor copy its pages
