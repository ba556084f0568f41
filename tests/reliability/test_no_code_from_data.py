"""Nothing in the package can turn text or a stranger's file into running code: read from the source
itself.
"""

import ast
from pathlib import Path

import pytest

import rlfr_vlm

ROOT = Path(rlfr_vlm.__file__).parent
REPOSITORY = ROOT.parent
CALLED = {"eval", "exec", "compile", "__import__"}  # builtins
FORBIDDEN = {
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "cPickle.loads", "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load", "marshal.load", "marshal.loads",
    "shelve.open", "pandas.read_pickle", "pd.read_pickle", "yaml.unsafe_load", "yaml.full_load", "code.interact", "runpy.run_path",
    "sympy.sympify", "sympy.parse_expr", "parse_expr", "sympify",
}  # fmt: skip
SAFE_LOADERS = ("SafeLoader", "CSafeLoader")
# modules that the user names in a config or that are the package's own, and never anything of a
# data set
OWN_CODE = {
    "rlfr_vlm/rewards/custom.py": {"module_spec.loader.exec_module"},
}


def dotted(node: ast.expr) -> str:
    """`a.b.c`; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return f"{left}.{node.attr}" if left else ""
    return ""


def original_names(tree: ast.AST) -> dict[str, str]:
    """What a name in a file is elsewhere: `from os import system as run` makes `run` os.system."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
        elif isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
    return found


def constant(call: ast.Call, name: str) -> object:
    """A keyword's value; ... where it is not a constant, None where it is not given."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
    return None


def dangers(source: str) -> list[str]:
    """Calls in a source that could run what they read, with their lines."""
    tree = ast.parse(source)
    names = original_names(tree)
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = dotted(call.func)
        first, _, rest = name.partition(".")
        full = ".".join(filter(None, (names.get(first, first), rest)))
        why = None
        if name in CALLED or full.startswith("builtins.") or full in FORBIDDEN:
            why = full
        elif constant(call, "shell") not in (None, False):
            why = f"{full}(shell=...)"
        elif full == "torch.load" and constant(call, "weights_only") is not True:
            why = "torch.load without weights_only=True"
        elif full in ("numpy.load", "np.load") and constant(call, "allow_pickle") not in (
            None,
            False,
        ):
            why = "numpy.load(allow_pickle=...)"
        elif full == "yaml.load" and not any(
            dotted(value).endswith(SAFE_LOADERS)
            for value in [*call.args[1:], *(k.value for k in call.keywords)]
        ):
            why = "yaml.load without a safe loader"
        elif constant(call, "trust_remote_code") is True:
            why = f"{full}(trust_remote_code=True)"
        elif full.endswith(".exec_module"):
            why = full
        if why:
            found.append(f"line {call.lineno}: {why}")
    return found


def test_no_source_runs_what_it_reads():
    found = {}
    for path in [
        *ROOT.rglob("*.py"),
        *(REPOSITORY / "scripts").glob("*.py"),
        *(REPOSITORY / "data").glob("*.py"),
    ]:
        name = path.relative_to(REPOSITORY).as_posix()
        allowed = OWN_CODE.get(name, set())
        if bad := [
            line for line in dangers(path.read_text()) if line.partition(": ")[2] not in allowed
        ]:
            found[name] = bad
    assert not found, found


@pytest.mark.parametrize(
    "source",
    [
        "eval(answer)",
        "exec(open(path).read())",
        "__import__(name)",
        "import os\nos.system(command)",
        "from os import system as run\nrun(command)",
        "import subprocess as s\ns.run(command, shell=True)",
        "subprocess.run(command, shell=flag)",
        "import torch\ntorch.load(path)",
        "from torch import load\nload(path, map_location='cpu')",
        "torch.load(path, weights_only=False)",
        "import pickle\npickle.loads(data)",
        "from pickle import load\nload(file)",
        "import numpy\nnumpy.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "from sympy import sympify\nsympify(answer)",
        "spec.loader.exec_module(module)",
    ],
)
def test_negative_control_each_danger_is_seen(source):
    assert dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "ast.literal_eval(text)",
        "torch.load(path, weights_only=True)",
        "subprocess.run(command)",
        "subprocess.run(command, shell=False)",
        "re.compile(pattern)",
        "yaml.safe_load(text)",
        "yaml.load(text, Loader=yaml.CSafeLoader)",
        "pickle.dumps(value)",
        "AutoModel.from_pretrained(path, trust_remote_code=cfg.trust_remote_code)",
    ],
)
def test_what_is_harmless_is_let_pass(source):
    assert dangers(source) == []
