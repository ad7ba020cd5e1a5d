"""The tensors of a checkpoint folder's safetensors files: read one by one, written shard by shard.

What `hf_format` converts comes from here and goes back here; a model of any size passes through the
memory of one shard.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from internvl.model.internvl_chat.safe_loading import refuse_pickles

Tensors = Mapping[str, torch.Tensor]


class Checkpoint(Mapping):
    """The tensors of a folder's safetensors files, each read when it is asked for; `rename` changes their names."""

    def __init__(self, folder: str | Path, rename: Callable[[str], str] = str):
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            refuse_pickles(Path(folder))
            raise ValueError(f"no *.safetensors file in {str(folder)!r}")
        opened = [safe_open(file, framework="pt") for file in files]
        self._found = {rename(name): (file, name) for file in opened for name in file.keys()}  # noqa: SIM118 (no dict)

    def __getitem__(self, name: str) -> torch.Tensor:
        file, stored = self._found[name]
        return file.get_tensor(stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def save_tensors(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, shard_bytes: int = 5 * 10**9) -> None:
    """Writes `model*.safetensors`, and an index if there are several; never holds more than one shard in memory."""
    shard, size, names, total = {}, 0, [], 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            names.append(_save_shard(shard, folder, len(names)))
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    names.append(_save_shard(shard, folder, len(names)))
    files = ["model.safetensors"] if len(names) == 1 else _numbered(len(names))
    for number, file in enumerate(files):
        (folder / f"{number}.part").rename(folder / file)
    if len(files) > 1:
        index = {name: file for file, inside in zip(files, names, strict=True) for name in inside}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n")


def _numbered(count: int) -> list[str]:
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _save_shard(shard: dict[str, torch.Tensor], folder: Path, number: int) -> list[str]:
    save_file(shard, folder / f"{number}.part", metadata={"format": "pt"})
    return list(shard)


def compute_l2_distance(tensors: Tensors, reference: Tensors) -> dict[str, float]:
    """Prints, and returns by name, the L2 distance of every tensor that both have; prints that of all together."""
    common = [name for name in tensors if name in reference and tensors[name].shape == reference[name].shape]
    distances = {name: (tensors[name].float() - reference[name].float()).norm().item() for name in common}
    for name, distance in distances.items():
        print(f"{name}: {distance:.6g}")
    total = sum(distance**2 for distance in distances.values()) ** 0.5
    others = len({*tensors, *reference}) - len(common)
    print(f"L2 distance of {len(common)} common tensors: {total:.6g}; {others} are in one only or of another shape")
    return distances
