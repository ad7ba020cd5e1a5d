"""Turns a list of conversations into one a line: `python tools/json2jsonl.py FILE.json` writes FILE.jsonl.

Each record gets its number as `id`; everything else, system turns included, stays as it is.
"""

import argparse
import json
from pathlib import Path

from internvl.command_line import command


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", help="*.json file that holds a list")
    path = Path(parser.parse_args(argv).path)
    if path.suffix != ".json":
        raise ValueError(f"{path} is not named *.json")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # wrong JSON as well as wrong UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} does not hold a list of JSON objects")

    with open(path.with_suffix(".jsonl"), "x", encoding="utf-8") as out:
        for index, record in enumerate(records):
            out.write(json.dumps({**record, "id": index}, ensure_ascii=False) + "\n")
    print(f"{len(records)} records: {out.name}")


if __name__ == "__main__":
    main()
