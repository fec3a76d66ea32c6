"""Every command in the README is run: in a scratch folder, on a few pictures, in the order in which
it stands."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from graph_tools import foundry, make_short

from jobs.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
ELSEWHERE = {
    "make demo": "the fixture `demo` runs its two commands; the clean clone runs make itself",
    "make test": "this is it",
    "make up": "tests/graph/test_ui.py",
    "foundry up": "tests/graph/test_ui.py",
    "pip install -c constraints.txt -e .": "the Makefile, which installed what runs here",
}


def commands():
    """Commands in fenced blocks, then those in code spans, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    spans = re.findall(r"`((?:foundry|make|pip) [^`]+)`", README)
    return list(dict.fromkeys(line for line in [*lines, *spans] if line))


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {command.split()[1] for command in commands() if command.startswith("make ")}
    assert named
    assert named <= targets


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


@pytest.mark.timeout(900)
def test_every_command_works(tmp_path, small_source):
    home = tmp_path / "home"
    home.mkdir()
    (home / "photos").symlink_to(small_source)
    ran = 0
    for command in commands():
        known = [name for name in ELSEWHERE if command.startswith(name)]
        if known or not command.startswith("foundry "):
            assert known, f"`{command}` is run by nothing"
            continue
        words = [word.replace("~", str(home)) for word in shlex.split(command)[1:]]
        if words[0] not in ("init", "buckets") and "--home" not in words:
            words += ["--home", "my-set"]
        done = foundry(*words, folder=tmp_path)
        if command == "foundry train --run first --stop":
            assert "no trainer is running" in done.stdout
        ran += 1
        if words[0] == "init":
            make_short(tmp_path / "my-set")
    assert ran >= 10


def documented():
    """Every `foundry …` of the documents, in fenced blocks and code spans, with the page that it
    stands on."""
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text("utf-8")
        blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
        lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
        for command in [*lines, *re.findall(r"`(foundry [^`]+)`", text)]:
            if command.startswith("foundry ") and "…" not in command:
                yield page.name, " ".join(command.split())


@pytest.mark.parametrize(("page", "command"), sorted(set(documented())))
def test_every_command_of_the_documents_is_one(page, command):
    """Read as the command line reads it, without being run: commands, options and arguments exist.
    Brackets mark what may be left out, capitals what a person fills in."""
    words = shlex.split(re.sub(r"[][|]", " ", command))[1:]
    words = ["1" if word in ("N", "M") else word for word in words]
    entry = typer.main.get_command(app)
    while hasattr(entry, "commands") and words:
        assert words[0] in entry.commands, f"{page}: `{command}`"
        entry = entry.commands[words.pop(0)]
    known = {option for parameter in entry.params for option in parameter.opts}
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert given <= known, f"{page}: `{command}` has no {sorted(given - known)}"
