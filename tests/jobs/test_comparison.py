"""`foundry evaluate` and `compare` on scores made by hand: one bad checkpoint stops neither the
others nor the user."""

import contextlib

import pytest
from judged_world import World

from jobs import comparison, evaluate, pipeline
from jobs.cli import console
from resources.workspace.staleness import reasons
from training.errors import DataError, EvaluationError, FailedImagesError, ModelError
from training.evaluation import candidates, champion

QUIET = {"started": lambda *announced: None}
DRAW, SCORE, JUDGE = (stage.name for stage in evaluate.STAGES)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A run of two checkpoints; stages are done by hand, and fail where `world.broken` says so."""
    monkeypatch.setattr("resources.workspace.writer.git_revision", lambda: "")
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
            world.store.checkpoints.let_go(key, "evaluation")
        elif stage.name == SCORE:
            world.score(key, world.values(seed=len(key)), world.failed.get(key, 0))
        else:
            world.judge(key)

    monkeypatch.setattr(pipeline, "execute", execute)
    return world


def kept(world):
    return sorted(
        path.parent.name for path in (world.home / "runs").glob("*/checkpoints/*/WANTED.evaluation")
    )


def test_what_is_to_be_drawn_is_kept_from_retention_until_it_is(world):
    both = ["samples_000001000", "samples_000002000"]
    assert comparison.evaluate(world.home, **QUIET) == [world.base, "run@1000", "run@2000"]
    assert world.drawn_with == [(world.base, both), ("run@1000", both), ("run@2000", both[1:])]
    assert kept(world) == []
    assert champion.read(world.home) is not None, (
        "a run that was killed before the champion is not left waiting"
    )
    comparison.evaluate(world.home, **QUIET)
    assert (len(world.drawn_with), kept(world)) == (3, [])


@pytest.mark.parametrize("stage", [DRAW, SCORE, JUDGE])
def test_a_checkpoint_that_cannot_be_evaluated_does_not_stop_the_others(world, stage):
    world.broken[stage, "run@1000"] = ModelError("unet has no weights")
    with pytest.raises(EvaluationError, match="run@1000 is not evaluated: unet has no weights"):
        comparison.evaluate(world.home, **QUIET)
    assert world.store.tables.parts("verdicts") == [f"base~{world.base}", "base~run@2000"]
    world.broken = {(stage, world.base): ModelError("the base has no weights")}
    (world.home / "tables" / stage / f"{'base~' * (stage == JUDGE)}{world.base}.json").unlink()
    with pytest.raises(ModelError, match=r"^the base has no weights"):
        comparison.evaluate(world.home, **QUIET)


def add_external(world):
    """An external model whose folder is there; returns its name as a checkpoint, and the folder."""
    model = world.home.parent / "outside"
    model.mkdir()
    (model / "model_index.json").write_text("{}")
    return candidates.add_external_model(world.home, "outside", model), model


def break_external(world, how):
    """An external model that fails: as its author wrote it, or not there at all."""
    key, model = add_external(world)
    if how == "missing":
        (model / "model_index.json").unlink()
        model.rmdir()
        world.broken[DRAW, key] = DataError(f"external model 'outside': {model} is missing")
        return key, f"external model 'outside': {model} is missing"
    stage, error = how
    world.broken[stage, key] = error
    return key, f"{type(error).__name__}: {error}"


FAILURES = [
    "missing",
    *((stage, RuntimeError("a size\nof tensors")) for stage in (DRAW, SCORE, JUDGE)),
]


@pytest.mark.parametrize("how", FAILURES)
def test_an_external_model_that_fails_in_any_way_stops_no_evaluation(world, how):
    key, reason = break_external(world, how)
    with pytest.raises(EvaluationError) as failure:
        comparison.evaluate(world.home, **QUIET)
    assert str(failure.value) == f"{key} is not evaluated: {' '.join(reason.split())}"
    assert {"base~run@1000", "base~run@2000"} <= set(world.store.tables.parts("verdicts"))
    assert champion.read(world.home) is not None, "the champion waits for no external model"


@pytest.mark.parametrize("how", FAILURES)
def test_an_external_model_that_fails_does_not_stop_foundry_run(world, how):
    key, reason = break_external(world, how)
    failed = {}
    for stage in evaluate.STAGES:
        (outcome,) = pipeline._run_body(
            None, world.store, [stage], None, None, lambda *told: None, failed
        )
        failed |= outcome.failed
        assert outcome.num_made == (3 if key in failed else 4)
        assert outcome.unfinished == []
    assert failed == {key: " ".join(reason.split())}
    assert world.store.tables.parts("verdicts") == [
        f"base~{world.base}",
        "base~run@1000",
        "base~run@2000",
    ]


def test_a_checkpoint_that_fails_stops_foundry_run_as_ever(world):
    world.broken[DRAW, "run@1000"] = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        pipeline._run_body(
            None, world.store, [evaluate.STAGES[0]], None, None, lambda *told: None, {}
        )


def test_status_of_a_workspace_whose_external_model_is_missing(world):
    key, model = add_external(world)
    for name in (world.base, key):
        world.draw(name)
    assert key not in world.store.currency.stale(evaluate.STAGES[0])
    (model / "model_index.json").unlink()
    model.rmdir()
    assert key in world.store.currency.stale(evaluate.STAGES[0])
    assert reasons(world.store, evaluate.STAGES[0], key) == ("checkpoint is missing",)


def test_why_there_is_no_verdict_is_printed_beside_the_verdicts(world, capsys):
    world.failed["run@2000"] = 2
    console.evaluated(world.store, comparison.evaluate(world.home, **QUIET))
    printed = capsys.readouterr().out
    assert "run@1000 against base." in printed
    assert (
        f"no verdict on run@2000 against {world.base}: 2 of 64 images of run@2000 have no scores"
        in printed
    )
    assert "not compared" not in printed


def test_a_comparison_of_failed_images_is_refused_and_one_with_the_base_uses_its_verdict(world):
    world.failed["run@2000"] = 2
    with pytest.raises(
        FailedImagesError,
        match="no verdict on run@2000 against run@1000: 2 of 64 images of run@2000",
    ):
        comparison.compare(world.home, "run@1000", "run", **QUIET)
    found = comparison.compare(world.home, "base", "run@1000", **QUIET)
    assert (found.a, found.b) == (world.base, "run@1000")
    assert found.verdicts["group"].unique().to_list() == ["all"]
    assert found.report.read_text() == "page"
    assert [
        part for part in world.store.tables.parts("verdicts") if part.endswith("~run@1000")
    ] == ["base~run@1000"]


def test_a_champion_that_is_gone_is_named(world):
    champion.write(
        world.home, champion.Champion(checkpoint="run@1500", digest="d", verdict="base~run@1500")
    )
    with pytest.raises(DataError, match="checkpoint run@1500 is not there"):
        comparison.resolve(world.store, "champion")
