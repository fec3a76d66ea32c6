"""Every command in README and documents is run: in a scratch folder, on a few images, in the order of the page."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from graph_tools import foundry, make_short

from jobs.cli.app import app
from resources.workspace.setup import configure_run
from resources.workspace.store import Store
from training.estimates.cost import RATES_FORMAT
from training.runs import run_folder

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


def test_links_and_images_exist():
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
        if words[0] not in ("init", "buckets", "graph") and "--home" not in words:
            words += ["--home", "my-set"]
        done = foundry(*words, folder=tmp_path)
        if command == "foundry train --run first --stop":
            assert "no trainer is running" in done.stdout
        ran += 1
        if words[0] == "init":
            make_short(tmp_path / "my-set")
    assert ran >= 10


def documented(folder=ROOT / "docs", pages="**/*.md"):
    """Every `foundry …` of the documents, in fenced blocks and code spans, with the page that it stands on."""
    for page in sorted(folder.glob(pages)):
        text = page.read_text("utf-8")
        blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
        lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
        for line in [*lines, *re.findall(r"`(foundry [^`]+)`", text)]:
            for command in line.split("&&"):
                if command.strip().startswith("foundry "):
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


NAMED = {
    "foundry compare", "foundry cost", "foundry forget", "foundry init", "foundry prompts", "foundry sql",
    "foundry train", "foundry train --dry-run",
}  # fmt: skip
"""Spans that name a command and leave out what it needs: its help is asked for instead."""
SHORT = "demo --set num_samples=16" + "".join(
    f" --set {key}=16"
    for key in ("batch.global_batch_size", "batch.micro_batch_size", "optimizer.warmup_samples")
)
FILLED = {
    "A": "base", "B": "demo", "first": "base", "second": "demo", "N": "demo", "NAME": "demo", "R": SHORT,
    "CSV": "prompts.csv", "DIR": "files/images", "E": "sdxl", "FILE": "written.txt", "FOLDER": "~/grids",
    "PLAN": "kohya", "key=value": "step=32",
}  # fmt: skip
"""What stands for a word that a person fills in."""
FILLED_ON = {
    "cost.md": {"N": "away"},
    "latents.md": {"N": "1", "M": "5", "DIR": "files/pictures"},
    "training.md": {"N": "away", "NAME": "new"},
}
"""The same, where a page means something else."""


def forms(command):
    """A command without what its brackets hold, and with it."""
    return list(
        dict.fromkeys(
            [" ".join(re.sub(r"\[[^]]*\]", "", command).split()), re.sub(r"[][]", "", command)]
        )
    )


def stand_ins(folder):
    """What the commands of the documents expect to find beside the workspace `folder / "workspace"`."""
    home = folder / "workspace"
    (folder / "models").mkdir()
    (folder / "models" / "juggernaut.safetensors").symlink_to(ROOT / "demo" / "models" / "base")
    shutil.copytree(next((home / "sample_images").glob("demo@*")), folder / "grids" / "demo")
    shutil.copy(home / "prompts.csv", folder / "prompts.csv")
    (folder / "written.txt").write_text("a red star, five points\na blob\n")
    (folder / "rates.json").write_text(
        json.dumps({"format": RATES_FORMAT, "rates": {"training": 12.0}})
    )


def exported_latents(folder):
    """Latents as another trainer leaves them, and a workspace that has none yet."""
    config = folder / "workspace" / "foundry.toml"
    config.write_text(config.read_text().replace('crop = "random"', 'crop = "centre"'))
    foundry("run", "--select", "latents", folder=folder)
    foundry("latents", "export", "files", "--encoding", "sdxl", folder=folder)
    shutil.rmtree(folder / "workspace" / "latents")


def configured_run(folder):
    """A run that has a configuration and has not been started."""
    recipe, *options = SHORT.split()
    configure_run(folder / "workspace", "away", recipe, options[1::2])


def trained_elsewhere(folder):
    """The run of the bundle, trained and copied back."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    bundle, run = folder / FILLED["DIR"], folder / "workspace" / "runs" / "away"
    subprocess.run(
        [bundle / "start.sh"], env={**os.environ, "PATH": path}, capture_output=True, check=True
    )
    shutil.rmtree(run)
    shutil.copytree(bundle / "runs" / "away", run)


BEFORE = {
    ("latents.md", "foundry latents import DIR --encoding E"): exported_latents,
    ("cost.md", "foundry cost --run N"): configured_run,
    ("training.md", "foundry prompts --run N --n 20 --trace"): configured_run,
    ("training.md", "foundry train --run N"): trained_elsewhere,
}
"""What somebody has done before a command of a page."""


def test_the_tables_of_stand_ins_name_what_the_documents_say():
    said = set(documented(pages="*.md"))
    assert set(BEFORE) <= said
    assert {command for _, command in said} >= NAMED
    assert set(FILLED_ON) <= {page for page, _ in said}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", sorted({page for page, _ in documented(pages="*.md")}))
def test_every_command_of_the_documents_works(page, small_copy, tmp_path):
    """Run in the order in which they stand, with their placeholders filled, in a folder that holds the workspace."""
    stand_ins(tmp_path)
    image_id = Store(small_copy).read("selected_images", ["image_id"])["image_id"][0]
    saved = run_folder.checkpoints(small_copy / "runs" / "demo")[-1]
    filled = FILLED | {"ID…": image_id, "samples_000501760": str(saved)} | FILLED_ON.get(page, {})
    for command in dict.fromkeys(
        command for name, command in documented(pages="*.md") if name == page
    ):
        if command in ELSEWHERE:
            continue
        if command in NAMED:
            foundry(*command.split()[1:], "--help", folder=tmp_path)
            continue
        BEFORE.get((page, command), lambda folder: None)(tmp_path)
        for form in forms(command):
            words = " ".join(filled.get(word, word) for word in form.split()[1:])
            assert not any(word.isupper() for word in words.split()), (
                f"`{command}`: nothing stands for its placeholder"
            )
            foundry(*shlex.split(words.replace("~", str(tmp_path))), folder=tmp_path)
