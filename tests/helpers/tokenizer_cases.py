"""Reference cases of tokenizers: texts, ids and decoded texts."""

import json
from pathlib import Path


def load_encodings(folder: Path) -> list[dict]:
    """Load the cases of a tokenizer folder of the goldens."""
    return [json.loads(line) for line in (folder / "encodings.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_equals_recorded(tokenizer, folder: Path) -> None:
    """Compare encoding and decoding with all cases of a folder."""
    for row in load_encodings(folder):
        assert tokenizer(row["text"]).input_ids == row["ids"], row["text"]
        assert tokenizer(row["text"], add_special_tokens=False).input_ids == row["ids_no_special"], row["text"]
        assert tokenizer.decode(row["ids"]) == row["decoded"], row["text"]
        assert tokenizer.decode(row["ids"], skip_special_tokens=True) == row["decoded_skip_special"], row["text"]
