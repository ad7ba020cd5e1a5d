"""The small patch: `model/internvl_chat` and the few files that it imports in a checkout of upstream.

The test builds such a checkout and an environment with upstream's pins. There it runs the goldens of LLMs from
transformers (Qwen2, Llama: forward, loss, gradients, generate, LoRA, merge, trajectories) and `upstream_main.py`, which
trains like upstream's program. In a real checkout InternLM2 and Phi-3 are upstream's own files. They are not available
here: stubs replace them, and their goldens are skipped.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.environments import layer_environment, make_layer_or_skip
from helpers.paths import PACKAGE_DIR

pytestmark = pytest.mark.multiprocess

HERE = Path(__file__).parent
PINS = "transformers==4.37.2 tokenizers==0.15.1 peft==0.10.0 timm==0.9.12 accelerate<1 numpy==1.26.4".split()
PINS += ["datasets<3", "pandas<2.3", "pyarrow<20"]  # imported by its Trainer; built for numpy 1
PATCH_FILES = [
    "model/internvl_chat",
    *(f"model/{name}.py" for name in ("lora", "lora_linear", "lora_dropout", "safetensors_io", "token_loss")),
    "command_line.py",
    "regular_files.py",
    "torch_internals.py",
]
TESTS = [HERE / "test_model_goldens.py", HERE / "test_lora_goldens.py", HERE.parent / "programs/upstream_main.py"]
# Packed rows need transformers 5; upstream patches attention classes instead.
SELECTION = "not internlm2 and not phi3 and not packed and not cumulative"

CONFIGURATION = """
from transformers import PretrainedConfig

class {name}Config(PretrainedConfig):
    model_type = "{kind}"
"""
MODELING = """
class {name}ForCausalLM:
    def __init__(self, config):
        raise NotImplementedError("a stub of upstream's modeling_{kind}.py")
"""
STUBS = {"model/__init__.py": ""} | {
    f"model/{kind}/{part}_{kind}.py": text.format(name=name, kind=kind)
    for kind, name in (("internlm2", "InternLM2"), ("phi3", "Phi3"))
    for part, text in (("configuration", CONFIGURATION), ("modeling", MODELING))
}


@pytest.fixture(scope="module")
def pinned() -> Path:
    if sys.version_info >= (3, 13):
        pytest.skip("upstream's pins have wheels up to Python 3.12")
    return make_layer_or_skip("pinned", PINS)


@pytest.fixture
def checkout(tmp_path) -> Path:
    for name, text in STUBS.items():
        (tmp_path / "internvl" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "internvl" / name).write_text(text)
    for name in ("conversation.py", *PATCH_FILES):  # the checkout has its own templates, which are the same
        ours, theirs = PACKAGE_DIR / "internvl" / name, tmp_path / "internvl" / name
        shutil.copytree(ours, theirs) if ours.is_dir() else shutil.copy(ours, theirs)
    return tmp_path


def test_the_small_patch_passes_the_goldens_with_upstreams_pins(pinned, checkout):
    paths = f"pythonpath={checkout} {HERE.parent}"
    command = [pinned, "-m", "pytest", "-o", paths, "-p", "no:cacheprovider", "-q", "--tb=short"]
    done = subprocess.run(
        [*command, "-k", SELECTION, *TESTS], capture_output=True, text=True, env=layer_environment(pinned)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    assert int(summary.split(" passed")[0].split()[-1]) >= 18, summary  # not an empty selection
