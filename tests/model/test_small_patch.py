"""The chat model's folder, `lora*.py` and `token_loss.py` copied alone into a checkout with upstream's pins.

Builds such a checkout, and beside the main environment one with those pins, and runs there: the goldens of every model
whose language model is transformers' own (Qwen2, Llama: forward, loss, gradients, generate, LoRA, merge, trajectories)
and `upstream_main.py`, which trains as upstream's entry does. InternLM2 and Phi-3 are upstream's own files there, which
are not at hand: stand-ins let the imports resolve, and the goldens of these two do not run.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.environments import environ, layer

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "internvl_chat"
PINS = "transformers==4.37.2 tokenizers==0.15.1 peft==0.10.0 timm==0.9.12 accelerate<1 numpy==1.26.4".split()
PINS += ["datasets<3", "pandas<2.3", "pyarrow<20"]  # its Trainer imports datasets: one of then, built for numpy 1
PATCH = ["model/internvl_chat", *(f"model/{name}.py" for name in ("lora", "lora_linear", "lora_dropout", "token_loss"))]
TESTS = [HERE / "test_model_goldens.py", HERE / "test_lora_goldens.py", HERE.parent / "programs/upstream_main.py"]
# Documents in a row are told apart by flash-attn and replaced attention classes there; ours by transformers 5.
NOT_THERE = "not internlm2 and not phi3 and not packed and not bounds"

CONFIGURATION = """
from transformers import PretrainedConfig

class {name}Config(PretrainedConfig):
    model_type = "{kind}"
"""
MODELING = """
class {name}ForCausalLM:
    def __init__(self, config):
        raise NotImplementedError("upstream's own modeling_{kind}.py stands here")
"""
STAND_INS = {"model/__init__.py": ""} | {
    f"model/{kind}/{part}_{kind}.py": text.format(name=name, kind=kind)
    for kind, name in (("internlm2", "InternLM2"), ("phi3", "Phi3"))
    for part, text in (("configuration", CONFIGURATION), ("modeling", MODELING))
}


@pytest.fixture(scope="module")
def pinned() -> Path:
    if sys.version_info >= (3, 13):
        pytest.skip("upstream's pins have wheels up to Python 3.12")
    try:
        return layer("pinned", PINS)
    except OSError as error:
        pytest.skip(f"the environment with upstream's pins cannot be made: {error}")


@pytest.fixture
def checkout(tmp_path) -> Path:
    for name, text in STAND_INS.items():
        (tmp_path / "internvl" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "internvl" / name).write_text(text)
    for name in ("conversation.py", *PATCH):  # the templates are the checkout's own; ours are the same
        ours, theirs = PACKAGE / "internvl" / name, tmp_path / "internvl" / name
        shutil.copytree(ours, theirs) if ours.is_dir() else shutil.copy(ours, theirs)
    return tmp_path


def test_the_small_patch_passes_the_goldens_with_upstreams_pins(pinned, checkout):
    paths = f"pythonpath={checkout} {HERE.parent}"
    command = [pinned, "-m", "pytest", "-o", paths, "-p", "no:cacheprovider", "-q", "--tb=short"]
    done = subprocess.run([*command, "-k", NOT_THERE, *TESTS], capture_output=True, text=True, env=environ(pinned))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    assert int(summary.split(" passed")[0].split()[-1]) >= 18, summary  # not an empty selection
