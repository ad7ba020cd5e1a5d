"""Convert Parquet and Arrow tables to JSONL in the cache, one line per row.

Tables may be untrusted. Their values are taken as they are stored: nothing is decoded, and no file that a value names
is opened. `datasets` would decode a column of its types Image, Audio, Video or Pdf while it is read.
"""

import hashlib
import json
import os
import re
import resource
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from typing import Any, BinaryIO

from internvl.constants import shorten
from internvl.data.disk_cache import get_cache_dir, get_file_version, make_cache_file
from internvl.data.file_io import get_extension
from internvl.regular_files import open_regular_file, read_json_object
from internvl.versions import require_package

TABLE_EXTENSIONS = (".parquet", ".arrow")
MAX_SEARCHED_FOLDERS = 1000  # below a folder without a table
JSON_LINES_EXTENSIONS = (".jsonl", ".ndjson", ".jsonlines")
# Split of a file's name: train-00000-of-00002.parquet, test.parquet
SPLIT_NAME = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)
CACHE_VERSION = 1  # of the converted files; raise it whenever rows are written in another way
ROWS_PER_BATCH = 16  # decoded at a time
MAX_COLUMNS = 10_000
MAX_VALUES = 1 << 22  # of a column in a batch; a list of a billion null values takes a few bytes
MAX_MEMORY_BYTES = 1 << 33  # that converting a table may take
# A small file can hold billions of equal rows. The table may have MIN_MAX_ROWS plus one row per byte of its files, and
# the JSONL file MIN_MAX_BYTES plus MAX_EXPANSION times as many bytes.
MIN_MAX_ROWS, MIN_MAX_BYTES, MAX_EXPANSION = 1 << 20, 1 << 30, 200
BUFFER_BYTES = 1 << 20
ARROW_FILE_START = b"ARROW1"  # of the file format; the stream format has no such mark


def convert_table(path: str, name: str) -> str:
    """Convert a table to a JSONL file in the cache; return its path.

    Columns without a value in a row are absent from its record. Embedded files become their size and checksum: see
    `_describe_bytes`.

    Args:
        path: a `.parquet` or `.arrow` file, a folder of `.parquet` files, or one that `Dataset.save_to_disk` wrote.
        name: of the table in messages.

    Raises:
        FileNotFoundError: the table does not exist.
        ValueError: it cannot be read, or takes more memory than MAX_MEMORY_BYTES.
    """
    files = list_table_files(path, name) if os.path.isdir(path) else [path]
    key = json.dumps([CACHE_VERSION, *map(get_file_version, files)])
    stem = str(get_cache_dir() / f"table-{hashlib.sha256(key.encode()).hexdigest()[:24]}")
    return make_cache_file(stem, ".jsonl", partial(_write_rows, files, name))


def list_table_files(folder: str, name: str) -> list[str]:
    """List the files of a folder of `.parquet` files or of a saved dataset.

    The folder may be untrusted: only regular files inside of it are accepted.

    Raises:
        ValueError: the folder is neither, has several splits, or a file of it lies elsewhere.
    """
    names: list = sorted(file for file in os.listdir(folder) if get_extension(file) == ".parquet")
    if not names and os.path.lexists(os.path.join(folder, "state.json")):
        names = _read_saved_dataset(folder, name)
    if not names:
        raise ValueError(f"annotation file {name} {_describe_folder_without_table(folder)}.")
    for file in names:
        _require_file_of_folder(folder, file, name)
    if len(set(names)) < len(names):
        raise ValueError(f"annotation file {name} is invalid: its state.json lists a file twice.")
    splits = {match[1].lower() for file in names if (match := SPLIT_NAME.match(file))}
    if len(splits) > 1:
        raise ValueError(
            f"annotation file {name} has several splits ({', '.join(sorted(splits))}): pass single files, or a folder "
            "with the files of one split."
        )
    return [os.path.join(folder, file) for file in names]


