"""Add the pages outside of docs/ to the site, under their links in the repository.

mkdocs calls `on_files` and `on_page_markdown`; `mkdocs.yml` names this file.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[1]

# Page of the site -> its file in the repository.
OUTSIDE_PAGES = {
    "changelog.md": ROOT / "CHANGELOG.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
    "tests.md": ROOT / "tests/README.md",
    "tools.md": ROOT / "internvl_chat/tools/README.md",
}
MARKDOWN_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+\.md)(#[^)\s]*)?\)")


def on_files(files, config):
    """Add the pages outside of docs/."""
    for uri, path in OUTSIDE_PAGES.items():
        files.append(File.generated(config, uri, content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Replace links to files of the repository by links to pages of the site."""
    pages = {path: uri for uri, path in OUTSIDE_PAGES.items()}
    pages |= {Path(config.docs_dir, file.src_uri): file.src_uri for file in files.documentation_pages()}
    source = OUTSIDE_PAGES.get(page.file.src_uri, Path(config.docs_dir, page.file.src_uri))

    def replace(match: re.Match) -> str:
        uri = pages.get((source.parent / match[1]).resolve())
        # A file that is no page stays: mkdocs reports it.
        return f"]({get_relative_url(uri, page.file.src_uri)}{match[2] or ''})" if uri else match[0]

    return MARKDOWN_LINK.sub(replace, markdown)
