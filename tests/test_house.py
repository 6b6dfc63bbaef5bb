"""The rules of the house, checked over every file: floors, docstrings, lengths, forbidden calls, configs, links.

Each test collects all offenders, so one run shows everything there is to mend:

    .venv/bin/python -m pytest tests/test_house.py
"""

import ast
import graphlib
import importlib.metadata
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import grimp
import importlinter.cli
import pytest

from herd.run import config

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("herd", "teachers", "students", "quant", "evals", "distill", "sweeps")
BESIDE = ("benchmarks", "tests")
HEAVY = {"torch", "deepspeed", "transformers", "datasets", "mlflow", "matplotlib", "pandas", "optuna"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all"}
TEST_ESCAPES = {"pytest.skip", "pytest.xfail", "pytest.importorskip", "pytest.mark.skip", "pytest.mark.xfail"}


def python_files(*folders: str) -> list[Path]:
    """Python files of the named folders at the root, sorted."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def texts() -> list[Path]:
    """Every file a reader may open: code, docs, configs, build files."""
    loose = [ROOT / name for name in ("Makefile", "pyproject.toml", ".pre-commit-config.yaml", ".ci/run")]
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").rglob("*.yaml")]
    return sorted([*python_files(*ROOMS, *BESIDE), *loose, *pages])


def show(path: Path, line: int | None = None) -> str:
    """`path:line` relative to the root, for messages."""
    return f"{path.relative_to(ROOT)}" + (f":{line}" if line else "")


def dotted(node: ast.AST) -> str:
    """`a.b.c` for a chain of attributes on a name, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (head := dotted(node.value)):
        return f"{head}.{node.attr}"
    return ""


def constant_keywords(call: ast.Call) -> dict[str, object]:
    """Keyword arguments of a call; a value that is not a literal counts as `...`."""
    return {k.arg: k.value.value if isinstance(k.value, ast.Constant) else ... for k in call.keywords if k.arg}


def unsafe_calls(node: ast.Call) -> Iterator[str]:
    """Calls that run foreign code, unpickle, or go through a shell."""
    name, keywords = dotted(node.func), constant_keywords(node)
    if name == "torch.load" and keywords.get("weights_only") is not True:
        yield "torch.load without weights_only=True"
    if name in UNSAFE_CALLS:
        yield f"{name}()"
    if name == "yaml.load" and "Loader" not in keywords:
        yield "yaml.load without a safe Loader"
    for flag in ("trust_remote_code", "allow_pickle", "shell"):
        if keywords.get(flag, False) is not False:
            yield f"{flag} is not False"


def forbidden(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, what) of everything no room may contain."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in unsafe_calls(node))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, f"import {name}") for name in names if name.split(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.Global):
            yield node.lineno, "global statement"
        elif isinstance(node, ast.ExceptHandler) and hides(node):
            yield node.lineno, "an except that hides every error"
        elif isinstance(node, ast.Constant) and node.value == "0.0.0.0":
            yield node.lineno, "a server open to the network"
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node.lineno, "a call at import time"


def hides(handler: ast.ExceptHandler) -> bool:
    """True for `except:` and for a blanket `except Exception: pass`."""
    empty = all(isinstance(node, ast.Pass | ast.Continue) for node in handler.body)
    return handler.type is None or (empty and dotted(handler.type) in {"Exception", "BaseException"})


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a module, inner ones included."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions of a module and methods of its public classes that others may call."""
    scopes = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))]
    for scope in scopes:
        for node in scope.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                yield node


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Physical lines from `def` to the end, docstring included."""
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=flag)",
        "model = AutoModel.from_pretrained(name, trust_remote_code=True)",
        "import pickle",
        "from joblib import load",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
        "yaml.load(text)",
        "def f():\n    global count",
        "try:\n    f()\nexcept:\n    g()",
        "try:\n    f()\nexcept Exception:\n    pass",
        "host = '0.0.0.0'",
        "seed_everything(0)",
    ],
)
def test_each_forbidden_thing_is_found(source: str) -> None:
    assert list(forbidden(ast.parse(source)))


def test_lawful_code_is_not_reported() -> None:
    source = """
def read(path):
    try:
        weights = torch.load(path, weights_only=True)
    except FileNotFoundError:
        pass
    model.eval()
