"""The sensor on checkpoints: the base first, each a bounded number of times, and no one holds up
the others."""

import json

import dagster as dg
import pytest
from dagster._core.test_utils import create_run_for_test
from judged_world import World

from assets.currency import CHECK
from jobs.sensors import MAX_ATTEMPTS, new_checkpoint, staleness
from resources.workspace.store import Store
from training.evaluation.candidates import FILE as RIVALS


@pytest.fixture(scope="module")
def instance():
    with dg.instance_for_test() as instance:
        yield instance


@pytest.fixture
def world(tmp_path, monkeypatch, instance):
    """A run that is still training and has two checkpoints; nothing is evaluated."""
    monkeypatch.setattr("resources.workspace.writer.git_revision", lambda: "")
    instance.wipe()
    world = World(tmp_path / "workspace")
    world.save("run", 1000, 2000, ended=False)
    return world


def tick(world, instance):
    """Partition keys and run keys that a tick asks for, or why it asks for none."""
    with dg.build_sensor_context(instance=instance, resources={"store": world.store}) as context:
        found = new_checkpoint(context)
    if isinstance(found, dg.SkipReason):
        return found.skip_message
    keys = [request.partition_key for request in found.run_requests]
    assert found.dynamic_partitions_requests[0].partition_keys == keys
    return {request.partition_key: request.run_key for request in found.run_requests}


def start(instance, asked, status):
    """The runs that Dagster makes of the requests of a tick."""
    for name, run_key in asked.items():
        tags = {"dagster/run_key": run_key, "dagster/partition": name}
        create_run_for_test(instance, job_name="evaluate", status=status, tags=tags)


def marks(world):
    return sorted(
        path.parent.name for path in (world.home / "runs").glob("*/checkpoints/*/WANTED.evaluation")
    )


def test_the_base_comes_first_and_the_others_are_kept_meanwhile(world, instance):
    assert list(tick(world, instance)) == [world.base]
    assert marks(world) == ["samples_000001000", "samples_000002000"]
    world.draw(world.base)
    world.score(world.base, world.values())
    assert list(tick(world, instance)) == [
        world.base
    ]  # its own part of the verdicts is still to come
    world.judge(world.base)
    assert list(tick(world, instance)) == ["run@1000", "run@2000"]
    world.evaluate("run@1000")
    assert list(tick(world, instance)) == ["run@2000"]
    world.evaluate("run@2000")
    assert tick(world, instance) == "no checkpoint waits for evaluation"


def test_scores_without_a_verdict_are_not_done(world, instance):
    """A run that died between scores and verdict used to be taken for done."""
    world.evaluate(world.base)
    world.evaluate("run@1000")
    world.draw("run@2000")
    world.score("run@2000", world.values())
    assert list(tick(world, instance)) == ["run@2000"]


def test_a_failure_is_tried_again_a_bounded_number_of_times_and_anew_after_a_change(
    world, instance
):
    world.evaluate(world.base)
    world.evaluate("run@2000")
    seen = set()
    for _ in range(MAX_ATTEMPTS):
        asked = tick(world, instance)
        assert list(asked) == ["run@1000"]
        assert not seen & set(asked.values())
        seen |= set(asked.values())
        assert tick(world, instance) == asked  # Dagster drops what it has started already
        start(instance, asked, dg.DagsterRunStatus.FAILURE)
    assert tick(world, instance) == f"run@1000 is running, or has failed {MAX_ATTEMPTS} times"
    world.score(world.base, world.values(0.1))
    world.judge(world.base)
    asked = tick(world, instance)
    assert list(asked) == ["run@1000", "run@2000"]
    assert not seen & set(asked.values())


def test_no_second_run_is_asked_for_while_one_is_under_way(world, instance):
    asked = tick(world, instance)
    start(instance, asked, dg.DagsterRunStatus.STARTED)
    waits = f"{world.base} is running, or has failed {MAX_ATTEMPTS} times"
    assert tick(world, instance) == waits
    world.draw(world.base)  # what the run commits on its way asks for no other
    world.score(world.base, world.values())
    assert tick(world, instance) == waits


def test_a_rival_that_is_gone_does_not_hold_up_the_others(world, instance):
    rivals = {"format": 1, "rivals": {"other": str(world.home / "gone")}}
    (world.home / RIVALS).write_text(json.dumps(rivals))
    world.evaluate(world.base)
    assert list(tick(world, instance)) == ["run@1000", "run@2000"]
    for name in ("run@1000", "run@2000"):
        world.evaluate(name)
    assert "external model 'other': " in tick(world, instance)


def test_a_foundry_toml_that_cannot_be_read_is_what_the_checks_say(world, instance):
    """The graph would stay green otherwise, while the only sign is a failed tick of a sensor."""
    path = world.home / "foundry.toml"
    whole = path.read_text()
    shown = {}
    for name, text in (("broken", whole + "\n[selection]\nmin_scor = 3\n"), ("mended", whole)):
        path.write_text(text)
        with dg.build_sensor_context(
            instance=instance, resources={"store": Store(world.home)}
        ) as context:
            assert isinstance(staleness(context), dg.SkipReason)
        key = dg.AssetCheckKey(dg.AssetKey("bucket_assignments"), CHECK)
        found = instance.event_log_storage.get_latest_asset_check_execution_by_key([key])[
            key
        ].evaluation
        shown[name] = (found.passed, found.description)
    passed, description = shown["broken"]
    assert not passed
    assert description.startswith("cannot be judged: ")
    assert "unknown key 'selection.min_scor'; did you mean 'min_score'?" in description
    assert "cannot be judged" not in shown["mended"][1]


def test_a_check_is_shown_again_after_a_materialization_without_it(world, instance):
    """A launch may leave checks out; Dagster then shows no outcome, though the same holds."""
    key = dg.AssetCheckKey(dg.AssetKey("quality_pairs"), CHECK)

    def shown():
        with dg.build_sensor_context(
            instance=instance, resources={"store": Store(world.home)}
        ) as context:
            said = staleness(context).skip_message
        record = instance.event_log_storage.get_latest_asset_check_execution_by_key([key])[key]
        return said, record.id

    _, first = shown()
    assert shown() == ("nothing has changed", first)
    instance.report_runless_asset_event(dg.AssetMaterialization("quality_pairs"))
    _, second = shown()
    assert second != first
    assert shown() == ("nothing has changed", second)
