"""The first, every N-th and the last checkpoint are evaluated, whatever a run's life was like."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.errors import ConfigError, DamageError
from training.evaluation import candidates


def test_a_hand_worked_run():
    saved = [1000, 2008, 2500, 3000, 4000, 5000, 5600]
    assert candidates.due(saved, interval=1000, every=2, num_samples=5600) == [
        1000,
        2008,
        4000,
        5600,
    ]
    assert candidates.due(saved, interval=1000, every=3, num_samples=9000) == [1000, 3000]
    assert candidates.due(saved, interval=1000, every=1, num_samples=9000) == [
        1000,
        2008,
        3000,
        4000,
        5000,
    ]
    assert candidates.due([300, 1000], interval=1000, every=9, num_samples=1000) == [1000]
    assert candidates.due([300], interval=1000, every=1, num_samples=300) == [300]


@given(st.sets(st.integers(1, 500)), st.integers(1, 50), st.integers(1, 5), st.data())
def test_what_was_due_stays_due_as_the_run_goes_on(clocks, interval, every, data):
    saved = sorted(clocks)
    cut = data.draw(st.integers(0, len(saved)))
    early = candidates.due(saved[:cut], interval=interval, every=every, num_samples=1000)
    late = candidates.due(saved, interval=interval, every=every, num_samples=1000)
    assert late[: len(early)] == early
    numbers = {clock // interval for clock in saved} - {0}
    assert {clock // interval for clock in late} == {n for n in numbers if n == 1 or n % every == 0}


def test_rivals_have_names_of_their_own(tmp_path):
    assert candidates.read_external_models(tmp_path) == {}
    assert candidates.add_external_model(tmp_path, "sdxl", tmp_path / "a") == "rival.sdxl@0"
    candidates.add_external_model(tmp_path, "other", tmp_path / "b")
    candidates.add_external_model(tmp_path, "sdxl", tmp_path / "a")
    with pytest.raises(ConfigError, match=r"external model 'sdxl' is .*a already"):
        candidates.add_external_model(tmp_path, "sdxl", tmp_path / "b")
    with pytest.raises(ConfigError, match="external model name 'A B' must match"):
        candidates.add_external_model(tmp_path, "A B", tmp_path / "b")
    candidates.remove_external_model(tmp_path, "sdxl")
    assert candidates.read_external_models(tmp_path) == {"other": str(tmp_path / "b")}
    with pytest.raises(ConfigError, match="no external model 'sdxl'; there are: other"):
        candidates.remove_external_model(tmp_path, "sdxl")


def test_a_rival_inside_the_workspace_moves_with_it(tmp_path):
    before, after, outside = tmp_path / "before", tmp_path / "after", tmp_path / "outside"
    candidates.add_external_model(before, "inside", before / "models" / "a")
    candidates.add_external_model(before, "outside", outside)
    before.rename(after)
    assert candidates.read_external_models(after) == {
        "inside": str(after / "models" / "a"),
        "outside": str(outside),
    }


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 1}', json.dumps({"format": 2, "rivals": {}})]
)
def test_a_damaged_list_is_no_empty_one(tmp_path, content):
    (tmp_path / "rivals.json").write_text(content)
    with pytest.raises(DamageError, match="rivals"):
        candidates.read_external_models(tmp_path)
