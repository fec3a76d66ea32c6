"""Every command in the README is run: in a scratch folder, on a few pictures, in the order in which it stands."""

import re
import shlex
from pathlib import Path

import pytest
from graph_tools import foundry, make_short

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
