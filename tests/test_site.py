"""The documentation as a site: it builds without a warning, and no link in it is dead."""

import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.environments import layer_environment, make_layer_or_skip
from helpers.paths import REPO_ROOT


class PageParser(HTMLParser):
    """Collect the ids of a page, its links, and the files that a browser loads with it."""

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.loaded = set(), set(), set()

    def handle_starttag(self, tag, attributes):
        values = {name: value or "" for name, value in attributes}
        self.ids.add(values.get("id"))
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        if tag in ("link", "script", "img"):
            self.loaded.add(values.get("href") or values.get("src") or "")


def read_requirements() -> list[str]:
    """Read the extra `docs` of pyproject.toml."""
    (extra,) = re.findall(r"^docs = \[(.*?)\]$", (REPO_ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    return re.findall(r'"(.+?)"', extra)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, PageParser]:
    """Build the site with `--strict`; return its pages."""
    python = make_layer_or_skip("site", read_requirements())
    folder = tmp_path_factory.mktemp("site")
    command = [python, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    environment = layer_environment(python, NO_MKDOCS_2_WARNING="1")
    done = subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {}
    for path in folder.rglob("*.html"):
        pages[path] = PageParser()
        pages[path].feed(path.read_text(encoding="utf-8"))
    return pages


@pytest.mark.e2e
def test_no_link_is_dead(site):
    dead = []
    for page, parser in site.items():
        for link in parser.links | parser.loaded:
            if re.match(r"https?:|mailto:|data:|javascript:", link) or page.name == "404.html":
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path.partition("?")[0]).resolve() if path not in ("", ".") else page
            if not target.exists() or (anchor and target in site and anchor not in site[target].ids):
                dead.append(f"{page.name}: {link}")
    assert not dead


@pytest.mark.e2e
def test_pages_load_nothing_from_other_servers(site):
    loaded = {link for parser in site.values() for link in parser.loaded if re.match(r"(https?:)?//", link)}
    assert not loaded


@pytest.mark.e2e
def test_all_pages_flags_and_names_are_found_by_the_search(site):
    folder = next(iter(site)).parent
    index = (folder / "search/search_index.json").read_text(encoding="utf-8")
    assert not {page.name for page in site if f'"location":"{page.name}' not in index} - {"404.html"}
    for word in ("--use_backbone_lora", "INTERNVL_CACHE", "wrap_backbone_lora", "internvl doctor"):
        assert word in index, word


@pytest.mark.e2e
def test_the_reference_has_signatures_and_arguments(site):
    (page,) = (path for path in site if path.name == "api.html")
    text = page.read_text(encoding="utf-8")
    assert "internvl.model.internvl_chat.modeling_internvl_chat.InternVLChatModel.chat" in site[page].ids
    assert "num_patches_list" in text and "number of tiles of each image" in text
    assert ":::" not in text
