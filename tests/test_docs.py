"""Check that the documentation names only what exists: flags, files, variables, links."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from helpers.scripts import load_script

from internvl.commands.table import COMMANDS, CONVERSIONS

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "internvl_chat/tools/README.md",
    ROOT / "tests/README.md",
]
PAGE_NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

# Folders that paths in the pages may be relative to, besides the page's own.
BASE_DIRS = [ROOT / name for name in ("", "internvl_chat", "internvl_chat/internvl", "internvl_chat/tools", "tests")]
TOP_DIRS = (
    *("shell", "tools", "internvl_chat", "internvl", "tests", "docs", "zero_stage_configs", ".ci", ".github"),
    *("docker", "examples"),
)
REPOSITORY_SUFFIXES = (".py", ".sh", ".md", ".sbatch")
# Paths of users, of runs and of other projects.
FOREIGN_PATHS = re.compile(
    r"(/|~|\.\./work_dirs|work_dirs|runs|logs|data|eval|evaluation|FOLDER|pretrained|path/to|adapters|vision_model|mlp1|language_model|unfinished"
    r"|checkpoint-|check_data/|models|done|OUT|ORG|OpenGVLab|model/\.|\.venv)"
    r"|.*://|.*(modeling|tokenization)_"
)
# Flags of other programs -> the program.
FOREIGN_FLAGS = {
    "--backend": "lmdeploy",
    "--bind": "apptainer",
    "--build-arg": "docker and apptainer",
    "--chat-template": "SGLang",
    "--contain": "apptainer",
    "--dry-run": "git and overlay_upstream.py",
    "--durations": "pytest",
    "--enable-lora": "vLLM",
    "--enable-tower-connector-lora": "vLLM",
    "--entrypoint": "docker",
    "--env": "sky",
    "--fast": "tests/run.sh",
    "--generation-config": "vLLM",
    "--help": "any program",
    "--init": "docker",
    "--lora-modules": "vLLM",
    "--max-lora-rank": "vLLM",
    "--mem": "sbatch",
    "--model-path": "SGLang",
    "--nproc_per_node": "torchrun",
    "--ntasks-per-node": "srun",
    "--nv": "apptainer",
    "--partition": "sbatch",
    "--prefix": "kubectl",
    "--rm": "docker",
    "--shm-size": "docker",
    "--strict": "mkdocs",
    "--target": "docker",
    "--trust-remote-code": "servers",
    "--user": "docker",
}
# Variables of other programs, and constants of this package that docs/development.md names.
OTHER_CAPITALS = {"AWS_ENDPOINT_URL", "LLM_TARGETS", "PROMPT_STYLES", "LLM_CLASSES", "LLM_CONFIGS"}
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


@cache
def read_page(name: str) -> str:
    """Read a page, without the former names in the changelog."""
    text = (ROOT / name).read_text(encoding="utf-8")
    table = re.search(r"^\| before \| now \|$.*?(?=^$|\Z)", text, re.MULTILINE | re.DOTALL)
    if table:
        current = "\n".join("|".join(line.split("|")[2:]) for line in table[0].splitlines())
        text = text.replace(table[0], current)
    return text


def list_code(text: str) -> list[str]:
    """List a page's inline code and the lines of its code blocks."""
    return [
        *re.findall(r"`([^`\n]+)`", FENCE.sub("", text)),
        *(line for block in FENCE.findall(text) for line in block.splitlines()[1:-1]),
    ]


@cache
def list_repository_files() -> frozenset[str]:
    """List the files of the top folder and below TOP_DIRS."""
    files = [*ROOT.iterdir(), *(file for folder in TOP_DIRS for file in (ROOT / folder).rglob("*"))]
    return frozenset(str(file.relative_to(ROOT)) for file in files if file.is_file())


@cache
def read_sources() -> str:
    """Read all sources that declare flags of tools or read variables."""
    suffixes = (".py", ".sh", ".sbatch", ".yaml", "Dockerfile")
    files = [file for file in list_repository_files() if file.endswith(suffixes)]
    folders = ("internvl_chat/", "shell/", "docker/", "examples/", "tests/run.sh", "tests/versions.sh")
    return "\n".join((ROOT / file).read_text(encoding="utf-8") for file in files if file.startswith(folders))


@cache
def load_flag_tables():
    return load_script(ROOT / "docs/make_flag_tables.py")


@cache
def list_training_flags() -> frozenset[str]:
    from dataclasses import fields

    from internvl.arguments.preference import PREFERENCE_ARGUMENTS

    return frozenset(f"--{field.name}" for cls in PREFERENCE_ARGUMENTS for field in fields(cls))


