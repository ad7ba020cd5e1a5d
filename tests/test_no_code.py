"""No file runs text as code, unpickles code or uses a shell."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(file for folder in ("internvl_chat", "shell") for file in (ROOT / folder).glob("**/*.py"))
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "input", "mktemp", "popen", "getoutput", "getstatusoutput"}
FORBIDDEN_CALLS |= {"os.system", "os.popen", "tempfile.mktemp", "yaml.load", "yaml.unsafe_load", "marshal.loads"}
FORBIDDEN_CALLS |= {
    f"{module}.{name}" for module in ("pickle", "dill", "joblib", "cloudpickle") for name in ("load", "loads")
}
FORBIDDEN_CALLS |= {"pandas.read_pickle", "apply_chat_template", "runpy.run_path", "Unpickler"}
FORBIDDEN_MODULES = {"dill", "joblib", "cloudpickle", "marshal", "shelve", "jinja2", "code", "runpy"}
FORBIDDEN_KEYWORDS = {"shell": True, "trust_remote_code": True, "weights_only": False, "allow_pickle": True}


def format_name(node: ast.AST) -> str:
    """Return `os.system` for `os.system(...)`, `?.train` for `model().train(...)`."""
    if isinstance(node, ast.Attribute):
        return f"{format_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def find_violations(text: str) -> Iterator[str]:
    """Yield forbidden calls, keywords and imports in a source text."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = format_name(node.func)
            method = name.rpartition(".")[2]
            loaders = [format_name(keyword.value) for keyword in node.keywords if keyword.arg == "Loader"]
            if name == "yaml.load" and loaders == ["yaml.BaseLoader"]:  # strings, lists and objects; no tags
                continue
            if name in FORBIDDEN_CALLS or (method in FORBIDDEN_CALLS and method not in ("eval", "compile")):
                yield f"line {node.lineno}: {name}()"
            if name == "torch.load" and "weights_only" not in [keyword.arg for keyword in node.keywords]:
                yield f"line {node.lineno}: torch.load without weights_only"
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if keyword.arg in FORBIDDEN_KEYWORDS and value is FORBIDDEN_KEYWORDS[keyword.arg]:
                    yield f"line {node.lineno}: {keyword.arg}={value}"
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module == "yaml":  # its functions are recognized by `yaml.` only
            yield f"line {node.lineno}: from yaml import"
        yield from (
            f"line {node.lineno}: import {name}" for name in names if name.partition(".")[0] in FORBIDDEN_MODULES
        )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_runs_foreign_code(file):
    assert not list(find_violations(file.read_text()))


FORBIDDEN_LINES = [
    "eval(text)",
    "exec(open(path).read())",
    "pickle.load(file)",
    "from yaml import load",
    "yaml.load(text)",
    "yaml.load(text, Loader=yaml.SafeLoader)",
    "import marshal",
    "os.system('ls')",
    "tempfile.mktemp()",
    "subprocess.run('ls', shell=True)",
    "torch.load(path)",
    "torch.load(path, weights_only=False)",
    "AutoModel.from_pretrained(path, trust_remote_code=True)",
    "np.load(path, allow_pickle=True)",
    "tokenizer.apply_chat_template(turns)",
]
ALLOWED_LINES = [
    "model.eval()",
    "re.compile(x)",
    "torch.load(path, weights_only=True)",
    "subprocess.run(['ls'])",
    "np.load(path)",
    "yaml.load(text, Loader=yaml.BaseLoader)",
]


@pytest.mark.parametrize("line", FORBIDDEN_LINES)
def test_forbidden_lines_are_found(line):
    assert len(list(find_violations(line))) == 1


@pytest.mark.parametrize("line", ALLOWED_LINES)
def test_allowed_lines_pass(line):
    assert not list(find_violations(line))
