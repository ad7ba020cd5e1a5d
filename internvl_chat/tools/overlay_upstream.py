"""Copy this repository over a checkout of upstream.

    python tools/overlay_upstream.py UPSTREAM_DIR [--dry-run]

The result is one commit on a new branch: `git diff main..overlay` shows the patch, `git checkout main` undoes it. All
files go below `internvl_chat/`. Files that only upstream has stay unchanged.
"""

import argparse
import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Path in this repository -> path in a checkout of upstream.
TARGET_PATHS = {
    "internvl_chat/internvl": "internvl_chat/internvl",
    "internvl_chat/tools": "internvl_chat/tools",
    "shell": "internvl_chat/shell",
    "zero_stage_configs": "internvl_chat",
    "requirements.txt": "internvl_chat/requirements.txt",
}
EXCLUDED_PATHS = {
    "internvl_chat/tools/overlay_upstream.py",
    "internvl_chat/tools/quickstart",
    "internvl_chat/internvl/zero_stage_configs",  # a link; upstream has these files elsewhere
    "shell/quickstart.sh",
}
FALLBACK_IDENTITY = {"user.name": "overlay_upstream.py", "user.email": "overlay@localhost"}
COMMIT_MESSAGE = """Overlay the compatible internvl_chat

{replaced} files replaced, {added} added, {unchanged} unchanged. The flags, the data format and the checkpoints are
upstream's. The environment is internvl_chat/requirements.txt (`source shell/setup.sh` creates it), not upstream's pins.
"""


class OverlayError(Exception):
    """A reason why the overlay is not possible; nothing was changed."""


def run_git(folder: Path, *args, check: bool = True) -> subprocess.CompletedProcess:
    """Run git in `folder`; raise OverlayError with its message if it fails."""
    command = ["git", "-C", str(folder), *args]
    # surrogateescape: file names need not be UTF-8.
    result = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape")
    if check and result.returncode:
        reason = (result.stderr.strip() or result.stdout.strip()).replace("\n", " ")
        raise OverlayError(f"git {args[0]} failed in {folder}: {reason}")
    return result


def list_overlay_files() -> dict[Path, Path]:
    """Return path in a checkout of upstream -> our file or link.

    Files are found on disk, not by git: the repository may be a plain copy.
    """
    files = {}
    for source, target in TARGET_PATHS.items():
        top = ROOT / source
        for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
            relative = file.relative_to(ROOT)
            is_excluded = bool({str(relative), *map(str, relative.parents)} & EXCLUDED_PATHS)
            is_cache = "__pycache__" in relative.parts or any(part.startswith(".") for part in relative.parts)
            if (file.is_file() or file.is_symlink()) and not is_excluded and not is_cache:
                files[Path(target) / file.relative_to(top)] = file
    return files


def is_same_file(ours: Path, theirs: Path) -> bool:
    """Compare content and executable bit, or the targets of links."""
    if ours.is_symlink() or theirs.is_symlink():
        return ours.is_symlink() and theirs.is_symlink() and ours.readlink() == theirs.readlink()
    has_same_mode = (ours.stat().st_mode & 0o100) == (theirs.stat().st_mode & 0o100)
    return has_same_mode and filecmp.cmp(ours, theirs, shallow=False)


def classify_files(upstream: Path, files: dict[Path, Path]) -> dict[str, list[Path]]:
    """List the paths that are replaced, added and unchanged.

    Unchanged are those of the files that upstream tracks in internvl_chat/.

    Raises:
        OverlayError: an untracked file would be overwritten.
    """
    output = run_git(upstream, "ls-files", "-z", "--", "internvl_chat").stdout
    tracked = {Path(name) for name in output.split("\0") if name}
    changed = {path for path, ours in files.items() if path not in tracked or not is_same_file(ours, upstream / path)}
    if untracked := sorted(str(path) for path in changed - tracked if (upstream / path).exists()):
        raise OverlayError(f"untracked files would be overwritten in {upstream}: {', '.join(untracked)}")
    return {
        "replaced": sorted(changed & tracked),
        "added": sorted(changed - tracked),
        "unchanged": sorted(tracked - changed),
    }


