"""Print the notes of a release: the section of its version in CHANGELOG.md."""

import argparse
import re
import sys
from pathlib import Path

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"
HEADING = re.compile(r"^## (\S+) \((.+)\)$", re.MULTILINE)  # `## 0.1.0 (2026-12-01)`, or (unreleased)


def extract_release_notes(changelog: str, version: str) -> str:
    """Return the text below the heading of a version.

    Raises:
        ValueError: the version has no section or no date, or its section is empty.
    """
    _, *parts = HEADING.split(changelog)  # version, date and text of each section
    sections = {name: (date, text.strip()) for name, date, text in zip(*[iter(parts)] * 3, strict=True)}
    if version not in sections:
        raise ValueError(f"CHANGELOG.md has no section for version {version!r:.40}: it has {', '.join(sections)}.")
    date, text = sections[version]
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        raise ValueError(f"CHANGELOG.md: expected the date of version {version} (YYYY-MM-DD), got ({date}).")
    if not text:
        raise ValueError(f"CHANGELOG.md: the section of version {version} is empty.")
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version", help="such as 0.1.0, without the v of the tag")
    version = parser.parse_args(argv).version
    try:
        print(extract_release_notes(CHANGELOG.read_text(encoding="utf-8"), version))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
