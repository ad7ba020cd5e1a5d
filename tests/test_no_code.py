"""Nothing in the package runs text as code, opens a pickle as a program, or asks a shell; over the syntax tree."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(file for folder in ("internvl_chat", "shell") for file in (ROOT / folder).glob("**/*.py"))
CALLS = {"eval", "exec", "compile", "__import__", "input", "mktemp", "popen", "getoutput", "getstatusoutput"}
CALLS |= {"os.system", "os.popen", "tempfile.mktemp", "yaml.load", "yaml.unsafe_load", "marshal.loads"}
CALLS |= {f"{module}.{name}" for module in ("pickle", "dill", "joblib", "cloudpickle") for name in ("load", "loads")}
CALLS |= {"pandas.read_pickle", "apply_chat_template", "runpy.run_path", "Unpickler"}
MODULES = {"dill", "joblib", "cloudpickle", "marshal", "shelve", "jinja2", "yaml", "code", "runpy"}
# Keywords and the values that they must not have.
KEYWORDS = {"shell": True, "trust_remote_code": True, "weights_only": False, "allow_pickle": True}


def name_of(node: ast.AST) -> str:
    """`os.system` of the call `os.system(...)`, `?.train` of `model().train(...)`."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def found(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = name_of(node.func)
            method = name.rpartition(".")[2]
            if name in CALLS or (method in CALLS and method not in ("eval", "compile")):
                yield f"line {node.lineno}: {name}()"
            if name == "torch.load" and "weights_only" not in [keyword.arg for keyword in node.keywords]:
                yield f"line {node.lineno}: torch.load without weights_only"
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if keyword.arg in KEYWORDS and value is KEYWORDS[keyword.arg]:
                    yield f"line {node.lineno}: {keyword.arg}={value}"
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (f"line {node.lineno}: import {name}" for name in names if name.partition(".")[0] in MODULES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_code_comes_from_elsewhere(file):
    assert not list(found(file.read_text()))


BAD = [
    "eval(text)",
    "exec(open(path).read())",
    "pickle.load(file)",
    "from yaml import load",
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
GOOD = [
    "model.eval()",
    "re.compile(x)",
    "torch.load(path, weights_only=True)",
    "subprocess.run(['ls'])",
    "np.load(path)",
]


@pytest.mark.parametrize("line", BAD)
def test_what_is_looked_for_is_found(line):
    assert len(list(found(line))) == 1


@pytest.mark.parametrize("line", GOOD)
def test_what_is_allowed_passes(line):
    assert not list(found(line))
