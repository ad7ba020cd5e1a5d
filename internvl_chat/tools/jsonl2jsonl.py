"""Numbers the records of an annotation file: `python tools/jsonl2jsonl.py FILE.jsonl` writes FILE_new.jsonl.

Each record gets its number as `id`; everything else, system turns included, stays as it is. Blank lines are left out.
"""

import argparse
import json

from internvl.command_line import command
from internvl.data.annotations import JsonlFile


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", help="*.jsonl file with one record a line")
    path = parser.parse_args(argv).path
    if not path.endswith(".jsonl"):
        raise ValueError(f"{path} is not named *.jsonl")

    file = JsonlFile(path)
    records = [file[index] for index in range(len(file))]  # all of them before a line is written: one may be wrong
    with open(path.removesuffix(".jsonl") + "_new.jsonl", "x", encoding="utf-8") as out:
        for index, record in enumerate(records):
            out.write(json.dumps({**record, "id": index}, ensure_ascii=False) + "\n")
    print(f"{len(records)} records: {out.name}")


if __name__ == "__main__":
    main()
