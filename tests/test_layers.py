"""Check that folders import only from lower layers.

Imports are read from the syntax tree, so those inside functions count, too.
"""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from helpers.paths import PACKAGE_DIR

# Lowest first. Folders on one line do not import each other; a file on the first line may import those to its left.
LAYERS = [
    [
        "versions",
        "internvl",  # the package itself
        "constants",
        "conversation",
        "launchers",
        "nearest_name",
        "tool_parser",
        "recipes",
        "regular_files",
        "command_line",
        "progress",
        "torch_internals",
        "dist_utils",
    ],
    ["arguments", "model"],
    ["data"],
    ["runtime", "metrics"],
    ["planning", "checkpoint"],
    ["evaluation"],
    ["train"],
    ["tools", "patch"],
    ["commands"],
    ["__main__"],
]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(PACKAGE_DIR.glob("internvl/**/*.py")) + sorted(PACKAGE_DIR.glob("tools/**/*.py"))
# Modules at upstream's paths, kept for code that was written for upstream.
FACADES = {f"internvl.train.{name}" for name in ("constants", "dataset", "dataset_packed")}


def get_module_name(file: Path) -> str:
    """Return the dotted name of a file (for `__init__.py`: its package). `internvl.tools` is a link to `tools/`."""
    parts = file.relative_to(PACKAGE_DIR).with_suffix("").parts
    parts = parts if parts[0] == "internvl" else ("internvl", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {get_module_name(file): file for file in FILES}


def get_folder(module: str) -> str:
    """Return the entry of LAYERS that a module belongs to."""
    return module.removeprefix("internvl.").split(".")[0]


def is_type_checking_block(node: ast.AST) -> bool:
    """Return whether this is `if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def read_imports(module: str) -> set[str]:
    """Return the modules that a module imports, anywhere in its file.

    A relative import is resolved, and `from package import module` counts as an import of that module.
    """
    file, imports = MODULES[module], set()
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    tree = ast.parse(file.read_text())
    types_only = {id(node) for block in ast.walk(tree) if is_type_checking_block(block) for node in ast.walk(block)}
    for node in (node for node in ast.walk(tree) if id(node) not in types_only):
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            base = base if node.level else node.module
            imports |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return imports


def add_packages(modules: Iterable[str]) -> Iterator[str]:
    """Yield each module and the packages around it, whose `__init__.py` runs, too."""
    for module in modules:
        parts = module.split(".")
        yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def find_reachable_modules(module: str) -> set[str]:
    """Return every module that this one imports, directly or through others."""
    reachable, todo = set(), [module]
    while todo:
        for name in set(add_packages(read_imports(todo.pop()))) - reachable:
            reachable.add(name)
            if name in MODULES:
                todo.append(name)
    return reachable


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_lower_layers(module):
    own = get_folder(module)
    for name in read_imports(module):
        if not name.startswith("internvl."):
            continue
        other = get_folder(name)
        lower = LEVEL[other] < LEVEL[own]
        left = LEVEL[other] == 0 == LEVEL[own] and LAYERS[0].index(other) < LAYERS[0].index(own)
        assert other == own or lower or left, f"{module} imports {name}, which is not in a layer below"


@pytest.mark.parametrize("module", [name for name in MODULES if get_folder(name) in ("data", "planning")])
def test_data_and_planning_reach_no_process_group(module):
    reachable = find_reachable_modules(module)
    assert not {name for name in reachable if name == "internvl.dist_utils" or name.startswith("torch.distributed")}


def test_programs_and_facades_are_not_imported():
    programs = {f"internvl.train.internvl_chat_{name}" for name in ("finetune", "pretrain", "mpo")}
    top_modules = programs | FACADES | {"internvl.patch"}
    for module in MODULES:
        if module not in top_modules:
            assert not read_imports(module) & top_modules, module


def test_modules_of_train_shadow_no_library():
    """`train/` comes first in the `sys.path` of its programs.

    So each of its modules hides a top-level module of the same name.
    """
    import importlib.machinery
    import sys

    generic = {"image", "metrics", "schedule", "build", "check", "record", "files", "plan", "run", "flops", "lengths"}
    elsewhere = [path for path in sys.path if Path(path) != PACKAGE_DIR / "internvl/train"]
    for file in (PACKAGE_DIR / "internvl/train").glob("*.py"):
        if file.stem not in ("__init__", "constants", "dataset", "trainer"):  # upstream's names, and the loop's
            assert file.stem not in generic
            assert importlib.machinery.PathFinder.find_spec(file.stem, elsewhere) is None, file.stem
