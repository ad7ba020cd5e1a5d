"""tools/overlay_upstream.py on a git repository with upstream's layout."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import REPO_ROOT

pytestmark = pytest.mark.multiprocess

TOOL = "internvl_chat/tools/overlay_upstream.py"
# Content of upstream's files that ours replace. Importing one that was not replaced fails.
STALE = "raise ImportError('a file of upstream that ours should have replaced')\n"
PATCHES = "internlm2_packed_training internvit_liger_monkey llama2_flash_attn_monkey llama_flash_attn_monkey"
PATCHES += " llama_packed_training llama_rmsnorm_monkey phi3_packed_training qwen2_packed_training"
REPLACED = [
    *(f"internvl/{name}.py" for name in ("conversation", "dist_utils", "model/__init__", "patch/__init__")),
    *(f"internvl/patch/{name}_patch.py" for name in PATCHES.split()),
    *(
        f"internvl/model/internvl_chat/{name}.py"
        for name in (
            "__init__",
            *(f"{kind}_{part}" for kind in ("configuration", "modeling") for part in ("intern_vit", "internvl_chat")),
        )
    ),
    *(f"internvl/model/internlm2/{name}_internlm2.py" for name in ("configuration", "modeling", "tokenization")),
    *(f"internvl/model/phi3/{name}_phi3.py" for name in ("configuration", "modeling")),
    *(f"internvl/train/{name}.py" for name in ("__init__", "constants", "dataset", "dataset_packed", "trainer_dpo")),
    *(f"internvl/train/internvl_chat_{name}.py" for name in ("finetune", "pretrain", "mpo")),
    "tools/merge_lora.py",
    "zero_stage1_config.json",
    "shell/data/internvl_1_2_finetune.json",
]
THEIR_RECIPE = """PYTHONPATH="${PYTHONPATH}:$(pwd)" LAUNCHER=pytorch torchrun --nnodes=1 --node_rank=0 \\
  --master_addr=127.0.0.1 --nproc_per_node=1 --master_port=${MASTER_PORT} internvl/train/internvl_chat_finetune.py \\
  --model_name_or_path "./pretrained/theirs" --meta_path "./shell/data/internvl_1_2_finetune.json" \\
  --deepspeed "zero_stage1_config.json" --output_dir work_dirs/theirs
"""
EVALUATION = "from internvl.model import load_model_and_tokenizer\n"
EVALUATION += "from internvl.train.dataset import build_transform, dynamic_preprocess\n"
THEIR_OWN = {
    "README.md": "upstream",
    "LICENSE": "upstream",
    ".gitignore": "*.json\nrequirements.txt\nshell/\n",
    "requirements/internvl_chat.txt": "transformers==4.37.2\n",
    "internvl_chat/pyproject.toml": "[project]\n",
    "internvl_chat/README.md": "upstream",
    "internvl_chat/eval/mme/eval.py": EVALUATION,
    "internvl_chat/eval/caption/a name with blanks é.json": "{}",
    "internvl_chat/tools/reasoning_data_pipeline/utils/utils.py": "",
    "internvl_chat/shell/theirs/2nd_finetune.sh": THEIR_RECIPE,
}

# Names that upstream's other files import from `internvl`. Not included: names that only its training programs import
# (`PackedDataset`, `packed_collate_fn`), because ours replace those programs.
MODEL = ["InternVisionConfig", "InternVisionModel", "InternVLChatConfig", "InternVLChatModel"]
DATASET = ["ConcatDataset", "TCSLoader", "WeightedConcatDataset", "build_transform", "dynamic_preprocess", "preprocess"]
DATASET += [f"preprocess_{kind}" for kind in ("internlm", "internvl2_5", "mpt", "phi3")]
TOKENS = [f"{name}_{side}_TOKEN" for name in ("IMG", "QUAD", "REF", "BOX") for side in ("START", "END")]
REPLACE = ["llama_rmsnorm_with_fused_rmsnorm", "train_dataloader", "train_sampler"]
REPLACE += [f"{llm}_attention_class" for llm in ("internlm2", "llama", "phi3", "qwen2")]
ATTENTION = {
    "internlm2": ["INTERNLM2_ATTENTION_CLASSES", "InternLM2FlashAttention2", "apply_rotary_pos_emb"],
    "phi3": ["PHI3_ATTENTION_CLASSES", "Phi3FlashAttention2"],
}
COLLATORS = ["concat_pad_data_collator", "dpo_concat_pad_data_collator", "pad_data_collator"]
IMPORTED = {
    "internvl.model": ["load_model_and_tokenizer", "split_model"],
    "internvl.conversation": ["get_conv_template"],
    "internvl.dist_utils": ["init_dist"],
    "internvl.model.internvl_chat": MODEL,
    "internvl.model.internvl_chat.modeling_intern_vit": ["NORM2FN"],
    "internvl.model.internlm2.configuration_internlm2": ["InternLM2Config"],
    "internvl.model.internlm2.modeling_internlm2": ["InternLM2ForCausalLM", *ATTENTION["internlm2"]],
    "internvl.model.phi3.configuration_phi3": ["Phi3Config"],
    "internvl.model.phi3.modeling_phi3": ["Phi3ForCausalLM", *ATTENTION["phi3"]],
    "internvl.patch": [*COLLATORS, "apply_liger_kernel_to_internvit", *(f"replace_{name}" for name in REPLACE)],
    "internvl.train.dataset": [*DATASET, "check_conversations_repetition"],
    "internvl.train.constants": ["IMG_CONTEXT_TOKEN", *TOKENS],
    "internvl.train.trainer_dpo": ["MultimodalDPOTrainer"],
}
PROBE = """
import importlib, json, sys
missing = []
for module, names in json.loads(sys.argv[1]).items():
    imported = importlib.import_module(module)
    assert imported.__file__.startswith(sys.argv[2]), imported.__file__
    missing += [f"{module}.{name}" for name in names if not hasattr(imported, name)]
