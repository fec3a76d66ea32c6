"""The champion of a workspace: who may challenge it, what is committed before it moves, and what a
death leaves."""

import logging
import shutil

import pytest
from judged_world import World

from assets import sample_images, verdicts
from resources.workspace.checkpoints import Checkpoints
from training.errors import FailedImagesError
from training.evaluation import champion

LOG = logging.getLogger("crown")
MARK = "WANTED.champion"


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A run of three checkpoints beside the base, which alone is scored."""
    monkeypatch.setattr(
        "resources.workspace.writer.git_revision", lambda: ""
    )  # a process for each commit
    world = World(tmp_path / "workspace")
    world.save("run", 1000, 2000, 3000)
    world.evaluate(world.base)
    return world


def evaluate(world, *gains):
    """Evaluate the run's checkpoints, which differ from the base by `gains`."""
    for number, gain in enumerate(gains, start=1):
        world.evaluate(f"run@{number * 1000}", gain, seed=number)


def promote(world):
    verdicts.promote(world.store, LOG)
    return champion.read(world.home)


def marked(world):
    """Checkpoints that are kept as champion."""
    return [path.parent.name for path in (world.home / "runs").glob(f"*/checkpoints/*/{MARK}")]


def rows(world, part):
    return world.store.read("verdicts", parts=[part])


def test_the_best_of_many_is_judged_on_the_held_out_half_before_the_champion_moves(world):
    evaluate(world, 0.2, 0.4, 0.0)
    now = promote(world)
    part = f"{world.base}~run@2000"
    assert (now.checkpoint, now.digest, now.verdict) == ("run@2000", "weights of run@2000", part)
    held_out = rows(world, part)
    assert held_out["group"].unique().to_list() == [champion.HELD_OUT]
    assert held_out["num_prompts"].unique().to_list() == [32]
    assert "aesthetic (held-out half): better, +0.3" in now.sentence
    manifests = {
        name: world.store.manifest("eval_metrics", name)
        for name in ("run@1000", "run@2000", "run@3000")
    }
    assert now.challenged == {name: manifest.digest for name, manifest in manifests.items()}
    assert marked(world) == ["samples_000002000"]


def test_a_single_first_challenger_is_judged_on_all_prompts_and_no_row_is_there_twice(world):
    world.save("alone", 3000)
    world.evaluate("alone@3000", 0.4, seed=5)
    (world.home / "runs" / "run" / "config.toml").unlink()
    (world.home / "tables" / "checkpoints" / "run.json").unlink()
    now = promote(world)
    assert (now.checkpoint, now.verdict) == ("alone@3000", "base~alone@3000")
    assert "aesthetic (all): better" in now.sentence
    evaluate(world, 0.1)
    assert (
        world.store.read("verdicts").select("metric", "group", "a", "b").is_duplicated().sum() == 0
    )


def test_the_base_stays_until_something_is_better_and_nobody_stands_twice(world, caplog):
    caplog.set_level("INFO")
    evaluate(world, 0.0, -0.2, 0.0)
    now = promote(world)
    assert (now.checkpoint, now.verdict, sorted(now.challenged)) == (
        world.base,
        "",
        ["run@1000", "run@2000", "run@3000"],
    )
    assert f"{world.base} stays champion against run@" in caplog.text
    before = (world.home / "champion.json").stat().st_mtime_ns
    promote(world)
    assert (world.home / "champion.json").stat().st_mtime_ns == before
    world.score("run@3000", world.values(0.5, 9))
    world.judge("run@3000")
    assert promote(world).checkpoint == "run@3000"


def test_the_mark_that_keeps_a_checkpoint_moves_with_the_champion(world):
    evaluate(world, 0.4, -0.1, -0.1)
    assert promote(world).checkpoint == "run@1000"
    assert marked(world) == ["samples_000001000"]
    world.score("run@3000", world.values(1.0, 3))
    world.judge("run@3000")
    now = promote(world)
    assert (now.checkpoint, now.verdict) == ("run@3000", "run@1000~run@3000")
    assert {champion.HELD_OUT, "all"} <= set(rows(world, now.verdict)["group"])
    assert marked(world) == ["samples_000003000"]


