"""Reading and writing the safetensors files of a checkpoint folder.

Tensors are read one by one and written shard by shard. A model of any size needs the memory of one shard only.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from internvl.model.internvl_chat.safe_loading import refuse_pickles
from internvl.regular_files import read_safetensors_header

StateDict = Mapping[str, torch.Tensor]


class CheckpointTensors(Mapping):
    """The tensors in a folder's safetensors files, each read on access.

    Args:
        rename_fn: name in a file -> key in this mapping.

    Raises:
        ValueError: the folder holds no safetensors file, a damaged one, or a tensor twice.
    """

    def __init__(self, folder: str | Path, rename_fn: Callable[[str], str] = str):
        paths = sorted(Path(folder).glob("*.safetensors"))
        if not paths:
            refuse_pickles(Path(folder))
            raise ValueError(f"no *.safetensors file in {str(folder)!r}")
        self._locations = {}
        for path in paths:
            names, _ = read_safetensors_header(path)
            file = safe_open(path, framework="pt")
            for name in names:
                key = rename_fn(name)
                if key in self._locations:
                    raise ValueError(f"{folder} holds the tensor {key} twice, also in {path.name}: remove one file.")
                self._locations[key] = (file, name)

    def __getitem__(self, key: str) -> torch.Tensor:
        file, name = self._locations[key]
        return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._locations)

    def __len__(self) -> int:
        return len(self._locations)


def abbreviate_names(names: Iterable[str], max_names: int = 5) -> str:
    """Join names of tensors for a message, in order, at most `max_names`."""
    ordered = sorted(names)
    num_more = len(ordered) - max_names
    return ", ".join(ordered[:max_names]) + (f" and {num_more} more" if num_more > 0 else "")


def save_tensors(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, max_shard_bytes: int = 5 * 10**9) -> None:
    """Save tensors as `model*.safetensors`, with an index for several files.

    At most one shard is in memory. A tensor larger than `max_shard_bytes` gets its own file.
    """
    shard, shard_bytes, total_bytes, names_by_shard = {}, 0, 0, []
    for name, tensor in tensors:
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            names_by_shard.append(_save_shard(shard, folder, len(names_by_shard)))
            shard, shard_bytes = {}, 0
        shard[name] = tensor.contiguous()
        shard_bytes, total_bytes = shard_bytes + tensor.nbytes, total_bytes + tensor.nbytes
    names_by_shard.append(_save_shard(shard, folder, len(names_by_shard)))
    # File names contain the number of shards, which is known only now.
    num_shards = len(names_by_shard)
    if num_shards == 1:
        file_names = ["model.safetensors"]
    else:
        file_names = [f"model-{number:05}-of-{num_shards:05}.safetensors" for number in range(1, num_shards + 1)]
    for index, file_name in enumerate(file_names):
        (folder / f"{index}.part").rename(folder / file_name)
    if num_shards > 1:
        weight_map = {n: file_name for file_name, names in zip(file_names, names_by_shard, strict=True) for n in names}
        text = json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n")


def _save_shard(shard: dict[str, torch.Tensor], folder: Path, index: int) -> list[str]:
    save_file(shard, folder / f"{index}.part", metadata={"format": "pt"})
    return list(shard)


def compute_l2_distance(tensors: StateDict, reference: StateDict) -> dict[str, float]:
    """Print and return the L2 distance of each common tensor.

    Tensors that are in one mapping only or differ in shape are counted, not compared.
    """
    common = [name for name in tensors if name in reference and tensors[name].shape == reference[name].shape]
    distances = {name: (tensors[name].float() - reference[name].float()).norm().item() for name in common}
    for name, distance in distances.items():
        print(f"{name}: {distance:.6g}")
    total = sum(distance**2 for distance in distances.values()) ** 0.5
    num_others = len({*tensors, *reference}) - len(common)
    print(f"L2 distance of {len(common)} common tensors: {total:.6g} ({num_others} missing in one or of another shape)")
    return distances