def _describe_folder_without_table(folder: str) -> str:
    """Say what a folder has instead of a table, and what to do."""
    names = sorted(os.listdir(folder))
    if "dataset_dict.json" in names:
        return "has several splits: pass the folder of one split"
    if json_lines := [name for name in names if get_extension(name) in JSON_LINES_EXTENSIONS]:
        return f"is a folder of JSON lines ({json_lines[0]:.80}, ...): pass one file per dataset, or concatenate them"
    for subfolder, _, files in islice(os.walk(folder), MAX_SEARCHED_FOLDERS):
        if any(map(is_annotation_file, files)) and subfolder != folder:
            return f"is a folder whose records are in a folder below: pass {subfolder}, or a file in it"
    if "state.json" not in names and any(get_extension(name) == ".arrow" for name in names):
        return "is a folder without state.json of `datasets.Dataset.save_to_disk`: pass one of its .arrow files"
    return "is a folder, but it has no .parquet files and was not saved by `datasets.Dataset.save_to_disk`"


def is_annotation_file(name: str) -> bool:
    return get_extension(name) in (*JSON_LINES_EXTENSIONS, *TABLE_EXTENSIONS)


def _read_saved_dataset(folder: str, name: str) -> list:
    """Return the names of the Arrow files of a saved dataset, unchecked."""
    _require_file_of_folder(folder, "state.json", name)
    state = read_json_object(os.path.join(folder, "state.json"))
    if state.get("_indices_files"):
        raise ValueError(f"annotation file {name} has an indices mapping: call flatten_indices() before saving it.")
    entries = state.get("_data_files")
    if not isinstance(entries, list):
        raise ValueError(f"{folder}/state.json is invalid: expected a list _data_files, got {shorten(entries)}.")
    return [entry.get("filename") if isinstance(entry, dict) else entry for entry in entries]


def _require_file_of_folder(folder: str, file: object, name: str) -> None:
    """Raise ValueError unless a folder has a regular file of this name."""
    if isinstance(file, str) and file == os.path.basename(file):
        with suppress(OSError, ValueError):  # ValueError: a null character
            # Not `isfile`, which follows links.
            if stat.S_ISREG(os.lstat(os.path.join(folder, file)).st_mode):
                return
    raise ValueError(
        f"annotation file {name}: {shorten(file)} is not a regular file in this folder. Links and files elsewhere are "
        "not supported: copy the file into the folder."
    )


# -- rows --------------------------------------------------------------------------------------------------------------


def _write_rows(files: list[str], name: str, out: BinaryIO) -> None:
    """Write the rows of table files as JSON lines."""
    num_source_bytes = sum(os.path.getsize(file) for file in files)
    max_rows, max_bytes = MIN_MAX_ROWS + num_source_bytes, MIN_MAX_BYTES + MAX_EXPANSION * num_source_bytes
    num_rows = num_bytes = 0
    with _limit_memory(MAX_MEMORY_BYTES):
        for row in _read_rows(files, name):
            # A table has None where a record lacks a column; in JSONL the key is absent.
            record = {key: value for key, value in row.items() if value is not None}
            line = json.dumps(record, ensure_ascii=False, sort_keys=True, default=str).encode() + b"\n"
            num_rows, num_bytes = num_rows + 1, num_bytes + len(line)
            if num_rows > max_rows or num_bytes > max_bytes:
                raise ValueError(
                    f"annotation file {name} is refused: its {num_source_bytes:,} bytes hold more than {max_rows:,} "
                    f"rows or expand to more than {max_bytes:,} bytes."
                )
            out.write(line)


