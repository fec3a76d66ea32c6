"""Workspaces that the whole graph has run on: the demo's, made once a session, and a small one for killing."""

import shutil

import pytest
from graph_tools import foundry, make_small


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo's workspace after `foundry run`; not to be written to."""
    home = tmp_path_factory.mktemp("demo") / "workspace"
    foundry("init", home, "--preset", "demo")
    done = foundry("run", "--home", home)
    (home / "first_run.txt").write_text(done.stdout)
    return home


@pytest.fixture
def demo_copy(demo, tmp_path):
    """A copy of the demo's workspace, to be written to."""
    home = tmp_path / "workspace"
    shutil.copytree(demo, home, symlinks=True)
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
