"""Layers of the package, read off the syntax tree: a folder imports only from the folders below it, transitively."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "internvl_chat"
# Lowest first. Folders of a line do not import each other; the files of the first line import those to their left.
LAYERS = [
    ["constants", "conversation", "launchers", "command_line", "dist_utils"],
    ["arguments", "model"],
    ["data"],
    ["runtime", "metrics"],
    ["planning", "checkpoint"],
    ["evaluation"],
    ["train"],
    ["tools", "patch"],
]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(PACKAGE.glob("internvl/**/*.py")) + sorted(PACKAGE.glob("tools/**/*.py"))
# Upstream's paths, for code written for upstream.
FACADES = {f"internvl.train.{name}" for name in ("constants", "dataset", "dataset_packed")}


def module_of(file: Path) -> str:
    """`internvl.data.images` for its file; a package for its `__init__.py`."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def folder_of(module: str) -> str:
    """The entry of LAYERS that a module belongs to."""
    return "tools" if module.startswith("tools") else module.split(".")[1]


def is_for_types(node: ast.AST) -> bool:
    """Whether this is `if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_of(module: str) -> set[str]:
    """Modules that a file imports, anywhere in it; those of this repository by their full names."""
    file, found = MODULES[module], set()
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    tree = ast.parse(file.read_text())
    for_types = {id(node) for block in ast.walk(tree) if is_for_types(block) for node in ast.walk(block)}
    for node in (node for node in ast.walk(tree) if id(node) not in for_types):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            base = base if node.level else node.module
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return found


def with_packages(modules: Iterable[str]) -> Iterator[str]:
    """Also the packages around each module: importing it runs their `__init__.py`."""
    for module in modules:
        parts = module.split(".")
        yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def reached_from(module: str) -> set[str]:
    """Every module that this one imports when it is imported, or when its functions run, directly or not."""
    found, todo = set(), [module]
    while todo:
        for name in set(with_packages(imports_of(todo.pop()))) - found:
            found.add(name)
            if name in MODULES:
                todo.append(name)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module):
    own = folder_of(module)
    for name in imports_of(module):
        if not name.startswith(("internvl.", "tools.")):
            continue
        other = folder_of(name)
        lower = LEVEL[other] < LEVEL[own]
        left = LEVEL[other] == 0 == LEVEL[own] and LAYERS[0].index(other) < LAYERS[0].index(own)
        assert other == own or lower or left, f"{module} imports {name}, which is not in a layer below"


@pytest.mark.parametrize("module", [name for name in MODULES if folder_of(name) in ("data", "planning")])
def test_data_and_planning_reach_no_process_group(module):
    reached = reached_from(module)
    assert not {name for name in reached if name == "internvl.dist_utils" or name.startswith("torch.distributed")}


def test_nobody_imports_programs_and_upstreams_paths():
    programs = {f"internvl.train.internvl_chat_{name}" for name in ("finetune", "pretrain", "mpo")}
    tops = programs | FACADES | {"internvl.patch"}
    for module in MODULES:
        if module not in tops:
            assert not imports_of(module) & tops, module


def test_modules_of_train_shadow_no_library():
    """`train/` is first on `sys.path` of its programs: each of its modules can hide a top-level module of that name."""
    import importlib.machinery
    import sys

    generic = {"image", "metrics", "schedule", "build", "check", "record", "files", "plan", "run", "flops", "lengths"}
    elsewhere = [path for path in sys.path if Path(path) != PACKAGE / "internvl/train"]
    for file in (PACKAGE / "internvl/train").glob("*.py"):
        if file.stem not in ("__init__", "constants", "dataset", "trainer"):  # upstream's names, and the loop's
            assert file.stem not in generic
            assert importlib.machinery.PathFinder.find_spec(file.stem, elsewhere) is None, file.stem
