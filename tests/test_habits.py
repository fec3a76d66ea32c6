"""One definition of the checks: hooks and hosted CI run what `make check` runs."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def checks_of_make():
    """The commands of `make check`, as they stand in the Makefile, without the tests."""
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()][:-1]


def test_hooks_run_the_checks_of_make_with_the_same_tools():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert [hook["entry"] for hook in hooks] == checks_of_make()
    assert len(hooks) == 3
    # The tools of .venv, whose versions tests/test_dependencies.py holds equal to the pins.
    assert {repository["repo"] for repository in config["repos"]} == {"local"}
    assert {(hook["language"], hook["pass_filenames"]) for hook in hooks} == {("system", False)}


def test_hosted_ci_calls_the_script_and_defines_no_check_of_its_own():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands[-1] == ".ci/run"
    assert not any(word in " ".join(commands) for word in ("pytest", "ruff", "mypy", "make"))


def test_links_of_the_guides_exist():
    for page in ("CONTRIBUTING.md", "docs/README.md", "docs/architecture.md"):
        path = ROOT / page
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert target.startswith("http") or (path.parent / target).exists(), (page, target)


def test_the_index_names_every_page_of_the_documentation():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_the_architecture_page_has_a_line_for_each_room():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {path.parent.name for path in (ROOT / "training").glob("*/__init__.py")}
    assert rooms == set(re.findall(r"^\| `(\w+)` \|", page, re.M))
    (root,) = re.findall(r"^\| root modules \| (.*) \|$", page, re.M)
    modules = {path.stem for path in (ROOT / "training").glob("[!_]*.py")}
    assert modules == set(re.findall(r"`(\w+)`", root))
