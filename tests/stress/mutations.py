"""Change files at random: other bytes, or other values in JSON."""

import json
import random
from contextlib import suppress
from pathlib import Path

# fmt: off
JSON_VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 0.5, 1e-9, 1e30, float("nan"), float("inf"), 2**31, 2**63, 10**40, "", " ",
    "a", "None", "é", "\0", "\ud800", "<image>", "<image><image>", "<IMG_CONTEXT>", "a.png", "/", "..", "{}",
    "x" * 9999, [], {}, [[]], [None], [1, 2], {"": None}, {"a": {"b": []}}, ["a.png"] * 50,
]
FLAG_VALUES = [
    "", " ", "-1", "0", "1", "2", "3", "0.5", "1e-3", "1e30", "nan", "inf", "-inf", "True", "False", "None", "a", "é",
    ".", "/dev/null", "/absent", "[]", "{}", "100000", "99999999999999999999", "x" * 999,
]
INSERTED_BYTES = [
    b"", b"\0", b"\n", b"\r", b'"', b"{", b"}", b"[", b",", b"\xff", b"NaN", b"-", b"1e999", b"\xef\xbb\xbf",
    b"\\u0000", b"0" * 400,
]
# fmt: on


def mutate_bytes(content: bytes, generator: random.Random) -> bytes:
    """Change, cut, repeat or insert some bytes, or truncate the end."""
    start = generator.randrange(len(content) + 1)
    end = min(len(content), start + generator.choice([1, 1, 2, 8, 100]))
    mutations = [
        content[:start] + bytes([generator.randrange(256)]) + content[end:],
        content[:start] + content[end:],
        content[:end] + content[start:],
        content[:start] + generator.choice(INSERTED_BYTES) + content[start:],
        content[:start],
    ]
    return generator.choice(mutations)


def iterate_paths(value, path=()):
    """Yield the path of keys to each value inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from iterate_paths(child, (*path, key))


def mutate_json(tree, generator: random.Random):
    """Replace, delete or rename a value inside a JSON value."""
    tree = json.loads(json.dumps(tree))
    paths = list(iterate_paths(tree))
    *path, key = generator.choice([p for p in paths if p] or [("",)])
    parent = tree
    for step in path:
        parent = parent[step]
    mutation = generator.choice(["replace", "replace", "delete", "rename"])
    if not isinstance(parent, dict | list) or not parent:
        return generator.choice(JSON_VALUES)
    if mutation == "delete":
        del parent[key]
    elif mutation == "rename" and isinstance(parent, dict):
        parent[generator.choice(["", "a", "auto_map", f"{key}s"])] = parent.pop(key)
    else:
        parent[key] = generator.choice(JSON_VALUES)
    return tree


def mutate_file(file: Path, generator: random.Random) -> str:
    """Change a file in place and return a description of the change."""
    content = file.read_bytes()
    with suppress(ValueError):  # an earlier mutation has made the JSON invalid
        if file.suffix in (".json", ".jsonl") and generator.random() < 0.7:
            return mutate_json_file(file, content, generator)
    file.write_bytes(mutate_bytes(content, generator))
    return f"{file.name}: other bytes"


def mutate_json_file(file: Path, content: bytes, generator: random.Random) -> str:
    """Change a value in a JSON file or a line of JSONL."""
    lines = content.splitlines() if file.suffix == ".jsonl" else [content]
    number = generator.randrange(len(lines))
    lines[number] = json.dumps(mutate_json(json.loads(lines[number]), generator)).encode()
    file.write_bytes(b"\n".join(lines))
    return f"{file.name}: another value in line {number + 1}"
