"""Which checkpoints stay: a hand-worked list, and folders that are read meanwhile."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.config.run import CheckpointConfig
from training.runs import retention, run_folder
from training.runs.resumable import find_resumable
from training.runs.retention import apply_retention, weights_to_keep
from training.runs.run_folder import Ready


def test_a_hand_worked_list():
    saved = [
        (500, 0.9),
        (1008, 0.5),
        (1504, 0.3),
        (2000, 0.4),
        (2512, 0.6),
        (3004, 0.7),
        (3500, None),
    ]
    # The two newest, the first at or after each 1,000, and the best.
    assert weights_to_keep(saved, CheckpointConfig(keep_every_samples=1000)) == {
        1008,
        1504,
        2000,
        3004,
        3500,
    }
    assert weights_to_keep(saved, CheckpointConfig(keep_every_samples=10_000)) == {1504, 3004, 3500}
    assert weights_to_keep(saved, CheckpointConfig()) == {samples_seen for samples_seen, _ in saved}
    assert weights_to_keep([], CheckpointConfig(keep_every_samples=1)) == set()
    assert weights_to_keep([(8, None)], CheckpointConfig(keep_every_samples=100)) == {8}
    tied = [(1, 0.5), (2, 0.5), (3, 0.6), (4, 0.6)]
    assert weights_to_keep(tied, CheckpointConfig(keep_every_samples=100)) == {1, 3, 4}


@given(
    clocks=st.sets(st.integers(1, 10_000)),
    every=st.integers(1, 3_000),
    last=st.integers(1, 4),
    data=st.data(),
)
def test_applied_after_each_checkpoint_it_keeps_what_it_keeps_in_the_end(clocks, every, last, data):
    """A rule that let a checkpoint go and wanted it later would lose it."""
    config = CheckpointConfig(keep_every_samples=every, keep_last=last)
    losses = {clock: data.draw(st.none() | st.floats(0, 1)) for clock in clocks}
    alive: list[tuple[int, float | None]] = []
    for clock in sorted(clocks):
        alive.append((clock, losses[clock]))
        kept = weights_to_keep(alive, config)
        alive = [item for item in alive if item[0] in kept]
    whole = [(clock, losses[clock]) for clock in sorted(clocks)]
    assert {clock for clock, _ in alive} == weights_to_keep(whole, config)


def saved(folder, samples_seen, loss):
    path = run_folder.checkpoint_folder(folder, samples_seen)
    (path / run_folder.STATE).mkdir(parents=True)
    (path / "weights").write_text("x")
    run_folder.write_ready(
        path,
        Ready(
            run="r", checkpoint=f"r@{samples_seen}", samples_seen=samples_seen, files=(), state_files=(), digest="d",
            fingerprint="f", base_digest="b", validation_loss=loss, config={},
        ),
    )  # fmt: skip
    return path


def test_what_no_rule_keeps_is_removed_unless_it_is_read(tmp_path):
    paths = [
        saved(tmp_path, samples_seen, loss)
        for samples_seen, loss in ((10, 0.1), (20, 0.5), (30, 0.4), (40, 0.6))
    ]
    config = CheckpointConfig(keep_last=1, keep_every_samples=1000)
    with retention.reading(paths[1]), retention.reading(paths[1]):
        assert apply_retention(tmp_path, config) == [30]
    assert [path.exists() for path in paths] == [True, True, False, True]
    assert [(path / run_folder.STATE).exists() for path in paths] == [False, False, False, True]
    assert apply_retention(tmp_path, config) == [20]
    assert [path.name for path in run_folder.checkpoints(tmp_path)] == [
        "samples_000000010",
        "samples_000000040",
    ]


def test_checkpoints_come_in_the_order_of_their_numbers(tmp_path):
    paths = [
        saved(tmp_path, samples_seen, 0.5)
        for samples_seen in (8, 999_500_000, 1_000_000_000, 1_000_500_000)
    ]
    (tmp_path / run_folder.CHECKPOINTS / "samples_mine").mkdir()
    assert run_folder.checkpoints(tmp_path) == paths
    apply_retention(tmp_path, CheckpointConfig(keep_last=1))
    assert [(path / run_folder.STATE).exists() for path in paths] == [False, False, False, True]
    assert find_resumable(tmp_path) == (paths[-1], [])


def test_what_somebody_wants_stays_until_all_have_let_go(tmp_path):
    paths = [
        saved(tmp_path, samples_seen, 0.9 - samples_seen / 100) for samples_seen in (10, 20, 30)
    ]
    config = CheckpointConfig(keep_last=1, keep_every_samples=1000)
    retention.want(paths[0], "evaluation")
    retention.want(paths[0], "champion")
    retention.want(paths[0], "champion")
    assert apply_retention(tmp_path, config) == [20]
    retention.release(paths[0], "evaluation")
    assert apply_retention(tmp_path, config) == []
    retention.release(paths[0], "champion")
    assert apply_retention(tmp_path, config) == [10]
    with pytest.raises(FileNotFoundError):
        retention.want(paths[0], "champion")
    retention.release(paths[0], "champion")


def test_one_that_is_gone_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError), retention.reading(tmp_path / "samples_000000001"):
        pass
