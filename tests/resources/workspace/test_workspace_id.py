"""An id moves with its workspace, and a copy gets another."""

import os
import shutil

import pytest

from resources.mlflow.tracking import workspace_tracking
from resources.workspace.setup import create
from resources.workspace.workspace_id import workspace_id


@pytest.fixture
def home(tmp_path):
    (tmp_path / "space").mkdir()
    return tmp_path / "space"


def test_an_id_stays_and_differs_from_others(home, tmp_path):
    (tmp_path / "other").mkdir()
    assert workspace_id(home) == workspace_id(home) != workspace_id(tmp_path / "other")


def test_init_writes_it(tmp_path):
    (tmp_path / "pictures").mkdir()
    create(tmp_path / "space", sources=[str(tmp_path / "pictures")], preset=None, tiny=True)
    assert (tmp_path / "space" / "workspace.json").is_file()


def test_a_moved_workspace_keeps_its_id_and_a_copy_gets_its_own(home, tmp_path):
    known = workspace_id(home)
    copy = shutil.copytree(home, tmp_path / "copy")
    assert workspace_id(copy) == workspace_id(copy) != known
    assert workspace_id(home) == known
    moved = home.rename(tmp_path / "moved")
    assert workspace_id(moved) == known
    # What once was its place may be used again.
    home.mkdir()
    assert workspace_id(home) != known
    assert workspace_id(moved) == known


def test_a_copy_of_a_copy_and_one_in_place_of_the_original_are_told_apart(home, tmp_path):
    known = workspace_id(home)
    copy = shutil.copytree(home, tmp_path / "copy")
    again = shutil.copytree(copy, tmp_path / "again")  # before the copy was used
    assert len({known, workspace_id(copy), workspace_id(again)}) == 3


def test_one_folder_with_two_addresses_is_one_workspace(home, tmp_path, monkeypatch):
    known = workspace_id(home)
    # A mount cannot be made here: a folder of hard links has the same files under another address.
    other = tmp_path / "mount"
    other.mkdir()
    os.link(home / "workspace.json", other / "workspace.json")
    assert workspace_id(other) == known


@pytest.mark.parametrize("content", ["", "[]", '{"id": 1}', "rotten"])
def test_a_damaged_file_is_written_anew(home, content):
    (home / "workspace.json").write_text(content)
    assert workspace_id(home) == workspace_id(home)


def test_a_shared_server_has_an_experiment_for_each_copy_and_one_for_a_moved_workspace(
    home, tmp_path
):
    def experiment(folder):
        return workspace_tracking(folder, "http://host:5000").experiment

    known = experiment(home)
    copy = shutil.copytree(home, tmp_path / "copy" / "space")
    assert known.startswith("space-")
    assert experiment(copy) != known
    (tmp_path / "new").mkdir()
    assert experiment(home.rename(tmp_path / "new" / "space")) == known
