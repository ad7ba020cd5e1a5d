"""Files changed at random, as a generator draws: other bytes, or other values in JSON; for `fuzzing.py`."""

import json
import random
from contextlib import suppress
from pathlib import Path

VALUES = [None, True, False, 0, 1, -1, 2, 3, 0.5, 1e-9, 1e30, float("nan"), float("inf"), 2**31, 2**63, 10**40, "", " "]
VALUES += [
    "a",
    "None",
    "é",
    "\0",
    "\ud800",
    "<image>",
    "<image><image>",
    "<IMG_CONTEXT>",
    "a.png",
    "/",
    "..",
    "{}",
    "x" * 9999,
]
VALUES += [[], {}, [[]], [None], [1, 2], {"": None}, {"a": {"b": []}}, ["a.png"] * 50]
WORDS = [
    "",
    " ",
    "-1",
    "0",
    "1",
    "2",
    "3",
    "0.5",
    "1e-3",
    "1e30",
    "nan",
    "inf",
    "-inf",
    "True",
    "False",
    "None",
    "a",
    "é",
    ".",
]
WORDS += ["/dev/null", "/absent", "[]", "{}", "100000", "99999999999999999999", "x" * 999]
BYTES = [
    b"",
    b"\0",
    b"\n",
    b"\r",
    b'"',
    b"{",
    b"}",
    b"[",
    b",",
    b"\xff",
    b"NaN",
    b"-",
    b"1e999",
    b"\xef\xbb\xbf",
    b"\\u0000",
    b"0" * 400,
]


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    """A byte changed, a piece cut out, doubled or put in, or the end cut off."""
    start = draw.randrange(len(content) + 1)
    end = min(len(content), start + draw.choice([1, 1, 2, 8, 100]))
    ways = [
        content[:start] + bytes([draw.randrange(256)]) + content[end:],
        content[:start] + content[end:],
        content[:end] + content[start:],
        content[:start] + draw.choice(BYTES) + content[start:],
        content[:start],
    ]
    return draw.choice(ways)


def places(tree, path=()):
    """Every value in a JSON value, as the keys that lead to it."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


def changed_json(tree, draw: random.Random):
    """A value replaced, left out, or moved to another key."""
    tree = json.loads(json.dumps(tree))
    every = list(places(tree))
    *path, key = draw.choice([p for p in every if p] or [("",)])
    parent = tree
    for step in path:
        parent = parent[step]
    way = draw.choice(["replace", "replace", "delete", "rename"])
    if not isinstance(parent, dict | list) or not parent:
        return draw.choice(VALUES)
    if way == "delete":
        del parent[key]
    elif way == "rename" and isinstance(parent, dict):
        parent[draw.choice(["", "a", "auto_map", f"{key}s"])] = parent.pop(key)
    else:
        parent[key] = draw.choice(VALUES)
    return tree


def change(file: Path, draw: random.Random) -> str:
    """Change a file of JSON, or of anything, in its place; says how."""
    content = file.read_bytes()
    with suppress(ValueError):  # of JSON that was changed before
        if file.suffix in (".json", ".jsonl") and draw.random() < 0.7:
            return change_value(file, content, draw)
    file.write_bytes(changed_bytes(content, draw))
    return f"{file.name}: other bytes"


def change_value(file: Path, content: bytes, draw: random.Random) -> str:
    lines = content.splitlines() if file.suffix == ".jsonl" else [content]
    number = draw.randrange(len(lines))
    lines[number] = json.dumps(changed_json(json.loads(lines[number]), draw)).encode()
    file.write_bytes(b"\n".join(lines))
    return f"{file.name}: another value in line {number + 1}"
