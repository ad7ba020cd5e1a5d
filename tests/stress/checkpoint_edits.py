"""Edit a checkpoint as an attacker or a broken disk would, and resume from it.

    python tests/stress/checkpoint_edits.py [--only TEXT] [--part 0/1]

Each edit changes one value or file of a valid checkpoint and writes a new, valid manifest. Resuming must then end in
the result of the unbroken run, or in one sentence that names the file. `list_edits` enumerates the edits.
"""

import argparse
import json
import os
import re
import shutil
import socket
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from helpers.paths import GOLDENS_ARCHIVE
from helpers.training_runs import TRAIN_ADAPTERS, build_run_flags, prepare_trainer, train_in_process
from safetensors import safe_open
from safetensors.torch import save_file
from stress.fuzzing import make_source, quiet_case
from stress.mutations import iterate_paths

from internvl.arguments.training import parse_args
from internvl.checkpoint.manifest import MANIFEST_FILE, write_manifest
from internvl.checkpoint.resume import choose_resume_checkpoint

TRAIN_FLAGS = [*TRAIN_ADAPTERS, *"--freeze_mlp False --no_smoke_save True --save_steps 2".split()]
CASE_TIMEOUT_SECONDS = 60
# Values of a leaf in JSON or in a pickle. A deeply nested one is parsed by recursion.
LEAF_VALUES = [None, True, -5, 10**12, 1e308, float("nan"), float("inf"), "x", "../../x", [], {}, [[{}]]]
# Values for which a run may have another, valid result: another plan, other flags, a run without moments.
OTHER_RESULTS = r"data_state.json segments.0.layout|flags.json"
DEEP_JSON = '{"a":' * 100_000 + "1" + "}" * 100_000
LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


class Edit(NamedTuple):
    """A change of a checkpoint, and whether its manifest is written again."""

    name: str
    apply: Callable[[Path], object]
    updates_manifest: bool = True


# -- files -------------------------------------------------------------------------------------------------------------


def replace_by_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def replace_by_socket(file: Path) -> None:
    file.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(file.parent, os.O_RDONLY)  # the path itself may be too long for a socket
        server.bind(f"/proc/self/fd/{folder}/{file.name}")
        os.close(folder)


def replace_by_link(file: Path) -> None:
    """Move a file out of the run and link to it."""
    outside = file.parents[2] / "outside"
    shutil.move(file, outside)
    file.symlink_to(outside)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


FILE_EDITS = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3]),
    "pointer of Git LFS": lambda file: file.write_text(LFS_POINTER),
    "folder": replace_by_folder,
    "FIFO": replace_by_fifo,
    "socket": replace_by_socket,
    "link": replace_by_link,
}

# -- JSON --------------------------------------------------------------------------------------------------------------


def edit_json(file: Path, path: tuple, change_fn: Callable) -> None:
    """Call `change_fn(parent, key)` for the value at a path in a JSON file."""
    tree = json.loads(file.read_text())
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    change_fn(parent, path[-1])
    file.write_text(json.dumps(tree))


def set_value(parent, key, value) -> None:
    parent[key] = value


def list_json_edits(name: str, content: str) -> Iterator[Edit]:
    """List edits of a JSON file: each value replaced or removed."""
    for path in filter(None, iterate_paths(json.loads(content))):
        for value in LEAF_VALUES:
            change_fn = partial(set_value, value=value)
            yield Edit(f"{name} {'.'.join(map(str, path))} = {value!r}", _at(name, edit_json, path, change_fn))
        yield Edit(f"{name} without {'.'.join(map(str, path))}", _at(name, edit_json, path, lambda p, key: p.pop(key)))
    for text in ("[]", "1", "{", DEEP_JSON, "\ufeff" + content):
        yield Edit(f"{name} {text[:9]!r}", _at(name, lambda file, text=text: file.write_text(text)))
    yield Edit(f"{name} not in UTF-8", _at(name, lambda file: file.write_bytes(b'{"a": "\xff"}')))


def _at(name: str, edit_fn: Callable, *args) -> Callable[[Path], object]:
    return lambda checkpoint: edit_fn(checkpoint / name, *args)


# -- tensors -----------------------------------------------------------------------------------------------------------


def set_first_to_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone().float()
    tensor.flatten()[0] = torch.nan
    return tensor


TENSOR_EDITS = {
    "transposed": lambda tensor: tensor.T.contiguous() if tensor.ndim == 2 else tensor[None],
    "integers": lambda tensor: tensor.to(torch.int32),
    "NaN": set_first_to_nan,
    "twice as long": lambda tensor: torch.cat([tensor, tensor]) if tensor.ndim else tensor.repeat(2),
    "empty": lambda tensor: tensor.flatten()[:0],
}


