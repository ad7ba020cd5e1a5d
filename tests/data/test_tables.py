"""Tables give the records of JSONL; their values are not decoded, and nothing outside of them is read."""

import datetime
import decimal
import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.samples import are_samples_equal, make_turns
from packaging.version import Version

from internvl.constants import UnusableSample
from internvl.data import tables
from internvl.data.annotations import open_annotations
from internvl.data.supervised_dataset import LazySupervisedDataset
from internvl.planning.sample_lengths import measure_dataset

RECORDS = [
    {"id": 1, "image": "a.png", "conversations": make_turns("<image>\nWhat is it?", "A house.")},
    {"id": 2, "conversations": make_turns("Hello?", "Yes.", "And?", "No.")},
    {"id": 3, "image": "absent.png", "conversations": make_turns("What?", "A.")},
]
KINDS = ("parquet", "folder of parquet", "arrow stream", "arrow file", "saved")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_table(kind: str, table: pa.Table, folder) -> str:
    """Write a table in a format; return the path to pass as `annotation`."""
    path = folder / f"data.{kind.split()[0]}"
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "folder of parquet":
        path = folder / "shards"
        path.mkdir(exist_ok=True)
        middle = len(table) // 2
        for name, shard in {"0": table[:middle], "1": table[middle:]}.items():
            pq.write_table(shard, path / f"{name}.parquet")
    elif kind == "saved":
        path = folder / "saved"
        datasets.Dataset(table).save_to_disk(path)
    else:
        open_writer = pa.ipc.new_stream if kind == "arrow stream" else pa.ipc.new_file
        with open_writer(path, table.schema) as writer:
            writer.write_table(table)
    return str(path)


def open_table(table: pa.Table, folder, kind: str = "parquet"):
    return open_annotations(write_table(kind, table, folder))


# -- records -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_table_gives_the_samples_of_the_same_records_in_jsonl(make_dataset, tmp_path, kind):
    jsonl = make_dataset(*RECORDS)
    path = write_table(kind, pa.Table.from_pylist(RECORDS), tmp_path)
    entry = {"root": str(tmp_path), "annotation": path}
    table = LazySupervisedDataset("mine", entry, jsonl.tokenizer, 4, jsonl.data_args)
    assert len(table) == 3
    table = pickle.loads(pickle.dumps(table))
    for index in range(2):
        assert are_samples_equal(table.get(index, 0), jsonl.get(index, 0))
    measured, expected = measure_dataset(table, show_progress=False), measure_dataset(jsonl, show_progress=False)
    assert measured.lengths.tolist() == expected.lengths.tolist()
    assert measured.unusable == expected.unusable and len(set(measured.digests.tolist())) == 3
    assert table.describe(2) == f"mine line 3 ({path})"


def test_table_is_converted_once_per_version(tmp_path, cache, monkeypatch):
    path = write_table("parquet", pa.Table.from_pylist(RECORDS), tmp_path)
    first = open_annotations(path)
    with monkeypatch.context() as patch:
        patch.setattr(tables, "_write_rows", lambda *args: 1 / 0)  # a second conversion would fail
        assert open_annotations(path).content_id == first.content_id
    (copy,) = cache.iterdir()
    content = copy.read_bytes()
    copy.write_bytes(content.replace(b"house", b"mouse"))
    assert open_annotations(path)[0] == RECORDS[0] and copy.read_bytes() == content, "a damaged copy is made again"
    times = os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns
    write_table("parquet", pa.Table.from_pylist(RECORDS[::-1]), tmp_path)
    os.utime(path, ns=times)
    assert open_annotations(path)[0] == RECORDS[2]


