"""Lays this repository over a checkout of upstream: `python tools/overlay_upstream.py UPSTREAM_DIR [--dry-run]`.

Makes a branch and one commit there, so that `git diff main..overlay` is the patch and `git checkout main` undoes it.
All of it goes where upstream has its like, below `internvl_chat/`; what upstream has and we do not stays as it is.
"""

import argparse
import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACES = {  # ours -> in an upstream checkout
    "internvl_chat/internvl": "internvl_chat/internvl",
    "internvl_chat/tools": "internvl_chat/tools",
    "shell": "internvl_chat/shell",
    "zero_stage_configs": "internvl_chat",
    "requirements.txt": "internvl_chat/requirements.txt",
}
OURS_ALONE = {"internvl_chat/tools/overlay_upstream.py", "internvl_chat/tools/quickstart", "shell/quickstart.sh"}
FALLBACK_IDENTITY = {"user.name": "overlay_upstream.py", "user.email": "overlay@localhost"}
MESSAGE = """Lay the compatible internvl_chat over upstream's

{replaced} files replaced, {added} added, {left} left as they were. The flags, the data format and the checkpoints are
upstream's; the environment is internvl_chat/requirements.txt (`source shell/setup.sh` makes it), not the old pins.
"""


class CannotOverlay(Exception):
    """Why nothing was done, in one sentence."""


def git(folder: Path, *words, check: bool = True) -> subprocess.CompletedProcess:
    """Runs git in `folder`; raises CannotOverlay with git's own words if `check` and it fails."""
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, errors="surrogateescape")
    if check and done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).replace("\n", " ")
        raise CannotOverlay(f"git {words[0]} failed in {folder}: {reason}")
    return done


def our_files() -> dict[Path, Path]:
    """Path in an upstream checkout -> our file. Found on the disk: a plain copy of this repository will do."""
    found = {}
    for ours, theirs in PLACES.items():
        top = ROOT / ours
        for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
            inner = file.relative_to(ROOT)
            alone = {str(inner), *map(str, inner.parents)} & OURS_ALONE
            cache = "__pycache__" in inner.parts or any(part.startswith(".") for part in inner.parts)
            if file.is_file() and not alone and not cache:
                found[Path(theirs) / file.relative_to(top)] = file
    return found


def same(ours: Path, theirs: Path) -> bool:
    executable = (ours.stat().st_mode & 0o100) == (theirs.stat().st_mode & 0o100)
    return executable and filecmp.cmp(ours, theirs, shallow=False)


def sort_out(upstream: Path, files: dict[Path, Path]) -> dict[str, list[Path]]:
    """What the overlay does to each path: replaced, added or, of what upstream tracks in internvl_chat/, left.

    Raises:
        CannotOverlay: a file that git does not track stands where one of ours would go.
    """
    tracked = {Path(name) for name in git(upstream, "ls-files", "-z", "--", "internvl_chat").stdout.split("\0") if name}
    changed = {path for path, ours in files.items() if path not in tracked or not same(ours, upstream / path)}
    if in_the_way := sorted(str(p) for p in changed - tracked if (upstream / p).exists()):
        raise CannotOverlay(f"untracked files would be overwritten in {upstream}: {', '.join(in_the_way)}")
    return {
        "replaced": sorted(changed & tracked),
        "added": sorted(changed - tracked),
        "left": sorted(tracked - changed),
    }


def check(upstream: Path, branch: str):
    """Raises CannotOverlay unless `upstream` is a clean checkout laid out as upstream, without that branch."""
    if not shutil.which("git"):
        raise CannotOverlay("git is not on PATH")
    if not upstream.is_dir() or git(upstream, "rev-parse", "--show-toplevel", check=False).returncode:
        raise CannotOverlay(f"{upstream} is not a git repository")
    if upstream == ROOT:
        raise CannotOverlay(f"{upstream} is this repository itself; name a checkout of upstream")
    if not (upstream / "internvl_chat/internvl").is_dir() or (upstream / "internvl_chat/shell").is_symlink():
        raise CannotOverlay(f"{upstream} is not laid out as upstream: internvl_chat/internvl and internvl_chat/shell")
    if git(upstream, "rev-parse", "--verify", "HEAD", check=False).returncode:
        raise CannotOverlay(f"{upstream} has no commit yet to make a branch of")
    if changes := git(upstream, "status", "--porcelain", "--untracked-files=no").stdout.splitlines():
        raise CannotOverlay(f"{upstream} has {len(changes)} uncommitted changes; commit or stash them first")
    git(upstream, "check-ref-format", "--branch", branch)
    if not git(upstream, "show-ref", "--verify", f"refs/heads/{branch}", check=False).returncode:
        raise CannotOverlay(f"branch {branch} exists in {upstream}; choose another with --branch")


def overlay(upstream: Path, branch: str, files: dict[Path, Path], fate: dict[str, list[Path]]):
    """Makes the branch, copies what differs and commits it."""
    paths = fate["replaced"] + fate["added"]
    git(upstream, "checkout", "-q", "-b", branch)
    for path in paths:
        (upstream / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files[path], upstream / path)
    # Forced, as upstream's .gitignore does not know our names.
    git(upstream, "add", "--force", "--", *map(str, paths))
    lacking = [key for key in FALLBACK_IDENTITY if git(upstream, "config", key, check=False).returncode]
    identity = [word for key in lacking for word in ("-c", f"{key}={FALLBACK_IDENTITY[key]}")]
    message = MESSAGE.format(**{kind: len(listed) for kind, listed in fate.items()})
    git(upstream, *identity, "commit", "-q", "--no-verify", "-m", message)  # their hooks would restyle our files


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("upstream", metavar="UPSTREAM_DIR", type=Path, help="git checkout of upstream, its root")
    parser.add_argument("--dry-run", action="store_true", help="list what would happen to which file; write nothing")
    parser.add_argument("--branch", default="overlay", help="name of the new branch (default: %(default)s)")
    args = parser.parse_args()
    upstream = args.upstream.resolve()

    try:
        check(upstream, args.branch)
        files = our_files()
        fate = sort_out(upstream, files)
        if not fate["replaced"] + fate["added"]:
            raise CannotOverlay(f"{upstream} holds all of these files already")
        before = git(upstream, "rev-parse", "--abbrev-ref", "HEAD").stdout.strip()
        if before == "HEAD":  # detached
            before = git(upstream, "rev-parse", "HEAD").stdout.strip()
        if not args.dry_run:
            overlay(upstream, args.branch, files, fate)
    except CannotOverlay as error:
        sys.exit(f"overlay_upstream.py: {error}.")

    for kind, paths in fate.items():
        print(f"{kind}: {len(paths)} files")
        if args.dry_run:
            print("".join(f"  {path}\n" for path in paths), end="")
    if not args.dry_run:
        print(f"the patch: git -C {upstream} diff {before}..{args.branch}")
        print(f"undo:      git -C {upstream} checkout {before}")


if __name__ == "__main__":
    main()
