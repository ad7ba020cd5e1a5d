"""Upstream's path to `tools/upstream/jsonl.py`."""

from internvl.tools.upstream.jsonl import json2jsonl as main

if __name__ == "__main__":
    main()
