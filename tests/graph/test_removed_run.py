"""A run whose folder or checkpoints someone removed is trained anew or refused by name; every other
command works."""

import shutil

import pytest
from graph_tools import SMALL_RUN, foundry

from assets import checkpoints as training
from resources.workspace.store import Store
from training.runs.event_log import has_finished
from training.runs.run_folder import CONFIG, EVENTS, checkpoints


def test_a_run_whose_folder_was_removed_is_trained_anew(small_copy):
    folder = small_copy / "runs" / "demo"
    names = [path.name for path in checkpoints(folder)]
    shutil.rmtree(folder)
    assert "does not exist" not in foundry("status", "--home", small_copy).stdout
    foundry("run", "--home", small_copy)
    refused = foundry("train", "--run", "demo", "--home", small_copy, check=False)
    assert refused.returncode == 2
    assert "run 'demo' has no configuration" in refused.stderr
    folder.mkdir()
    (folder / CONFIG).write_text(SMALL_RUN)
    assert Store(small_copy).currency.stale(training.checkpoints) == ["demo"]
    foundry("train", "--run", "demo", "--home", small_copy)
    assert has_finished(folder / EVENTS)
    assert [path.name for path in checkpoints(folder)] == names
    assert Store(small_copy).currency.stale(training.checkpoints) == []


def test_a_finished_run_without_its_last_checkpoint_is_refused_by_name(small_copy):
    last = checkpoints(small_copy / "runs" / "demo")[-1]
    shutil.rmtree(last)
    refused = foundry("train", "--run", "demo", "--home", small_copy, check=False)
    assert refused.returncode == 2
    assert f"run demo has finished, but its last checkpoint {last} is missing" in refused.stderr


@pytest.mark.parametrize(
    "last",
    ['{"event": "finished", "samples_seen": 1}', '{"event": "finished", "samples_seen": 1}\n{"ev'],
)
def test_the_end_of_a_log_is_its_last_whole_line(tmp_path, last):
    log = tmp_path / EVENTS
    assert not has_finished(log)
    log.write_text(
        "".join(f'{{"event": "step", "samples_seen": {number}}}\n' for number in range(4000))
    )
    assert not has_finished(log)
    log.write_text(log.read_text() + last)
    assert has_finished(log)
    log.write_text(log.read_text() + '\n{"event": "resumed", "samples_seen": 1}\n')
    assert not has_finished(log)