def expand_braces(word: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", word)
    if not match:
        return [word]
    before, after = word[: match.start()], word[match.end() :]
    return [full for choice in match[1].split(",") for full in expand_braces(before + choice + after)]


def exists_somewhere(path: str, page: Path) -> bool:
    """Check whether a path exists below the page's folder or BASE_DIRS, or is the name of a recipe.

    It may have braces and wildcards. A name without a folder may be anywhere.
    """
    is_name_only = "/" not in path
    if is_name_only:
        return any(file == path or file.endswith(f"/{path}") for file in list_repository_files())
    return all(
        (ROOT / f"shell/{one}.sh").exists()
        or any((base / one).exists() or any(base.glob(one)) for base in [page.parent, *BASE_DIRS])
        for one in expand_braces(path.rstrip("/"))
    )


def is_repository_path(word: str, is_whole_span: bool) -> bool:
    """Check whether a word of code means a path of this repository."""
    if not re.fullmatch(r"[\w.*{},/-]+", word) or FOREIGN_PATHS.match(word) or word.startswith("-") or "..." in word:
        return False
    if "/" in word:
        return word.split("/")[0] in TOP_DIRS or is_whole_span
    return is_whole_span and word.endswith(REPOSITORY_SUFFIXES) and "*" not in word


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_paths_exist(name):
    missing = {
        word
        for code in list_code(read_page(name))
        for word in code.split()
        if is_repository_path(word, is_whole_span=word == code) and not exists_somewhere(word, ROOT / name)
    }
    assert not missing


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_flags_exist(name):
    flags = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*\b(?!\*)", read_page(name)))
    if name == "docs/configuration.md":
        from internvl.arguments.unsupported_flags import REMOVED_FLAGS

        flags -= {f"--{flag}" for flag in REMOVED_FLAGS}
    flags -= FOREIGN_FLAGS.keys() | list_training_flags()
    # A parser of a tool, or an option of a shell script.
    assert not {flag for flag in flags if not re.search(rf"\"{flag}\"|^ *{flag}\)", read_sources(), re.MULTILINE)}


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_commands_exist(name):
    code = "\n".join(list_code(read_page(name)))
    commands = re.findall(r"(?:^|[ ;&$(])internvl ([a-z][\w-]*)(?: ([a-z][\w-]*))?", code, re.MULTILINE)
    assert {command for command, _ in commands} <= COMMANDS.keys()
    assert {conversion for command, conversion in commands if command == "convert"} <= CONVERSIONS.keys()


def test_every_command_is_documented():
    table = read_page("internvl_chat/tools/README.md").split("## Commands")[1].split("##")[0]
    for names in (COMMANDS.keys() - {"convert"}, CONVERSIONS.keys()):
        assert not {name for name in names if not re.search(rf"`(internvl (convert )?)?{name}`", table)}
    modules = {row.module for row in [*COMMANDS.values(), *CONVERSIONS.values()] if ".tools." in row.module}
    assert not {module for module in modules if f"`{module.split('.')[-1]}.py`" not in table}


def test_every_extra_is_documented():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    extras = re.findall(r"^(\w+) =", project.partition("\n[")[0], re.MULTILINE)
    rows = re.findall(r"^\| (`.*?) \|", read_page("docs/install.md").split("## Extras")[1].split("##")[0], re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(extras)


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_environment_variables_exist(name):
    words = [word for code in list_code(read_page(name)) for word in code.split()]
    capitals = {word.partition("=")[0] for word in words if "=" in word or "_" in word}
    variables = {word for word in capitals if re.fullmatch(r"[A-Z][A-Z0-9_]{3,}", word)} - OTHER_CAPITALS
    assert not {variable for variable in variables if not re.search(rf"\b{variable}\b", read_sources())}


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_log_lines_are_those_of_the_code(name):
    """Check the labels of log lines in code blocks without a language."""
    blocks = [block for block in FENCE.findall(read_page(name)) if block.startswith("```\n")]
    labels = {
        label for block in blocks for label in re.findall(r"^(?:INFO )?([A-Z][a-zA-Z ]{5,}):", block, re.MULTILINE)
    }
    assert not {label for label in labels if f"{label}:" not in read_sources()}


def list_anchors(page: Path) -> set[str]:
    """List the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_links_lead_somewhere(name):
    text = FENCE.sub("", read_page(name))
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<(?:img|a)[^>]*(?:src|href)="([^"]+)"', text)
    broken = []
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        if not target.exists() or (anchor and anchor not in list_anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_every_page_can_be_reached_from_the_readme(name):
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        links = [(page, link) for page in new for link in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text("utf-8"))]
        new = {(page.parent / link).resolve() for page, link in links if "://" not in link} - reached
    assert ROOT / name in reached or name in ("CHANGELOG.md", "docs/index.md")


def test_flag_tables_are_those_of_the_code():
    tables = load_flag_tables()
    listed = " ".join(tables.TOPICS.values()).split()
    assert sorted(listed) == sorted(tables.read_flags())
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.fill_tables(page) == page, "run: python docs/make_flag_tables.py"


def test_every_metric_is_documented():
    """Check that docs/performance.md has all keys of a logging step."""
    from internvl.metrics.step_metrics import combine_rank_reports
    from internvl.metrics.step_timer import STEP_PHASES

    report = {
        "counts": {"flops": 1.0},
        "seconds": dict.fromkeys((*STEP_PHASES, "data"), 1.0),
        "memory_bytes": 1,
        "peak_flops": 1.0,
        "num_steps": 1,
    }
    documented = set(re.findall(r"`(\w+)`", read_page("docs/performance.md")))
    assert combine_rank_reports([report]).keys() <= documented


def test_pages_and_figures_are_not_ignored_by_git():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    ignored = subprocess.run(
        ["git", "-C", str(ROOT), "check-ignore", *map(str, [*PAGES, *ROOT.glob("docs/figures/*")])],
        capture_output=True,
        text=True,
    )
    assert not ignored.stdout
