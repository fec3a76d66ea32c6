"""The spool's batches, without MLflow."""

import pytest

from resources.mlflow import spool
from training.runs import run_folder
from training.runs.event_log import EventLog


@pytest.mark.parametrize("num_buckets", [3, 99, 100, 250])
def test_no_batch_holds_more_than_mlflow_takes_and_together_they_hold_each_number_once(
    tmp_path, num_buckets
):
    means = {f"64x{width}": width / 1000 for width in range(num_buckets)}
    with EventLog(tmp_path / run_folder.EVENTS) as log:
        for samples_seen in range(1, 206):
            log.write(
                "step", samples_seen=samples_seen, **{f"n{number}": 0.5 for number in range(9)}
            )
            if samples_seen % 95 == 0:
                log.write(
                    "validation",
                    samples_seen=samples_seen,
                    loss=0.5,
                    bucket=means,
                    ema_bucket=means,
                )
    state, sent = spool.State(run_id="r"), []
    chunks = list(spool.pending(tmp_path, state))
    assert max(len(chunk.points) for chunk in chunks) <= spool.MAX_METRICS
    for chunk in chunks:
        # Each is what is due at the state that the one before left.
        assert next(spool.pending(tmp_path, state)).points == chunk.points
        sent += [(point.name, point.samples_seen) for point in chunk.points]
        state = chunk.state
    assert len(sent) == len(set(sent)) == 205 * 9 + 2 * (1 + 2 * num_buckets)
    assert list(spool.pending(tmp_path, state)) == []


def test_of_the_data_interval_one_curve_arrives_and_of_compiled_shapes_none(tmp_path):
    with EventLog(tmp_path / "events.jsonl") as log:
        log.write("started", samples_seen=0, run="demo")
        log.write("compiled", samples_seen=0, num_graphs=1, shape=[8, 4, 16, 16])
        for seen, share in ((40, 0.25), (80, 0.5)):
            log.write(
                "data",
                samples_seen=seen,
                seconds=4.0,
                waited_s=1.0,
                share=share,
                stages={"prompts": 0.1},
            )
        log.write("resumed", samples_seen=40, run="demo")
        log.write(
            "data", samples_seen=80, seconds=4.0, waited_s=1.0, share=0.75, stages={"prompts": 0.1}
        )
    chunks = spool.pending(tmp_path, spool.State(run_id="r"))
    points = [point for chunk in chunks for point in chunk.points]
    assert [(point.name, point.samples_seen, point.value) for point in points] == [
        ("perf/data_wait_share", 40, 0.25), ("perf/data_wait_share", 80, 0.75),
    ]  # fmt: skip