STEPS = ("judge_pair", "keep", "write", "_keep_only")


@pytest.mark.parametrize("step", STEPS)
def test_a_death_before_any_step_leaves_a_champion_with_its_verdict_and_the_next_call_finishes(
    world, monkeypatch, step
):
    """Killed at any call of a step: the file never names a verdict that is not there, or a folder
    that may go."""
    evaluate(world, 0.4, -0.1, -0.1)
    assert promote(world).checkpoint == "run@1000"
    world.score("run@3000", world.values(1.0, 3))
    world.score("run@2000", world.values(0.8, 2))
    for name in ("run@2000", "run@3000"):
        world.judge(name)
    owner = {"keep": Checkpoints, "write": champion}.get(step, verdicts)
    call = getattr(owner, step)
    for number in range(1, 10):
        deaths = iter([False] * (number - 1) + [True])

        def dying(*arguments, deaths=deaths, **keywords):
            if next(deaths, False):
                raise KeyboardInterrupt
            return call(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(owner, step, dying)
            try:
                verdicts.promote(world.store, LOG)
            except KeyboardInterrupt:
                pass
            else:
                break
        now = champion.read(world.home)
        assert now.checkpoint in ("run@1000", "run@3000")
        assert now.verdict in world.store.tables.parts("verdicts")
        assert world.folder(now.checkpoint).name in marked(world)
    now = promote(world)
    assert (now.checkpoint, now.verdict) == ("run@3000", "run@1000~run@3000")
    assert champion.HELD_OUT in rows(world, now.verdict)["group"]
    assert marked(world) == ["samples_000003000"]


def test_it_waits_for_verdicts_that_are_stale(world, caplog):
    caplog.set_level("INFO")
    evaluate(world, 0.4, 0.3)
    assert promote(world) is None
    assert "the champion waits for verdicts on run@3000" in caplog.text
    world.evaluate("run@3000", 0.5, seed=3)
    assert promote(world).checkpoint == "run@3000"


def test_a_comparison_keeps_the_verdict_that_the_champion_stands_on(world):
    evaluate(world, 0.4, -0.1, -0.1)
    promote(world)
    world.score("run@3000", world.values(1.0, 3))
    world.judge("run@3000")
    now = promote(world)
    before = world.store.manifest("verdicts", now.verdict)
    assert verdicts.judge_pair(world.store, "run@1000", "run@3000") == now.verdict
    assert world.store.manifest("verdicts", now.verdict) == before
    assert verdicts.judge_pair(world.store, world.base, "run@3000") == "base~run@3000"
    # Without the half, it is made anew for whoever asks for it.
    assert verdicts.judge_pair(world.store, "run@2000", "run@3000") == "run@2000~run@3000"
    assert champion.HELD_OUT not in rows(world, "run@2000~run@3000")["group"]
    verdicts.judge_pair(world.store, "run@2000", "run@3000", one_of_many=True)
    assert champion.HELD_OUT in rows(world, "run@2000~run@3000")["group"]


def test_a_checkpoint_with_failed_images_has_a_note_cannot_win_and_stops_nobody(world, caplog):
    evaluate(world, 0.3)
    world.evaluate("run@2000", 2.0, failed=3, seed=2)
    world.evaluate("run@3000", 0.1, seed=3)
    noted = world.store.manifest("verdicts", "base~run@2000")
    assert noted.rows == 0
    assert "3 of 64 images of run@2000 have no scores" in noted.report["numbers"]["note"]
    assert world.store.currency.stale(verdicts.verdicts) == []
    now = promote(world)
    assert (now.checkpoint, sorted(now.challenged)) == ("run@1000", ["run@1000", "run@3000"])
    assert "run@2000 does not challenge the champion" in caplog.text
    with pytest.raises(FailedImagesError, match="3 of 64 images of run@2000"):
        verdicts.judge_pair(world.store, world.base, "run@2000")
    # Mended, it is judged as any other.
    world.score("run@2000", world.values(2.0, 2))
    assert world.store.currency.stale(verdicts.verdicts) == ["run@2000"]
    world.judge("run@2000")
    assert promote(world).checkpoint == "run@2000"


def test_one_whose_weights_are_gone_or_whose_images_are_newer_does_not_stop_the_others(
    world, caplog
):
    caplog.set_level("INFO")
    evaluate(world, 0.2, 0.9, 0.3)
    shutil.rmtree(world.folder("run@2000"))  # retention may, once its images are drawn
    world.save("named", 1000, 1500, 3000)
    for number, clock in enumerate((1000, 1500, 3000)):
        world.evaluate(f"named@{clock}", 0.0, seed=10 + number)
    world.draw("named@1500", "again")
    assert (
        world.store.currency.stale(verdicts.verdicts) == []
    )  # 1500 lies between the intervals and was evaluated by name
    now = promote(world)
    assert (now.checkpoint, sorted(now.challenged)) == (
        "run@3000",
        ["named@1000", "named@3000", "run@1000", "run@3000"],
    )
    told = " ".join(caplog.messages)
    assert "run@2000 cannot challenge the champion: retention removed the weights" in told
    assert "named@1500: its images are newer than its scores" in told


@pytest.fixture
def unevaluated(world):
    """The champion is a checkpoint that was evaluated by name; then all others are drawn in another
    way."""
    evaluate(world, 0.1, 0.1, 0.1)
    world.save("named", 1000, 1500, 3000)
    for clock, gain in ((1000, 0.0), (1500, 1.0), (3000, 0.0)):
        world.evaluate(f"named@{clock}", gain, seed=clock)
    assert "named@1500" not in world.store.checkpoints.to_evaluate()
    assert promote(world).checkpoint == "named@1500"
    world.write_config("num_steps = 4", "num_steps = 5")
    for name in (world.base, "run@1000", "run@2000", "run@3000", "named@1000", "named@3000"):
        world.evaluate(name, 2.0 if name == "run@1000" else 0.0, seed=2)
    return world


def test_the_champion_is_evaluated_with_the_others(unevaluated, caplog):
    caplog.set_level("INFO")
    assert unevaluated.store.currency.stale(sample_images.sample_images) == ["named@1500"]
    assert promote(unevaluated).checkpoint == "named@1500"
    assert "the champion waits for verdicts on named@1500" in caplog.text
    unevaluated.evaluate("named@1500", 1.0, seed=3)
    assert promote(unevaluated).checkpoint == "run@1000"


def test_a_champion_that_cannot_be_evaluated_any_more_is_said(unevaluated, caplog):
    shutil.rmtree(unevaluated.folder("named@1500"))
    assert unevaluated.store.currency.stale(verdicts.verdicts) == []
    assert promote(unevaluated).checkpoint == "named@1500"
    told = " ".join(caplog.messages)
    assert (
        "run@1000 does not challenge the champion named@1500: named@1500 and run@1000 cannot be compared"
        in told
    )
    assert "can challenge it; its weights are missing: remove champion.json to begin anew" in told
    (unevaluated.home / champion.FILE).unlink()
    assert promote(unevaluated).checkpoint == "run@1000"


def test_another_base_model_is_the_champion_until_something_is_better(world):
    evaluate(world, 0.0, 0.0, 0.0)
    promote(world)
    old = champion.Champion(checkpoint="base.00000000@0", digest="d", challenged={"run@3000": "e"})
    champion.write(world.home, old)
    assert promote(world).checkpoint == world.base
