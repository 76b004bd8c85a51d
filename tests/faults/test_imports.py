"""Case 16, by reading: nothing that the network imports can run what it receives."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hansa

SOURCE = Path(hansa.__file__).parent
FORBIDDEN_IMPORTS = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "runpy",
    "torch.serialization",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
ENTRIES = ("hansa.network.http", "hansa.network.runtime", "hansa.network.client", "hansa.network.enrolment")


def loaded():
    """The files of hansa that importing both halves of the network loads."""
    ours = "(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'hansa')"
    code = f"import sys, {', '.join(ENTRIES)}\nprint(*{ours}, sep=chr(10))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return sorted({Path(line) for line in found.stdout.split()})


def dangers(tree):
    """Every import and call in a tree that could make code of data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if FORBIDDEN_IMPORTS & {name.name, name.name.split(".")[0]})
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from ([module] if FORBIDDEN_IMPORTS & {module, module.split(".")[0]} else [])
            yield from (f"torch.{name.name}" for name in node.names if (module, name.name) == ("torch", "load"))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            yield node.func.id
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "importlib.import_module"):
            yield ast.unparse(node)
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield "allow_pickle"


def test_case_16_nothing_that_the_network_imports_unpickles_or_evaluates():
    files = loaded()
    assert {"http.py", "client.py", "wire.py", "coordinator.py"} <= {file.name for file in files}
    assert not {
        str(file.relative_to(SOURCE)): found for file in files if (found := list(dangers(ast.parse(file.read_text()))))
    }


@pytest.mark.parametrize(
    ("code", "danger"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import torch.serialization as t", "torch.serialization"),
        ("def f(x):\n    return eval(x)", "eval"),
        ("torch.load(path)", "torch.load"),
        ("from torch import load", "torch.load"),
        ("importlib.import_module(name)", "importlib.import_module"),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
    ],
)
def test_case_16_the_reading_finds_what_it_looks_for(code, danger):
    assert danger in list(dangers(ast.parse(code)))
