"""Docstrings and comments of the package mention only files that exist."""

import io
import re
import tokenize

import pytest
from helpers.paths import PACKAGE_DIR, REPO_ROOT

MENTIONED_FILE = re.compile(r"(?<![\w./*-])[\w-]+(?:/[\w-]+)*\.(?:py|sh|md)\b")
MODULES = sorted(PACKAGE_DIR.rglob("*.py"))


def list_known_paths() -> set[str]:
    """List the paths of all files, and each path's endings at a folder."""
    files = [
        path for folder in ("internvl_chat", "shell", "tests", "docs") for path in (REPO_ROOT / folder).rglob("*.*")
    ]
    parts = [file.relative_to(REPO_ROOT).parts for file in files]
    return {"/".join(names[start:]) for names in parts for start in range(len(names))}


KNOWN_PATHS = list_known_paths()


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE_DIR)))
def test_files_mentioned_in_docstrings_and_comments_exist(module):
    tokens = tokenize.generate_tokens(io.StringIO(module.read_text()).readline)
    # Docstrings are the strings in triple quotes; paths in other strings are data.
    texts = [t.string for t in tokens if t.type == tokenize.COMMENT or t.string.startswith('"""')]
    mentioned = {name for text in texts for name in MENTIONED_FILE.findall(text)}
    assert not mentioned - KNOWN_PATHS
