"""Convert annotation files to JSONL with consecutive ids.

`id` of each record becomes its number. Everything else stays, including system turns (upstream's tools drop them).
"""

import argparse
import json
from pathlib import Path

from internvl.command_line import exit_on_user_error
from internvl.data.annotations import open_annotations
from internvl.regular_files import read_json

MAX_ANNOTATION_BYTES = 2**32


@exit_on_user_error
def json2jsonl(argv=None):
    parser = argparse.ArgumentParser(description="Convert FILE.json, a list of records, to FILE.jsonl.")
    parser.add_argument("path", help="*.json file with a list of records")
    path = Path(parser.parse_args(argv).path)
    if path.suffix != ".json":
        raise ValueError(f"expected a *.json file, got {path}")
    records = read_json(path, MAX_ANNOTATION_BYTES, unique_keys=True)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: expected a list of JSON objects")
    write_numbered_records(records, path.with_suffix(".jsonl"))


@exit_on_user_error
def jsonl2jsonl(argv=None):
    parser = argparse.ArgumentParser(description="Copy FILE.jsonl to FILE_new.jsonl with numbered records.")
    parser.add_argument("path", help="*.jsonl file with one record per line")
    path = parser.parse_args(argv).path
    if not path.endswith(".jsonl"):
        raise ValueError(f"expected a *.jsonl file, got {path}")
    file = open_annotations(path)
    # All records are parsed before the first is written: if one is invalid, no file is written.
    write_numbered_records(
        [file[index] for index in range(len(file))], Path(path.removesuffix(".jsonl") + "_new.jsonl")
    )


def write_numbered_records(records: list[dict], path: Path) -> None:
    """Write records with consecutive ids; FileExistsError if `path` exists."""
    with open(path, "x", encoding="utf-8") as out:
        for index, record in enumerate(records):
            out.write(json.dumps({**record, "id": index}, ensure_ascii=False) + "\n")
    print(f"Records: {len(records)}")
    print(f"Annotation file: {path}")