def _read_rows(files: list[str], name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of table files, with the values as they are stored.

    Raises:
        ValueError: a file cannot be read.
    """
    require_package("pyarrow", f"annotation file {name}")
    try:
        for path in files:
            with open_regular_file(path) as file:
                for batch in _read_batches(file, is_parquet=get_extension(path) == ".parquet"):
                    columns = [_read_column(column) for column in batch.columns]
                    for values in zip(*columns, strict=True):
                        yield dict(zip(batch.schema.names, values, strict=True))
    except MemoryError as error:
        raise ValueError(
            f"annotation file {name} is refused: it takes more than {MAX_MEMORY_BYTES / 2**30:g} GiB of memory to read."
        ) from error
    except Exception as error:  # pyarrow raises many types
        raise ValueError(f"annotation file {name} cannot be opened as a table: {error!s:.300}") from error


def _read_batches(file: BinaryIO, is_parquet: bool) -> Iterator[Any]:
    """Yield batches of at most ROWS_PER_BATCH rows of a Parquet or Arrow file."""
    import pyarrow
    from pyarrow import parquet

    if is_parquet:
        # Without `pre_buffer` and threads, with a buffer: pages are read one by one, not all of a row group.
        table = parquet.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False, arrow_extensions_enabled=False)
        _check_columns(table.schema_arrow)
        yield from table.iter_batches(ROWS_PER_BATCH, use_threads=False)
        return
    is_stream = file.read(len(ARROW_FILE_START)) != ARROW_FILE_START
    file.seek(0)
    table = pyarrow.ipc.open_stream(file) if is_stream else pyarrow.ipc.open_file(file)
    _check_columns(table.schema)
    for batch in table if is_stream else map(table.get_batch, range(table.num_record_batches)):
        batch.validate(full=True)  # its offsets are those of the file: they could point outside of its buffers
        for start in range(0, batch.num_rows, ROWS_PER_BATCH):
            yield batch.slice(start, ROWS_PER_BATCH)


def _check_columns(schema: Any) -> None:
    if len(schema) > MAX_COLUMNS or len(set(schema.names)) < len(schema):
        raise ValueError(f"it has {len(schema):,} columns, expected at most {MAX_COLUMNS:,} of different names")


def _read_column(column: Any) -> list:
    """Convert an Arrow column to Python values.

    A value that Python cannot represent, such as the year 300000, becomes a text that says so.
    """
    if (num_values := _count_values(column)) > MAX_VALUES:
        raise ValueError(f"{len(column)} of its rows have {num_values:,} values in a column, expected {MAX_VALUES:,}")
    try:
        values = column.to_pylist()
    except (ValueError, OverflowError):
        values = [_read_scalar(scalar) for scalar in column]
    type_name = str(column.type)
    return [_describe_bytes(value) for value in values] if "binary" in type_name or "bytes" in type_name else values


def _count_values(column: Any) -> int:
    """Count the values of a column, those in its lists and structs included."""
    import pyarrow
    from pyarrow import types

    kind, num_values = column.type, len(column)
    if isinstance(column, pyarrow.ExtensionArray):
        return _count_values(column.storage)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        values = column.dictionary if types.is_dictionary(kind) else column.values
        return num_values * (_count_values(values) if types.is_nested(values.type) else 1)
    if types.is_map(kind):  # whose `flatten` fails in pyarrow 26
        column = column.cast(pyarrow.list_(pyarrow.struct([kind.key_field, kind.item_field])))
    if types.is_union(kind):
        children = [column.field(index) for index in range(kind.num_fields)]
    elif types.is_struct(kind):
        children = column.flatten()
    else:
        children = [column.flatten()] if types.is_nested(kind) else []
    return num_values + sum(map(_count_values, children))


def _read_scalar(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError) as error:
        return f"<{scalar.type} that cannot be read: {error}>"


def _describe_bytes(value: Any) -> Any:
    """Replace embedded files by their paths, if they have no content, or else by size and checksum.

    Columns of the types Image, Audio, Video, ... of `datasets` hold `{"bytes": ..., "path": ...}`. The path is treated
    like any other path of a record.
    """
    if isinstance(value, bytes):
        return {"num_embedded_bytes": len(value), "crc32": f"{zlib.crc32(value):08x}"}
    if isinstance(value, list | tuple):
        return [_describe_bytes(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"} and value["bytes"] is None:
            return value["path"]
        return {key: _describe_bytes(item) for key, item in value.items()}
    return value


@contextmanager
def _limit_memory(num_bytes: int) -> Iterator[None]:
    """Let allocations fail that would take more than `num_bytes` beyond today's memory.

    A page or batch of a few bytes may claim to hold many gigabytes.
    """
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + num_bytes
    if soft_limit != resource.RLIM_INFINITY:
        limit = min(limit, soft_limit)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard_limit))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft_limit, hard_limit))