"""
    assert not list(forbidden(ast.parse(source)))


def test_imports_go_down_the_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    code = importlinter.cli.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert code == 0, "a floor is broken; the report above names the import"


def test_no_two_files_import_each_other_in_a_circle() -> None:
    graph = grimp.build_graph(*ROOMS, cache_dir=None)
    edges = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    order = list(graphlib.TopologicalSorter(edges).static_order())  # raises CycleError, which names the circle
    assert len(order) > len(ROOMS)


def test_every_file_opens_with_a_short_docstring() -> None:
    offenders = []
    for path in python_files(*ROOMS, *BESIDE):
        text = path.read_text()
        doc = ast.get_docstring(ast.parse(text)) if text.strip() else "an empty file needs none"
        lines = [line for line in (doc or "").splitlines() if line.strip()]
        if not 1 <= len(lines) <= 6:
            offenders.append(f"{show(path)}: {len(lines)} lines")
    assert not offenders, "\n".join(offenders)


def test_files_and_functions_stay_short() -> None:
    offenders, lengths = [], []
    for path in python_files(*ROOMS, *BESIDE):
        text = path.read_text()
        lines = len(text.splitlines())
        lengths.append(lines)
        if lines > 600:
            offenders.append(f"{show(path)}: {lines} lines, at most 600")
        for node in functions(ast.parse(text)):
            if length(node) > 140:
                offenders.append(f"{show(path, node.lineno)}: {node.name} has {length(node)} lines, at most 140")
    assert not offenders, "\n".join(offenders)
    assert statistics.median(lengths) < 180


def test_no_room_holds_a_forbidden_thing() -> None:
    found = [
        f"{show(path, line)}: {what}"
        for path in python_files(*ROOMS, "benchmarks")
        for line, what in forbidden(ast.parse(path.read_text()))
    ]
    assert not found, "\n".join(found)


def test_no_test_escapes() -> None:
    found = [
        show(path, node.lineno)
        for path in python_files("tests")
        for node in ast.walk(ast.parse(path.read_text()))
        if dotted(node) in TEST_ESCAPES or dotted(node) == "pytest.mark.skipif"
    ]
    assert not found, "\n".join(found)


def test_public_functions_are_annotated() -> None:
    offenders = []
    for path in python_files(*ROOMS):
        for node in public_functions(ast.parse(path.read_text())):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in {"self", "cls"}]
            if bare or node.returns is None:
                offenders.append(f"{show(path, node.lineno)}: {node.name} {', '.join(bare) or 'has no return type'}")
    assert not offenders, "\n".join(offenders)


def test_no_file_in_distill_is_named_like_a_library() -> None:
    # `deepspeed distill/train.py` puts distill/ first on sys.path: a file named like a library would shadow it.
    libraries = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    names = {path.stem for path in (ROOT / "distill").iterdir() if path.stem.isidentifier()} - {"__init__", "__main__"}
    assert names
    assert not names & libraries


def commands() -> list[str]:
    """Modules that `python -m` runs, and the torch-free modules they start from."""
    mains = [path for path in python_files(*ROOMS) if path.name == "__main__.py"]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in mains]


@pytest.mark.parametrize("module", ["herd.run.schema", "herd.run.config", "herd.run.cli", *commands()])
def test_a_command_starts_without_heavy_imports(module: str) -> None:
    # What keeps --help and configuration errors under a second.
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = project["dependencies"] + project["optional-dependencies"]["test"]
    declared = {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in listed}
    providers = importlib.metadata.packages_distributions()
    known = set(sys.stdlib_module_names) | {*ROOMS, *BESIDE}
    offenders = []
    for path in python_files(*ROOMS):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for top in {name.split(".")[0] for name in names} - known:
                if not {name.lower().replace("_", "-") for name in providers.get(top, [])} & declared:
                    offenders.append(f"{show(path, node.lineno)}: {top}")
    assert not offenders, "\n".join(offenders)


def test_every_config_loads() -> None:
    paths = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "sweeps" not in path.parts]
    names = {path.stem: config.load(path, []).run.name for path in paths}
    assert {"smoke", "nano", "scout", "maverick"} <= names.keys()
    assert names["nano"] == "nano", "the Makefile prints runs/nano"


def test_every_link_of_the_docs_leads_to_a_file() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "mlruns" / "README.md"]
    broken = [
        f"{show(page)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
        if "://" not in target and not target.startswith("mailto:") and not (page.parent / target).exists()
    ]
    assert len(pages) > 10
    assert not broken, "\n".join(broken)


def test_every_command_of_the_docs_exists() -> None:
    unknown = [
        f"{show(page)}: {module}"
        for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
        for module in re.findall(r"(?:python -m|--module) ([\w.]+)", page.read_text())
        if module.split(".")[0] in {*ROOMS, *BESIDE} and importlib.util.find_spec(module) is None
    ]
    assert not unknown, "\n".join(unknown)


def test_no_file_names_a_path_of_one_machine() -> None:
    private = re.compile(r"(?<![\w.])/(work|root|home/\w+)/")
    found = [
        show(path, number)
        for path in texts()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if private.search(line) and path != Path(__file__)
    ]
    assert not found, "\n".join(found)


def test_ci_runs_what_a_developer_types() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test"
