"""`foundry evaluate` and `compare` on scores made by hand: one bad checkpoint stops neither the others nor the user."""

import contextlib

import pytest
from judged_world import World

from jobs import comparison, console, evaluate, pipeline
from training.errors import DataError, EvaluationError, FailedPicturesError, ModelError
from training.evaluation import champion

QUIET = {"started": lambda *announced: None}
DRAW, SCORE, JUDGE = (stage.name for stage in evaluate.STAGES)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A run of two checkpoints; stages are done by hand, and fail where `world.broken` says so."""
    monkeypatch.setattr("resources.store.git_revision", lambda: "")
    monkeypatch.setattr(pipeline, "bring_up_to_date", lambda *arguments, **keywords: [])
    monkeypatch.setattr(comparison, "open_instance", lambda home: contextlib.nullcontext())
    for name in ("_name_partitions", "rebuild", "catch_up"):
        monkeypatch.setattr(comparison, name, lambda *arguments: None)
    monkeypatch.setattr(comparison, "render", lambda store, names, rows: "page")
    world = World(tmp_path / "workspace")
    world.save("run", 1000, 2000)
    world.broken, world.failed, world.drawn_with = {}, {}, []

    def execute(instance, stages, keys):
        (stage,), (key,) = stages, keys
        if (stage.name, key) in world.broken:
            raise world.broken[stage.name, key]
        if stage.name == DRAW:
            world.drawn_with.append((key, kept(world)))
            world.draw(key)
            world.store.let_go(key, "evaluation")
        elif stage.name == SCORE:
            world.score(key, world.values(seed=len(key)), world.failed.get(key, 0))
        else:
            world.judge(key)

    monkeypatch.setattr(pipeline, "execute", execute)
    return world


def kept(world):
    return sorted(path.parent.name for path in (world.home / "runs").glob("*/checkpoints/*/WANTED.evaluation"))


def test_what_is_to_be_drawn_is_kept_from_retention_until_it_is(world):
    both = ["samples_000001000", "samples_000002000"]
    assert comparison.evaluate(world.home, **QUIET) == [world.base, "run@1000", "run@2000"]
    assert world.drawn_with == [(world.base, both), ("run@1000", both), ("run@2000", both[1:])]
    assert kept(world) == []
    assert champion.read(world.home) is not None, "a run that was killed before the champion is not left waiting"
    comparison.evaluate(world.home, **QUIET)
    assert (len(world.drawn_with), kept(world)) == (3, [])


@pytest.mark.parametrize("stage", [DRAW, SCORE, JUDGE])
def test_a_checkpoint_that_cannot_be_evaluated_does_not_stop_the_others(world, stage):
    world.broken[stage, "run@1000"] = ModelError("unet has no weights")
    with pytest.raises(EvaluationError, match="run@1000 is not evaluated: unet has no weights"):
        comparison.evaluate(world.home, **QUIET)
    assert world.store.parts("verdicts") == [f"base~{world.base}", "base~run@2000"]
    world.broken = {(stage, world.base): ModelError("the base has no weights")}
    (world.home / "tables" / stage / f"{'base~' * (stage == JUDGE)}{world.base}.json").unlink()
    with pytest.raises(ModelError, match=r"^the base has no weights"):
        comparison.evaluate(world.home, **QUIET)


def test_why_there_is_no_verdict_is_printed_beside_the_verdicts(world, capsys):
    world.failed["run@2000"] = 2
    console.evaluated(world.store, comparison.evaluate(world.home, **QUIET))
    printed = capsys.readouterr().out
    assert "run@1000 against base." in printed
    assert f"no verdict on run@2000 against {world.base}: 2 of 64 pictures of run@2000 have no scores" in printed
    assert "not compared" not in printed


def test_a_comparison_of_failed_pictures_is_refused_and_one_with_the_base_uses_its_verdict(world):
    world.failed["run@2000"] = 2
    with pytest.raises(
        FailedPicturesError, match="no verdict on run@2000 against run@1000: 2 of 64 pictures of run@2000"
    ):
        comparison.compare(world.home, "run@1000", "run", **QUIET)
    found = comparison.compare(world.home, "base", "run@1000", **QUIET)
    assert (found.a, found.b) == (world.base, "run@1000")
    assert found.verdicts["group"].unique().to_list() == ["all"]
    assert found.report.read_text() == "page"
    assert [part for part in world.store.parts("verdicts") if part.endswith("~run@1000")] == ["base~run@1000"]


def test_a_champion_that_is_gone_is_named(world):
    champion.write(world.home, champion.Champion(checkpoint="run@1500", digest="d", verdict="base~run@1500"))
    with pytest.raises(DataError, match="checkpoint run@1500 is not there"):
        comparison.resolve(world.store, "champion")