def make_odd_columns(rows: int = 3) -> dict[str, pa.Array]:
    """Make a column of each Arrow type that JSON lacks, or that Python cannot represent."""
    return {
        "decimal": pa.array([decimal.Decimal("1.5")] * rows),
        "decimal256": pa.array([decimal.Decimal(3)] * rows, pa.decimal256(50, 2)),
        "nanoseconds": pa.array([1] * rows, pa.timestamp("ns", "Europe/Berlin")),
        "far future": pa.array([2**62] * rows, pa.timestamp("s")),
        "far date": pa.array([2**31 - 1] * rows, pa.int32()).cast(pa.date32()),
        "date": pa.array([datetime.date(2020, 1, 1)] * rows),
        "duration": pa.array([5] * rows, pa.duration("ns")),
        "interval": pa.array([(1, 2, 3)] * rows, pa.month_day_nano_interval()),
        "map": pa.array([[("a", 1)]] * rows, pa.map_(pa.string(), pa.int64())),
        "binary": pa.array([b"\xff\0"] * rows),
        "fixed binary": pa.array([b"ab"] * rows, pa.binary(2)),
        "binaries": pa.array([[{"x": [b"1", None]}]] * rows),
        "dictionary": pa.array(["a"] * rows).dictionary_encode(),
        "half": pa.array([np.float16(1.5)] * rows, pa.float16()),
        "NaN": pa.array([float("nan")] * rows),
        "infinity": pa.array([float("-inf")] * rows),
        "large": pa.array(["x"] * rows, pa.large_string()),
        "view": pa.array(["x"] * rows, pa.string_view()),
        "pair": pa.array([[1, 2]] * rows, pa.list_(pa.int64(), 2)),
        "uint64": pa.array([2**64 - 1] * rows, pa.uint64()),
        "uuid": pa.array([b"0" * 16] * rows, pa.uuid()),
        "null": pa.nulls(rows),
        "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((rows, 2, 2))),
        "run ends": pa.RunEndEncodedArray.from_arrays(pa.array([rows], pa.int32()), pa.array(["q"])),
        "union": pa.UnionArray.from_sparse(pa.array([0] * rows, pa.int8()), [pa.array([1] * rows), pa.nulls(rows)]),
        "twice": pa.StructArray.from_arrays([pa.array([1] * rows)] * 2, ["a", "a"]),
    }


NOT_IN_PARQUET = ("interval", "far future", "run ends", "union", "twice")
PRINT_CONTENT_ID = (
    "import sys; from internvl.data.annotations import open_annotations as o; print(o(sys.argv[1]).content_id)"
)


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "arrow file"])
def test_odd_columns_leave_the_records_readable_and_have_stable_checksums(tmp_path, cache, kind):
    columns = make_odd_columns()
    if kind == "parquet":  # which has no such types
        columns = {name: column for name, column in columns.items() if name not in NOT_IN_PARQUET}
    table = pa.Table.from_pylist(RECORDS)
    for name, column in columns.items():
        table = table.append_column(name, column)
    path = write_table(kind, table, tmp_path)
    file = open_annotations(path)
    for index, record in enumerate(RECORDS):
        assert file[index].items() >= record.items() and "null" not in file[index]
    assert (
        file[0]["binary"] == {"num_embedded_bytes": 2, "crc32": f"{zlib.crc32(bytes([255, 0])):08x}"}
        and file[0]["uint64"] == 2**64 - 1
    )
    assert file[0]["far date"].startswith("<date32[day] that cannot be read")
    ids = set()
    for seed in "012":
        environment = os.environ | {"INTERNVL_CACHE": str(tmp_path / f"cache{seed}"), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", PRINT_CONTENT_ID, path]
        ids.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip())
    assert ids == {file.content_id}


def test_checksums_depend_on_embedded_bytes(tmp_path):
    first, second = (
        open_table(pa.table({"id": [1], "image": [{"bytes": content, "path": "a.png"}]}), tmp_path).checksums[0]
        for content in (b"one", b"two")
    )
    assert first != second


def test_text_that_is_not_utf8_spoils_only_its_record(tmp_path):
    texts = pa.array([b"good", b"\xff\xfe"]).view(pa.string())
    file = open_table(pa.table({"id": [1, 2], "text": texts}), tmp_path)
    assert file[0] == {"id": 1, "text": "good"}
    assert file[1]["id"] == 2 and file[1]["text"].startswith("<string that cannot be read: 'utf-8' codec can't decode")


# -- untrusted tables --------------------------------------------------------------------------------------------------

OPENED: list[str] = []


def record_open(event: str, args: tuple) -> None:
    if event in ("open", "subprocess.Popen", "os.posix_spawn", "os.system"):
        OPENED.append(str(args[0]))


sys.addaudithook(record_open)

MEDIA_TYPES = {
    "image": datasets.Image(),
    "audio": datasets.Audio(),
    "video": datasets.Video(),
    "pdf": datasets.Pdf(),
    **({"nifti": datasets.Nifti()} if hasattr(datasets, "Nifti") else {}),  # datasets >= 4.4
}


