"""Workspaces that the whole graph has run on: the demo's, made once a session, and a small one for
changes."""

import shutil

import pytest
from graph_tools import foundry, make_small, shorten


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo's workspace after `foundry run` with short training and few sampling steps; not to
    be written to."""
    home = tmp_path_factory.mktemp("demo") / "workspace"
    foundry("init", home, "--preset", "demo")
    shorten(home / "runs" / "demo" / "config.toml", num_samples="960", every_samples="480")
    shorten(home / "foundry.toml", num_steps="6")
    done = foundry("run", "--home", home)
    (home / "first_run.txt").write_text(done.stdout)
    return home


@pytest.fixture(scope="session")
def whole_demo(tmp_path_factory):
    """The demo's workspace after its two commands, minutes; not to be written to."""
    home = tmp_path_factory.mktemp("whole_demo") / "workspace"
    foundry("init", home, "--preset", "demo")
    foundry("run", "--home", home)
    return home


@pytest.fixture(scope="session")
def small(tmp_path_factory, small_source):
    """A small workspace after an undisturbed run on one thread; not to be written to."""
    home = tmp_path_factory.mktemp("small") / "workspace"
    make_small(home, small_source)
    foundry("run", "--home", home)
    return home


@pytest.fixture
def small_copy(small, tmp_path):
    """A copy of the small workspace, to be written to."""
    home = tmp_path / "workspace"
    shutil.copytree(small, home, symlinks=True)
    return home
