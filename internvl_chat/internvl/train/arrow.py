"""Records of a table by number: Parquet and Arrow, read by the datasets library, which maps them into memory.

Beside `jsonl.py`, with the same interface. A column is a key of every record; null means that a record lacks it.
"""

import json
import os
from glob import escape, glob

from internvl.train.files import cache_folder, is_remote


class Table:
    """Rows of a `.parquet` or `.arrow` file, of a folder of `.parquet` files, or of a folder that
    `datasets.Dataset.save_to_disk` wrote.

    Attributes:
        path: as named by the user. file: the same.
        version: what tells this content from another.

    Raises:
        ValueError: it cannot be opened.
    """

    def __init__(self, path: str):
        import datasets

        self.path = self.file = path
        if not os.path.exists(path):
            raise ValueError(f"annotation {path} does not exist (relative paths start at {os.getcwd()}).")
        datasets.disable_progress_bars()
        parquet = sorted(glob(os.path.join(escape(path), "*.parquet"))) if os.path.isdir(path) else [path]
        try:
            if path.endswith(".arrow"):
                self.rows = datasets.Dataset.from_file(path)
            elif os.path.isdir(path) and not parquet:
                self.rows = datasets.load_from_disk(path)
            else:
                self.rows = datasets.Dataset.from_parquet(parquet, cache_dir=str(cache_folder() / "tables"))
        except Exception as error:  # pyarrow and datasets have many of their own
            raise ValueError(f"annotation {path} cannot be opened as a table: {error}") from error
        if not isinstance(self.rows, datasets.Dataset):
            raise ValueError(f"annotation {path} holds several splits, {', '.join(self.rows)}: name the folder of one.")
        self.version = [os.path.abspath(path), len(self.rows), [_status(file) for file in self._files(parquet)]]

    def _files(self, parquet: list[str]) -> list[str]:
        return parquet or sorted(entry["filename"] for entry in self.rows.cache_files)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {key: value for key, value in self.rows[int(index)].items() if value is not None}

    def content(self, index: int) -> bytes:
        """What a row says, the same bytes for the same content."""
        return json.dumps(self[index], sort_keys=True, default=repr).encode()

    def line(self, index: int) -> int:
        """Number of a row, counted from 1."""
        return int(index) + 1


def is_table(path: str) -> bool:
    return not is_remote(path) and (path.endswith((".parquet", ".arrow")) or os.path.isdir(path))


def _status(file: str) -> list:
    status = os.stat(file)
    return [file, status.st_size, status.st_mtime_ns]