def edit_safetensors(file: Path, change_fn: Callable[[dict, dict], object]) -> None:
    """Call `change_fn(tensors, metadata)` for the content of a safetensors file."""
    with safe_open(file, "pt") as opened:
        tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    change_fn(tensors, metadata)
    save_file(tensors, file, metadata=metadata)


def list_safetensors_edits(name: str, file: Path) -> Iterator[Edit]:
    with safe_open(file, "pt") as opened:
        first, metadata = next(iter(opened.keys())), opened.metadata() or {}
    changes = {
        f"{first} {kind}": partial(_change_tensor, name=first, change_fn=fn) for kind, fn in TENSOR_EDITS.items()
    }
    changes[f"without {first}"] = lambda tensors, metadata: tensors.pop(first)
    changes["another tensor"] = lambda tensors, metadata: tensors.update(other=torch.zeros(2))
    for key in metadata:
        for value in ("", "x", "-5", "1e308", "9" * 30, "NaN", "[]", "{}", DEEP_JSON[:20_000]):
            changes[f"{key} = {value[:9]!r}"] = lambda t, metadata, key=key, value=value: metadata.update({key: value})
        changes[f"without {key}"] = lambda tensors, metadata, key=key: metadata.pop(key)
    for kind, change_fn in changes.items():
        yield Edit(f"{name} {kind}", _at(name, edit_safetensors, change_fn))


def _change_tensor(tensors: dict, metadata: dict, name: str, change_fn: Callable) -> None:
    tensors[name] = change_fn(tensors[name])


def edit_pickle(file: Path, path: tuple, change_fn: Callable) -> None:
    """Replace the value at a path in a file of `torch.save`."""
    states = torch.load(file, weights_only=False)
    torch.save(_replace(states, path, change_fn), file)


def _replace(tree, path: tuple, change_fn: Callable):
    if not path:
        return change_fn(tree)
    key, *rest = path
    if isinstance(tree, tuple):
        return (*tree[:key], _replace(tree[key], tuple(rest), change_fn), *tree[key + 1 :])
    tree[key] = _replace(tree[key], tuple(rest), change_fn)
    return tree


def list_pickle_edits(name: str, file: Path) -> Iterator[Edit]:
    """List edits of a file of `torch.save`: each tensor and number, of lists the first two."""
    for path, value in _iterate_states(torch.load(file, weights_only=False)):
        changes = {repr(other): lambda _, other=other: other for other in LEAF_VALUES if not isinstance(value, dict)}
        if isinstance(value, torch.Tensor):
            changes = TENSOR_EDITS | {"x": lambda _: "x"}
        if isinstance(value, dict):
            changes = {"{}": lambda _: {}, "'x'": lambda _: "x"}
        for kind, change_fn in changes.items():
            yield Edit(f"{name} {'.'.join(map(str, path))} = {kind}", _at(name, edit_pickle, path, change_fn))


def _iterate_states(tree, path=()) -> Iterator[tuple[tuple, object]]:
    yield path, tree
    items = list(tree.items()) if isinstance(tree, dict) else []
    if isinstance(tree, (list, tuple)):
        items = list(enumerate(tree))[:2]
    # Parameters are treated alike: those of the first and of the last one are edited.
    if path == ("state",):
        items = [items[0], items[-1]]
    for key, child in items:
        yield from _iterate_states(child, (*path, key))


# -- manifest ----------------------------------------------------------------------------------------------------------


def list_manifest_edits(checkpoint: Path) -> Iterator[Edit]:
    content = json.loads((checkpoint / MANIFEST_FILE).read_text())
    first = next(iter(content["files"]))
    names = ("../../outside.txt", "/etc/passwd", "\0", "x" * 5000, "\ud800", f"./{first}", f"a/../{first}", "..", "")
    for name in names:
        change_fn = partial(set_value, value=content["files"] | {name: {"size": 1, "crc32": ["00000000"]}})
        yield Edit(f"manifest lists {name[:30]!r}", _at(MANIFEST_FILE, edit_json, ("files",), change_fn), False)
    for edit in list_json_edits(MANIFEST_FILE, json.dumps({"block": 1, "files": {first: content["files"][first]}})):
        if not edit.name.endswith("\ufeff{'"):
            yield edit._replace(updates_manifest=False)
    many = json.dumps({"block": 1, "files": {f"f{i}": {"size": 0, "crc32": ["0"]} for i in range(300_000)}})
    yield Edit("manifest of 300,000 files", _at(MANIFEST_FILE, lambda file: file.write_text(many)), False)
    pickle = {"x": torch.zeros(2)}
    for extra in ("model.safetensors", "optimizer.safetensors", "x.pt"):
        yield Edit(f"unlisted {extra}", _at(extra, lambda file: torch.save(pickle, file)), False)