def write_media_table(kind: str, values: list[dict], name: str, nesting: str, folder) -> str:
    """Write a table whose column `image` has a type of `datasets`, which its metadata names."""
    storage, feature = pa.struct({"bytes": pa.binary(), "path": pa.string()}), MEDIA_TYPES[name]
    types = {"plain": storage, "list": pa.list_(storage), "struct": pa.struct({"x": storage})}
    features = {"plain": feature, "list": datasets.List(feature), "struct": {"x": feature}}
    turns = pa.array([make_turns("What is it?", "A house.")] * len(values))
    table = pa.table(
        {"conversations": turns, "image": pa.array([NESTINGS[nesting](v) for v in values], types[nesting])}
    )
    columns = datasets.Dataset(table).features | {"image": features[nesting]}
    info = {"info": {"features": datasets.Features(columns).to_dict()}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    if kind != "saved":
        return write_table(kind, table, folder)
    path = save_with_state(folder)  # `save_to_disk` itself would read the files
    os.replace(write_table("arrow stream", table, folder), f"{path}/{SHARD}")
    return path


NESTINGS = {"plain": lambda value: value, "list": lambda value: [value], "struct": lambda value: {"x": value}}
MEDIA_COLUMNS = [(name, "plain") for name in MEDIA_TYPES] + [("image", "list"), ("image", "struct")]


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "saved"])
@pytest.mark.parametrize("name, nesting", MEDIA_COLUMNS)
def test_media_columns_are_not_decoded(make_dataset, tmp_path, name, kind, nesting):
    """Their paths obey the root, and their bytes are not read as an image."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "secret.png").write_bytes(b"secret")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) print"
    values = [
        {"bytes": None, "path": str(tmp_path / "secret.png")},
        {"bytes": None, "path": str(tmp_path / "fifo")},
        {"bytes": eps, "path": None},
        {"bytes": None, "path": "absent.png"},
    ]
    path = write_media_table(kind, values, name, nesting, tmp_path)
    jsonl = make_dataset(RECORDS[0])
    root = tmp_path / "root"
    root.mkdir()
    os.rename(tmp_path / "a.png", root / "a.png")
    OPENED.clear()
    entry = {"root": str(root), "annotation": path}
    dataset = LazySupervisedDataset("mine", entry, jsonl.tokenizer, 4, jsonl.data_args)
    embedded = {"num_embedded_bytes": len(eps), "crc32": f"{zlib.crc32(eps):08x}"}
    stored = [value["path"] or {"bytes": embedded, "path": None} for value in values]
    assert [dataset.annotations[index]["image"] for index in range(4)] == [NESTINGS[nesting](v) for v in stored]
    assert len(measure_dataset(dataset, show_progress=False).unusable) == 4
    for index in range(4):
        with pytest.raises(UnusableSample):
            dataset.get(index, 0)
    assert not [opened for opened in OPENED if opened.endswith(("secret.png", "fifo", "gs"))]


def test_path_of_an_image_column_is_an_image(make_dataset, tmp_path):
    image = pa.array([{"bytes": None, "path": "a.png"}])
    path = write_table("saved", pa.Table.from_pylist(RECORDS[:1]).drop("image").append_column("image", image), tmp_path)
    jsonl = make_dataset(RECORDS[0])
    dataset = LazySupervisedDataset(
        "mine", {"root": str(tmp_path), "annotation": path}, jsonl.tokenizer, 4, jsonl.data_args
    )
    assert are_samples_equal(dataset.get(0, 0), jsonl.get(0, 0))


def save_with_state(folder, **changes) -> str:
    """Save a dataset whose `state.json` has other values."""
    path = write_table("saved", pa.Table.from_pylist(RECORDS), folder)
    state = json.loads((folder / "saved/state.json").read_text()) | changes
    (folder / "saved/state.json").write_text(json.dumps(state))
    return path


SHARD = "data-00000-of-00001.arrow"


@pytest.mark.parametrize(
    "files, reason",
    [
        ([{"filename": "/etc/passwd"}], "'/etc/passwd' is not a regular file in this folder"),
        ([{"filename": "../data.arrow"}], "'../data.arrow' is not a regular file in this folder"),
        ([{"filename": "link.arrow"}], "'link.arrow' is not a regular file in this folder"),
        ([{"filename": "fifo.arrow"}], "'fifo.arrow' is not a regular file in this folder"),
        ([{"filename": "absent.arrow"}], "'absent.arrow' is not a regular file in this folder"),
        ([{"filename": "."}], r"'\.' is not a regular file in this folder"),
        ([{"filename": "a\0b"}], "is not a regular file in this folder"),
        ([{"filename": "\ud800"}], "is not a regular file in this folder"),
        ([{"filename": "x" * 5000}], "is not a regular file in this folder"),
        ([{"filename": 3}], "3 is not a regular file in this folder"),
        ([{}], "None is not a regular file in this folder"),
        ([[]], r"\[\] is not a regular file in this folder"),
        ([{"filename": SHARD}] * 2, "lists a file twice"),
        ([], "is a folder, but it has no .parquet files"),
        (None, "expected a list _data_files, got None"),
        ({"a": 1}, "expected a list _data_files"),
    ],
)
def test_saved_dataset_reads_only_files_of_its_folder(tmp_path, files, reason):
    path = save_with_state(tmp_path, _data_files=files)
    write_table("arrow stream", pa.Table.from_pylist(RECORDS), tmp_path)
    (tmp_path / "saved/link.arrow").symlink_to("../data.arrow")
    os.mkfifo(tmp_path / "saved/fifo.arrow")
    OPENED.clear()
    with pytest.raises(ValueError, match=reason):
        open_annotations(path)
    assert not [opened for opened in OPENED if opened.endswith((".arrow", "passwd"))]


def test_folder_of_parquet_reads_only_its_own_files(tmp_path):
    path = write_table("folder of parquet", pa.Table.from_pylist(RECORDS), tmp_path)
    write_table("parquet", pa.Table.from_pylist(RECORDS), tmp_path)
    (tmp_path / "shards/2.parquet").symlink_to("../data.parquet")
    with pytest.raises(
        ValueError, match="'2.parquet' is not a regular file in this folder. Links .* are not supported"
    ):
        open_annotations(path)


def test_settings_of_a_saved_dataset_are_ignored(tmp_path):
    """Its format would give tensors; its other files are not read."""
    path = save_with_state(
        tmp_path, _format_type="torch", _format_kwargs={"device": "cuda:9"}, _format_columns=["id"], _split="x" * 999
    )
    (tmp_path / "saved/dataset_info.json").unlink()
    os.mkfifo(tmp_path / "saved/dataset_info.json")
    assert open_annotations(path)[0] == RECORDS[0]


def test_saved_datasets_that_cannot_be_read_are_reported(tmp_path):
    path = save_with_state(tmp_path, _indices_files=[{"filename": "indices.arrow"}])
    with pytest.raises(ValueError, match=r"saved has an indices mapping: call flatten_indices\(\)"):
        open_annotations(path)
    state = tmp_path / "saved/state.json"
    for text, reason in {
        "[": "is not JSON",
        "[]": "expected a JSON object",
        "[" * 100_000: "nested too deeply",
        '{"a": ' + "9" * 5000 + "}": "is not JSON",
    }.items():
        state.write_text(text)
        with pytest.raises(ValueError, match=f"state.json .*{reason}"):
            open_annotations(path)
    state.unlink()
    os.mkfifo(state)
    with pytest.raises(ValueError, match="'state.json' is not a regular file in this folder"):
        open_annotations(path)


def test_tables_that_cannot_be_opened_are_reported(tmp_path):
    (tmp_path / "a.parquet").write_text(json.dumps(RECORDS))
    (tmp_path / "a.arrow").write_text(json.dumps(RECORDS))
    complete = Path(write_table("arrow file", pa.Table.from_pylist(RECORDS), tmp_path)).read_bytes()
    (tmp_path / "cut.arrow").write_bytes(complete[:-50])
    (tmp_path / "empty").mkdir()
    datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)}).save_to_disk(tmp_path / "splits")
    pq.write_table(pa.Table.from_arrays([pa.array([1])] * 2, ["id", "id"]), tmp_path / "twice.parquet")
    for name, reason in (
        ("a.parquet", "cannot be opened as a table"),
        ("a.arrow", "cannot be opened as a table"),
        ("cut.arrow", "cannot be opened as a table"),
        ("twice.parquet", "cannot be opened as a table: it has 2 columns, expected .* different names"),
        ("empty", "is a folder, but it has no .parquet files and was not saved by"),
        ("splits", "has several splits: pass the folder of one"),
        ("absent.parquet", "does not exist"),
    ):
        with pytest.raises(ValueError, match=f"{name} {reason}"):
            open_annotations(str(tmp_path / name))


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_tables_that_expand_are_refused(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(tables, "MIN_MAX_ROWS", 1000)
    monkeypatch.setattr(tables, "MIN_MAX_BYTES", 1000)
    many = write_table("parquet", pa.table({"id": pa.array([7] * 10_000_000)}), tmp_path)
    with pytest.raises(ValueError, match=r"data.parquet is refused: its [\d,]+ bytes hold more than [\d,]+ rows"):
        open_annotations(many)
    long = write_table("parquet", pa.table({"text": pa.array(["x" * 1_000_000] * 100)}), tmp_path)
    with pytest.raises(ValueError, match="rows or expand to more than"):
        open_annotations(long)
    nulls = write_table("arrow file", pa.table({"null": pa.nulls(1 << 30)}), tmp_path)
    with pytest.raises(ValueError, match="hold more than [0-9,]+ rows"):
        open_annotations(nulls)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("kind", ["list", "list of structs of lists", "large list", "fixed list"])
def test_long_lists_are_refused(tmp_path, kind):
    """A list of a billion null values is a few bytes in the file."""
    offsets, nulls = pa.array([0, 1 << 30], pa.int32()), pa.nulls(1 << 30)
    if kind == "fixed list":
        column = pa.FixedSizeListArray.from_arrays(nulls, 1 << 30)
    elif kind == "large list":
        column = pa.LargeListArray.from_arrays(offsets.cast(pa.int64()), nulls)
    else:
        column = pa.ListArray.from_arrays(offsets, nulls)
    if "structs" in kind:
        column = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), pa.StructArray.from_arrays([column], ["x"]))
    with pytest.raises(ValueError, match="cannot be opened as a table: 1 of its rows have 1,073,741,[0-9]+ values"):
        open_table(pa.table({"list": column}), tmp_path, "arrow stream")


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_memory_of_a_table_is_bounded(tmp_path, monkeypatch, measure_memory_peak, kind):
    """256 MB of zero bytes, which compress to almost nothing."""
    monkeypatch.setattr(tables, "MAX_MEMORY_BYTES", 128 << 20)
    table = pa.table({"blob": pa.array([bytes(256 << 20)], memory_pool=pa.system_memory_pool())})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "data.parquet", compression="zstd", use_dictionary=False)
    else:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(tmp_path / "data.arrow", table.schema, options=options) as writer:
            writer.write_table(table)
    assert (tmp_path / f"data.{kind}").stat().st_size < 1 << 20
    del table
    measure_memory_peak()
    with pytest.raises(ValueError, match=f"data.{kind} is refused: it takes more than 0.125 GiB of memory to read"):
        open_annotations(str(tmp_path / f"data.{kind}"))
    assert measure_memory_peak() < 160 << 20


def test_row_groups_are_read_in_pages(tmp_path, measure_memory_peak):
    """A row group of 300 MB."""
    noise = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8).tobytes()
    blobs = pa.array([noise] * 300, pa.binary(), memory_pool=pa.system_memory_pool())
    table = pa.table({"id": range(300), "blob": blobs})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False, compression="none", write_batch_size=1)
    del table, blobs
    measure_memory_peak()
    assert open_annotations(str(tmp_path / "a.parquet"))[299]["id"] == 299
    assert measure_memory_peak() < 150 << 20


@pytest.mark.parametrize("num_columns", [10_001, 200_000])
def test_tables_of_too_many_columns_are_refused(tmp_path, num_columns):
    table = pa.Table.from_arrays([pa.array([1])] * num_columns, [str(i) for i in range(num_columns)])
    with pytest.raises(ValueError, match=f"it has {num_columns:,} columns, expected at most 10,000"):
        open_table(table, tmp_path, "arrow stream")


def encode_varint(number: int) -> bytes:
    return bytes([number & 127 | 128]) + encode_varint(number >> 7) if number > 127 else bytes([number])


@pytest.mark.skipif(Version(pa.__version__) < Version("26"), reason="pyarrow < 26 crashes: it recurses without a limit")
def test_deeply_nested_parquet_schemas_are_refused(tmp_path):
    """A footer in Thrift's compact format, as no library writes it."""
    group, leaf = b"\x35\x02\x18\x01g\x15\x02\0", b"\x15\x02\x25\x02\x18\x01x\0"
    elements = [b"\x48\x01s\x15\x02\0", *[group] * 300_000, leaf]
    schema = b"\x19\xfc" + encode_varint(len(elements)) + b"".join(elements)
    footer = b"\x15\x02" + schema + b"\x16\0\x19\x0c\0"
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1")
    with pytest.raises(ValueError, match="a.parquet cannot be opened as a table: .*deeply nested"):
        open_annotations(str(path))
