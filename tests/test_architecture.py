"""The rooms of the code: who may import whom, what stays light, and how large a part may be."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("training", "resources", "assets", "jobs")
"""Each imports itself and those before it."""
ROOMS = (
    "tables", "buckets", "config", "images", "models", "annotators", "estimates", "latents", "optimization",
    "curation", "prompts", "runs", "sources", "loop", "sampling", "evaluation", "reports",
)  # fmt: skip
"""Folders of `training/`: each imports itself, those before it, and the modules at the root."""
AT_THE_ROOT = {
    "__init__",
    "commit",
    "errors",
    "manifests",
    "names",
    "progress",
    "records",
    "seeds",
    "toml",
}
WITH_TENSORS = {"annotators", "models", "optimization", "loop", "sampling", "evaluation"}
"""Rooms some of whose modules import torch; all others handle images, tables and files alone."""
MAX_MODULE, MAX_FUNCTION, MAX_PARAMETERS = 450, 70, 8
LOOP = {("training/loop/trainer.py", "run")}
"""The training loop is read in one piece."""


def sources(*layers):
    """Module name to its syntax tree, for all modules of these packages."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
            path.read_text("utf-8")
        )
        for layer in layers
        for path in sorted((ROOT / layer).rglob("*.py"))
    }


MODULES = sources(*LAYERS, "demo")


def imported(tree):
    """Names of our modules that one imports anywhere in its text, in functions and for types too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & MODULES.keys() | {name for name in found if name.partition(".")[0] in LAYERS}


def room(module):
    """Place of a module's room in their order; the root's modules are below all."""
    parts = module.split(".")
    is_room = len(parts) > 1 and parts[1] in ROOMS
    return ROOMS.index(parts[1]) if is_room else -1


def test_layers_import_downwards():
    for module, tree in MODULES.items():
        layer = module.partition(".")[0]
        if layer == "demo":
            above = set(LAYERS) - {"training"}
        else:
            above = set(LAYERS[LAYERS.index(layer) + 1 :]) | (
                {"demo"} if layer == "training" else set()
            )
        assert not {name for name in imported(tree) if name.partition(".")[0] in above}, module


def test_rooms_import_downwards():
    for module, tree in MODULES.items():
        if module.startswith("training."):
            higher = {
                name
                for name in imported(tree)
                if name.startswith("training.") and room(name) > room(module)
            }
            assert not higher, module


def test_nothing_lies_flat_in_the_library():
    assert {path.stem for path in (ROOT / "training").glob("*.py")} == AT_THE_ROOT
    assert {path.parent.name for path in (ROOT / "training").glob("*/__init__.py")} == set(ROOMS)


def test_no_modules_import_each_other_in_a_circle():
    graph = {
        module: {name for name in imported(tree) if name in MODULES and name != module}
        for module, tree in MODULES.items()
    }
    packages = {
        module for module in graph if any(other.startswith(f"{module}.") for other in graph)
    }
    modules = {name: graph[name] - packages for name in graph.keys() - packages}
    try:
        TopologicalSorter(modules).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_library_imports_without_dagster_and_mlflow():
    code = (
        "import sys, pkgutil, importlib\n"
        "for name in ('dagster', 'mlflow', 'assets', 'resources', 'jobs'): sys.modules[name] = None\n"
        "import training\n"
        "for module in pkgutil.walk_packages(training.__path__, 'training.'):\n"
        "    importlib.import_module(module.name)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd="/")


def test_what_handles_images_and_tables_imports_without_torch():
    rooms = sorted(set(ROOMS) - WITH_TENSORS)
    code = (
        "import sys, pkgutil, importlib\n"
        "for name in ('torch', 'transformers', 'diffusers'): sys.modules[name] = None\n"
        "import training\n"
        "for module in pkgutil.walk_packages(training.__path__, 'training.'):\n"
        f"    if not module.ispkg and module.name.split('.')[1] in {rooms + sorted(AT_THE_ROOT)}:\n"
        "        importlib.import_module(module.name)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd="/")


def test_no_postponed_annotations():
    """Dagster reads annotations at run time."""
    for module, tree in MODULES.items():
        assert "__future__" not in {
            node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
        }, module


def test_modules_and_functions_are_small():
    for layer in (*LAYERS, "demo"):
        for path in sorted((ROOT / layer).rglob("*.py")):
            text, name = path.read_text("utf-8"), path.relative_to(ROOT).as_posix()
            assert text.count("\n") <= MAX_MODULE, name
            for node in ast.walk(ast.parse(text)):
                if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                doc = ast.get_docstring(node, clean=False)
                length = node.end_lineno - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)
                assert length <= MAX_FUNCTION or (name, node.name) in LOOP, f"{name}: {node.name}"


def is_command(node):
    """Whether a function is a command of `foundry`: its parameters are the options that people see."""
    return any("app.command" in ast.unparse(item) for item in node.decorator_list)


def test_public_functions_have_few_parameters():
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if (
                not isinstance(node, ast.FunctionDef)
                or node.name.startswith("_")
                or is_command(node)
            ):
                continue
            arguments = [
                item.arg
                for item in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                if item.arg not in ("self", "cls")
            ]
            assert len(arguments) <= MAX_PARAMETERS, f"{module}: {node.name}"