def list_edits(checkpoint: Path) -> list[Edit]:
    """List all edits of a checkpoint."""
    edits = list(list_manifest_edits(checkpoint))
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        name = str(file.relative_to(checkpoint))
        is_manifest = name == MANIFEST_FILE
        edits += [Edit(f"{name} {kind}", _at(name, edit_fn), not is_manifest) for kind, edit_fn in FILE_EDITS.items()]
        if file.suffix == ".json" and "token" not in name and not is_manifest:
            edits += list_json_edits(name, file.read_text())
        if file.suffix == ".safetensors":
            edits += list_safetensors_edits(name, file)
        if file.suffix in (".pt", ".pth"):
            edits += list_pickle_edits(name, file)
    return edits


# -- runs --------------------------------------------------------------------------------------------------------------


class CheckpointCases:
    """Edits of checkpoint-2 of a run, each resumed to step 3 in this process.

    Args:
        source: inputs of a run, from `fuzzing.make_source`.
        folder: for the runs.
    """

    def __init__(self, source: Path, folder: Path, flags: tuple[str, ...] = ()):
        self.source, self.folder = source, folder
        self.flags = [*TRAIN_FLAGS, *flags, "--max_steps", "3"]
        train_in_process(source, folder / "unbroken", *self.flags)
        self.expected = self.read_result(folder / "unbroken")
        self.edits = list_edits(folder / "unbroken/checkpoint-2")

    def read_result(self, output: Path) -> dict[str, torch.Tensor]:
        tensors = {}
        for file in sorted(output.glob("*/adapter_model.safetensors")) + [output / "trained.safetensors"]:
            with safe_open(file, "pt") as opened:
                names = opened.keys()
                tensors |= {f"{file.relative_to(output)} {name}": opened.get_tensor(name) for name in names}
        return tensors

    def run(self, edit: Edit) -> str:
        """Return `equal`, `error: SENTENCE` or `finding: DETAILS`."""
        output = self.folder / "edited"
        shutil.rmtree(output, ignore_errors=True)
        (output / "checkpoint-2").parent.mkdir(parents=True)
        shutil.copytree(self.folder / "unbroken/checkpoint-2", output / "checkpoint-2")
        for file in self.folder.glob("unbroken/data-*.npz"):
            shutil.copy(file, output)
        edit.apply(output / "checkpoint-2")
        if edit.updates_manifest:
            write_manifest(output / "checkpoint-2", is_writer=True)
        try:
            with quiet_case(CASE_TIMEOUT_SECONDS):
                argv = [*build_run_flags(self.source, output), *self.flags]
                checkpoint = choose_resume_checkpoint(parse_args(argv)[2])
                trainer = prepare_trainer(argv)
                trainer.train(checkpoint)
                trainer.save_model()
        except (ValueError, OSError) as error:
            return judge_error(str(error), edit)
        except BaseException:
            return f"finding: {traceback.format_exc()}"
        result = self.read_result(output)
        if re.search(OTHER_RESULTS, edit.name):
            return "equal"
        is_equal = result.keys() == self.expected.keys() and all(result[n].equal(t) for n, t in self.expected.items())
        return "equal" if is_equal else "finding: another result, without an error"


def judge_error(message: str, edit: Edit) -> str:
    """Judge the message of an error: one short line that names a file of the checkpoint."""
    is_sentence = len(message.splitlines()) == 1 and 20 < len(message) < 1200
    return (
        f"error: {message}" if is_sentence and "checkpoint-2" in message else f"finding: no sentence: {message[:2000]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only edits whose name matches this regular expression")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th edit, from the I-th")
    parser.add_argument("--all", action="store_true", help="also print the results that are right")
    args = parser.parse_args()
    index, num_parts = map(int, args.part.split("/"))
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["INTERNVL_CACHE"] = str(folder / "cache")
        with tarfile.open(GOLDENS_ARCHIVE) as archive:
            archive.extractall(folder / "goldens", filter="data")
        cases = CheckpointCases(make_source(folder / "goldens", folder / "source"), folder / "runs")
        for edit in [edit for edit in cases.edits if re.search(args.only, edit.name)][index::num_parts]:
            result = cases.run(edit)
            kind = result.partition(":")[0]
            counts[kind] = counts.get(kind, 0) + 1
            if args.all or kind == "finding":
                print(f"{edit.name[:200]}\n    {result[-1500:]}", flush=True)
    print(counts)
    sys.exit(1 if "finding" in counts else 0)


if __name__ == "__main__":
    main()
