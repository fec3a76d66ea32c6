"""pyproject.toml declares what the code imports, and constraints.txt pins all that an installation
with the extra `dev` brings."""

import ast
import importlib.metadata
import itertools
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
NOT_IMPORTED = {"websockets"}
"""Runtime dependencies that uvicorn loads by a name: `ws="websockets-sansio"` in jobs/serve.py."""
NOT_IMPORTED_BY_TESTS = {"mypy", "ruff", "pytest-timeout"}
on_the_pinned_python = pytest.mark.skipif(
    sys.version_info[:2] != (3, 11) or sys.platform != "linux",
    reason="constraints.txt pins what CPython 3.11 on Linux needs",
)


def declared(extra=None):
    """Names of the packages that pyproject.toml asks for."""
    project = PROJECT["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def imported(*folders):
    """Packages whose modules are imported in the folders, wherever in a module."""
    modules = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module)
    owners = importlib.metadata.packages_distributions()
    names = {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names)
    return {canonicalize_name(owner) for name in names for owner in owners.get(name, [])} - {
        "diffusion-foundry"
    }


def one_of(packages):
    """Without mlflow's two parts, which own the same module."""
    return packages - {"mlflow-skinny", "mlflow-tracing"}


def test_runtime_dependencies_are_what_the_packages_import():
    optional = declared("gpu8bit")
    found = one_of(imported(*PACKAGES)) - optional
    assert found == declared() - NOT_IMPORTED
    assert not declared() & declared("dev")


def test_what_only_tests_use_is_a_dependency_of_dev():
    found = one_of(imported("tests", "benchmarks", "docs")) - declared() - declared("gpu8bit")
    assert found == (declared("dev") | {"packaging"}) - NOT_IMPORTED_BY_TESTS


def pins():
    """Package -> version in constraints.txt."""
    text = (ROOT / "constraints.txt").read_text()
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    found = [line.split("==") for line in lines if line]
    assert len(found) == len({canonicalize_name(name) for name, _ in found})
    return {canonicalize_name(name): version for name, version in found}


def needed():
    """Package -> whether another one asks for exactly one version of it, for all that
    `pip install -e '.[dev]'` brings here."""
    project = PROJECT["project"]
    waiting = [
        Requirement(line)
        for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    ]
    seen, exact = set(), {}
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        exact[name] = exact.get(name, False) or str(requirement.specifier).startswith("==")
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            asked = map(Requirement, importlib.metadata.distribution(name).requires or [])
            waiting += [
                item for item in asked
                if (item.marker.evaluate({"extra": extra}) if item.marker else not extra)
            ]  # fmt: skip
    return exact


@on_the_pinned_python
def test_constraints_pin_all_that_is_installed_and_nothing_else():
    pinned, exact = pins(), needed()
    # torch's CUDA build asks for exact versions of NVIDIA's packages; the CPU build has none.
    assert {name for name, fixed in exact.items() if not fixed} - set(pinned) == set()
    assert set(pinned) - set(exact) - declared("gpu8bit") == set()


@on_the_pinned_python
def test_the_installed_versions_are_the_pinned_ones():
    found = {
        name: Version(importlib.metadata.version(name)).public
        for name in set(pins()) & set(needed())
    }
    assert found == {name: pins()[name] for name in found}


def test_the_pins_satisfy_pyproject():
    project = PROJECT["project"]
    pinned = pins()
    for line in itertools.chain(
        project["dependencies"], *project["optional-dependencies"].values()
    ):
        requirement = Requirement(line)
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, line
