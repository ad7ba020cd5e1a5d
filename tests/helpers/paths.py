"""Name the paths that tests start from."""

from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[2]
TESTS_DIR = REPO_ROOT / "tests"
REAL_CONFIGS = sorted((TESTS_DIR / "real_configs").glob("internvl*.json"))  # of published models
GOLDENS_ARCHIVE = TESTS_DIR / "goldens.tar.xz"
PACKAGE_DIR = REPO_ROOT / "internvl_chat"  # in PYTHONPATH of programs that tests start
TRAIN_DIR = PACKAGE_DIR / "internvl/train"  # the entry points
FINETUNE_PROGRAM = TRAIN_DIR / "internvl_chat_finetune.py"
VISION_LORA_RECIPE = REPO_ROOT / "shell/internvl2.5/8b_vit_lora.sh"
EXAMPLE_META = REPO_ROOT / "shell/data/example.json"