def check_upstream(upstream: Path, branch: str) -> None:
    """Raise an OverlayError unless `upstream` is a clean checkout of upstream.

    A branch of that name must not exist.
    """
    if not shutil.which("git"):
        raise OverlayError("git is required, but not on PATH")
    if not upstream.is_dir() or run_git(upstream, "rev-parse", "--show-toplevel", check=False).returncode:
        raise OverlayError(f"{upstream} is not a git repository")
    if upstream == ROOT:
        raise OverlayError(f"{upstream} is this repository itself: expected a checkout of upstream")
    if not (upstream / "internvl_chat/internvl").is_dir() or (upstream / "internvl_chat/shell").is_symlink():
        raise OverlayError(
            f"{upstream} is not a checkout of upstream: expected the folders internvl_chat/internvl and "
            "internvl_chat/shell"
        )
    if run_git(upstream, "rev-parse", "--verify", "HEAD", check=False).returncode:
        raise OverlayError(f"{upstream} has no commit to create a branch from")
    if changes := run_git(upstream, "status", "--porcelain", "--untracked-files=no").stdout.splitlines():
        raise OverlayError(f"{upstream} has {len(changes)} uncommitted changes: commit or stash them first")
    run_git(upstream, "check-ref-format", "--branch", branch)
    if not run_git(upstream, "show-ref", "--verify", f"refs/heads/{branch}", check=False).returncode:
        raise OverlayError(f"branch {branch} exists in {upstream}: choose another name with --branch")


def commit_overlay(upstream: Path, branch: str, files: dict[Path, Path], paths_by_kind: dict[str, list[Path]]) -> None:
    """Create the branch, copy the changed files and commit them."""
    paths = paths_by_kind["replaced"] + paths_by_kind["added"]
    run_git(upstream, "checkout", "-q", "-b", branch)
    for path in paths:
        (upstream / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files[path], upstream / path, follow_symlinks=False)
    # --force: upstream's .gitignore matches some of our names.
    run_git(upstream, "add", "--force", "--", *map(str, paths))
    missing = [key for key in FALLBACK_IDENTITY if run_git(upstream, "config", key, check=False).returncode]
    identity = [arg for key in missing for arg in ("-c", f"{key}={FALLBACK_IDENTITY[key]}")]
    message = COMMIT_MESSAGE.format(**{kind: len(listed) for kind, listed in paths_by_kind.items()})
    # --no-verify: upstream's pre-commit hooks would reformat our files.
    run_git(upstream, *identity, "commit", "-q", "--no-verify", "-m", message)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("upstream", metavar="UPSTREAM_DIR", type=Path, help="root of a git checkout of upstream")
    parser.add_argument("--dry-run", action="store_true", help="list the files of each kind without writing anything")
    parser.add_argument("--branch", default="overlay", help="name of the new branch (default: %(default)s)")
    args = parser.parse_args()
    upstream = args.upstream.resolve()

    try:
        check_upstream(upstream, args.branch)
        files = list_overlay_files()
        paths_by_kind = classify_files(upstream, files)
        if not paths_by_kind["replaced"] + paths_by_kind["added"]:
            raise OverlayError(f"{upstream} already holds all of these files")
        old_branch = run_git(upstream, "rev-parse", "--abbrev-ref", "HEAD").stdout.strip()
        if old_branch == "HEAD":  # detached
            old_branch = run_git(upstream, "rev-parse", "HEAD").stdout.strip()
        if not args.dry_run:
            commit_overlay(upstream, args.branch, files, paths_by_kind)
    except OverlayError as error:
        sys.exit(f"error: {error}")

    for kind, paths in paths_by_kind.items():
        print(f"{kind}: {len(paths)} files")
        if args.dry_run:
            print("".join(f"  {path}\n" for path in paths), end="")
    if not args.dry_run:
        print(f"Show the patch: git -C {upstream} diff {old_branch}..{args.branch}")
        print(f"Undo: git -C {upstream} checkout {old_branch}")


if __name__ == "__main__":
    main()