from internvl.arguments.deepspeed_config import ZERO_CONFIG_DIR
missing += [name for name in ("zero_stage1_config.json",) if not (ZERO_CONFIG_DIR / name).is_file()]
print(json.dumps(missing))
"""


def git(folder, *words, **env) -> str:
    env = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", **env}
    return subprocess.run(["git", "-C", folder, *words], check=True, capture_output=True, text=True, env=env).stdout


def run(*words, root=REPO_ROOT, **env):
    """Run the tool without site-packages and without a git identity."""
    env = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", **env}
    command = [sys.executable, "-I", str(root / TOOL), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def write(folder: Path, files: dict):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def snapshot(folder: Path) -> dict[str, bytes]:
    paths = (p for p in folder.rglob("*") if p.is_file() and ".git" not in p.parts)
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


@pytest.fixture
def upstream(tmp_path) -> Path:
    folder = tmp_path / "InternVL"
    write(folder, THEIR_OWN | {f"internvl_chat/{name}": STALE for name in REPLACED})
    git(folder.parent, "init", "-q", "-b", "main", str(folder))
    git(folder, "add", "--force", ".")
    git(folder, "-c", "user.name=them", "-c", "user.email=them@example.org", "commit", "-q", "-m", "upstream")
    write(folder, {"internvl_chat/pretrained/weights.bin": "the user's own"})
    return folder


def parse_dry_run(result) -> dict[str, list[str]]:
    """Return kind -> paths from the output of a dry run."""
    parts = re.findall(r"^(\w+): (\d+) files\n((?:  .*\n)*)", result.stdout, re.MULTILINE)
    assert all(lines.count("\n") == int(count) for _, count, lines in parts)
    return {kind: [line.strip() for line in lines.splitlines()] for kind, _, lines in parts}


def test_dry_run_lists_all_files_and_writes_nothing(upstream):
    before, refs = snapshot(upstream), git(upstream, "for-each-ref")
    done = run(upstream, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    paths = parse_dry_run(done)
    assert paths["replaced"] == sorted(f"internvl_chat/{name}" for name in REPLACED)
    assert paths["unchanged"] == sorted(name for name in THEIR_OWN if name.startswith("internvl_chat/"))
    assert {"internvl_chat/shell/launch.sh", "internvl_chat/internvl/model/lora.py"} <= {*paths["added"]}
    assert {"internvl_chat/requirements.txt", "internvl_chat/zero_stage3_config.json"} <= {*paths["added"]}
    assert not any("__pycache__" in path or "quickstart" in path for path in paths["added"])
    assert snapshot(upstream) == before and git(upstream, "for-each-ref") == refs
    assert git(upstream, "symbolic-ref", "HEAD").strip() == "refs/heads/main"


def test_plain_copy_of_this_repository_gives_the_same_result(upstream, tmp_path):
    copy = tmp_path / "copy"
    for part in ("internvl_chat", "shell", "zero_stage_configs"):
        shutil.copytree(REPO_ROOT / part, copy / part, symlinks=True)
    shutil.copy(REPO_ROOT / "requirements.txt", copy)
    write(copy, {"internvl_chat/internvl/__pycache__/stale.cpython-311.pyc": "", "shell/.ruff_cache/x": ""})
    assert run(upstream, "--dry-run", root=copy).stdout == run(upstream, "--dry-run").stdout


def test_overlay_is_one_commit_that_checkout_undoes(upstream):
    before, paths = snapshot(upstream), parse_dry_run(run(upstream, "--dry-run"))
    done = run(upstream, "--branch", "ours")
    assert done.returncode == 0, done.stderr
    assert git(upstream, "symbolic-ref", "HEAD").strip() == "refs/heads/ours"
    assert git(upstream, "status", "--porcelain", "--untracked-files=no") == ""
    assert git(upstream, "rev-list", "--count", "main..ours").strip() == "1"
    changes = git(upstream, "diff", "--no-renames", "--name-status", "-z", "main..ours").split("\0")[:-1]
    changes = dict(zip(changes[1::2], changes[::2], strict=True))
    assert changes == dict.fromkeys(paths["replaced"], "M") | dict.fromkeys(paths["added"], "A")
    after = snapshot(upstream)
    assert all(after[name] == content for name, content in before.items() if name not in paths["replaced"])
    assert (
        after["internvl_chat/internvl/conversation.py"]
        == (REPO_ROOT / "internvl_chat/internvl/conversation.py").read_bytes()
    )
    assert after["internvl_chat/shell/launch.sh"] == (REPO_ROOT / "shell/launch.sh").read_bytes()
    assert git(upstream, "log", "-1", "--format=%an <%ae>").strip() == "overlay_upstream.py <overlay@localhost>"
    assert f"{len(paths['replaced'])} files replaced" in git(upstream, "log", "-1", "--format=%B")

    git(upstream, "checkout", "-q", "main")
    assert snapshot(upstream) == before
    again = run(upstream, "--branch", "ours")
    assert again.returncode == 1 and "branch ours exists" in again.stderr
    git(upstream, "checkout", "-q", "ours")
    assert "already holds all of these files" in run(upstream, "--branch", "twice").stderr


def test_commit_has_the_users_identity(upstream):
    git(upstream, "config", "user.name", "Ada")
    git(upstream, "config", "user.email", "ada@example.org")
    git(upstream, "checkout", "-q", "--detach")
    done = run(upstream)
    assert done.returncode == 0, done.stderr
    assert git(upstream, "log", "-1", "--format=%an <%ae>", "overlay").strip() == "Ada <ada@example.org>"
    undo = done.stdout.splitlines()[-1].removeprefix("Undo:").split()
    subprocess.run([*undo, "-q"], check=True)
    assert git(upstream, "rev-parse", "HEAD") == git(upstream, "rev-parse", "main")


def not_a_repository(folder):
    shutil.rmtree(folder / ".git")


def another_layout(folder):
    git(folder, "rm", "-q", "-r", "internvl_chat/internvl")


def uncommitted_change(folder):
    write(folder, {"internvl_chat/README.md": "changed"})


def branch_exists(folder):
    git(folder, "branch", "overlay")


def untracked_file(folder):
    write(folder, {"internvl_chat/shell/launch.sh": "the user's own, which git does not track"})


def without_a_commit(folder):
    not_a_repository(folder)
    git(folder, "init", "-q")


@pytest.mark.parametrize(
    ("break_fn", "message"),
    [
        (not_a_repository, "is not a git repository"),
        (another_layout, "is not a checkout of upstream: expected .* internvl_chat/internvl"),
        (uncommitted_change, "has 1 uncommitted changes"),
        (branch_exists, "branch overlay exists"),
        (untracked_file, "untracked files would be overwritten in .*: internvl_chat/shell/launch.sh"),
        (without_a_commit, "has no commit to create a branch from"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("option", [(), ("--dry-run",)], ids=["real", "dry"])
def test_errors_change_nothing(upstream, break_fn, message, option):
    break_fn(upstream)
    before = snapshot(upstream)
    done = run(upstream, *option, GIT_CEILING_DIRECTORIES=str(upstream.parent))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert re.search(message, done.stderr), done.stderr
    assert snapshot(upstream) == before


def test_wrong_folders_are_errors(tmp_path):
    assert "is not a git repository" in run(tmp_path / "nowhere").stderr
    if (REPO_ROOT / ".git").exists():
        assert "is this repository itself" in run(REPO_ROOT).stderr


def test_overlaid_checkout_works(upstream):
    """Run recipes of both repositories; import all names that upstream uses."""
    assert run(upstream).returncode == 0
    package = upstream / "internvl_chat"
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(upstream.parent)}

    def shell(*words, cwd, **more):
        return subprocess.run(["bash", *words], cwd=cwd, env=env | more, capture_output=True, text=True)

    for cwd, recipe in ((upstream, "internvl_chat/shell"), (package, "shell")):
        done = shell(f"{recipe}/internvl2.5/8b_vit_lora.sh", cwd=cwd, DRY_RUN="1", GPUS="1")
        assert done.returncode == 0, done.stderr
        assert f" {package}/internvl/train/internvl_chat_finetune.py " in done.stdout
        assert f"PYTHONPATH={package} " in done.stdout and f" {package}/shell/torchrun.py " in done.stdout

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    theirs = shell("shell/theirs/2nd_finetune.sh", cwd=package, MASTER_PORT=str(port))
    assert theirs.returncode == 1
    assert re.search("^error: .*pretrained/theirs", theirs.stderr, re.MULTILINE), theirs.stderr  # ours

    probe = [sys.executable, "-c", PROBE, json.dumps(IMPORTED), str(package)]
    done = subprocess.run(
        probe, cwd=upstream.parent, env=env | {"PYTHONPATH": str(package)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
