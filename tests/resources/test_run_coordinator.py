"""A launch that can only fail is refused before its run starts, with the words of `foundry
train`."""

from types import SimpleNamespace

import dagster as dg
import pytest
from dagster._core.run_coordinator import QueuedRunCoordinator, SubmitRunContext
from dagster._core.storage.dagster_run import DagsterRunStatus
from dagster._core.test_utils import create_run_for_test
from typer.testing import CliRunner

from assets.partitions import mirror
from jobs.cli import app
from resources.instance import instance as open_instance
from resources.instance import write_instance
from resources.run_coordinator import FoundryRunCoordinator, check_partitions
from resources.workspace.store import Store
from training.errors import ConfigError, DataError

WRONG = [
    ({"recipe": "dem"}, "no recipe is named 'dem'; did you mean 'demo'?"),
    (
        {"recipe": "demo", "set": ["optimizer.lerning_rate=1"]},
        "--set optimizer.lerning_rate=1: unknown key 'optimizer.lerning_rate'; did you mean 'learning_rate'?",
    ),
    (
        {"recipe": "demo", "set": ["num_samples=10", "learning_rate=1"]},
        "--set learning_rate=1: unknown key 'learning_rate'; did you mean 'optimizer.learning_rate'?",
    ),
    (
        {"recipe": "demo", "set": ['optimizer.learning_rate="fast"']},
        "--set optimizer.learning_rate=\"fast\": optimizer.learning_rate='fast' must be a number",
    ),
    (
        {"recipe": "demo", "set": ["batch.global_batch_size=4", "batch.micro_batch_size=8"]},
        "--set batch.global_batch_size=4: batch.micro_batch_size=32 exceeds batch.global_batch_size=4",
    ),
    (
        {"set": ["num_samples=10"]},
        "set and tiny change a recipe: choose the recipe, or edit the run's config.toml",
    ),
]


@pytest.fixture
def home(tmp_path, monkeypatch):
    write_instance(tmp_path)
    (tmp_path / "foundry.toml").write_text(
        'format = 1\n[encodings.sdxl]\n[models]\nbase = "demo:models/base"\n'
    )
    monkeypatch.setenv("FOUNDRY_HOME", str(tmp_path))
    return tmp_path


def submit(instance, config):
    """Put a launch into the queue of an instance, as the page and every client do."""
    run = create_run_for_test(
        instance,
        job_name="train",
        run_config={"ops": {"checkpoints": {"config": config}}},
        tags={"dagster/partition": "new"},
    )
    coordinator = instance.run_coordinator
    assert isinstance(coordinator, FoundryRunCoordinator)
    try:
        coordinator.submit_run(SubmitRunContext(run, workspace=None))
    except ConfigError as error:
        return instance.get_run_by_id(run.run_id).status, str(error)
    return instance.get_run_by_id(run.run_id).status, ""


@pytest.mark.parametrize(("config", "words"), WRONG)
def test_a_wrong_launch_is_refused_before_it_starts_and_writes_nothing(home, config, words):
    with open_instance(home) as instance:
        assert submit(instance, config) == (DagsterRunStatus.FAILURE, words)
    assert not (home / "runs").exists()


@pytest.mark.parametrize(("config", "words"), WRONG[:-1])
def test_the_command_line_says_the_same(home, config, words):
    arguments = ["train", "--home", str(home), "--run", "new", "--recipe", config["recipe"]]
    for one in config.get("set", []):
        arguments += ["--set", one]
    done = CliRunner().invoke(app.app, arguments)
    assert str(done.exception) == words
    assert not (home / "runs" / "new").exists()


def test_a_right_launch_goes_to_dagsters_queue(home, monkeypatch):
    queued = []
    monkeypatch.setattr(
        QueuedRunCoordinator, "submit_run", lambda self, context: queued.append(context.dagster_run)
    )
    with open_instance(home) as instance:
        assert submit(instance, {"recipe": "demo", "set": ["num_samples=10"]}) == (
            DagsterRunStatus.NOT_STARTED,
            "",
        )
        assert submit(instance, {"recipe": "as_configured"}) == (DagsterRunStatus.NOT_STARTED, "")
    assert len(queued) == 2


def test_a_run_that_is_named_where_it_is_launched_stays_until_it_is_configured(home):
    with open_instance(home) as instance:
        instance.add_dynamic_partitions("runs", ["new"])
        mirror(instance, Store(home), remove=False)  # what the sensor does, twice a minute
        assert instance.get_dynamic_partitions("runs") == ["new"]
        create_run_for_test(
            instance, status=DagsterRunStatus.STARTED, tags={"dagster/partition": "new"}
        )
        mirror(instance, Store(home))
        assert instance.get_dynamic_partitions("runs") == ["new"]
        for run in instance.get_runs():
            instance.report_run_canceled(run)
        mirror(instance, Store(home))
        assert instance.get_dynamic_partitions("runs") == []


def test_the_launch_dialog_shows_recipes_and_defaults():
    """What Dagster shows of an asset's configuration comes from its schema."""
    from jobs.definitions import defs

    for asset in ("checkpoints", "prompt_statistics"):
        node = defs.resolve_asset_graph().get(dg.AssetKey(asset)).assets_def.op
        fields = node.config_schema.as_field().config_type.fields
        recipe = fields["recipe"]
        assert {value.config_value for value in recipe.config_type.inner_type.enum_values} == {
            "as_configured",
            "demo",
        }
        assert recipe.default_value == "as_configured"
        assert all(field.description for field in fields.values())
        assert set(fields) == {"recipe", "set", "tiny"} | (
            {"without_forgotten"} if asset == "checkpoints" else set()
        )


def test_an_older_workspace_gets_our_coordinator_and_keeps_what_people_changed(home):
    path = home / "dagster" / "dagster.yaml"
    older = path.read_text().replace(
        "module: resources.run_coordinator\n  class: FoundryRunCoordinator",
        "module: dagster.core.run_coordinator\n  class: QueuedRunCoordinator",
    )
    path.write_text(older.replace("max_concurrent_runs: 4", "max_concurrent_runs: 7"))
    with open_instance(home) as instance:
        assert isinstance(instance.run_coordinator, FoundryRunCoordinator)
    assert "max_concurrent_runs: 7" in path.read_text()


@pytest.mark.parametrize(
    ("asset", "tags", "words"),
    [
        (
            "tags",
            {},
            "tags: the run was launched without a partition; choose one where it is launched",
        ),
        (
            "checkpoints",
            {},
            "checkpoints: the run was launched without a partition; choose one where it is launched",
        ),
        ("raw_images", {"dagster/partition": "s77"}, "raw_images: there is no partition 's77'"),
        ("latents", {"dagster/partition": "s77"}, "latents: there is no partition 's77'"),
        ("latents", {"dagster/partition": "sdxl|s77"}, "latents: there is no partition 'sdxl|s77'"),
        (
            "tags",
            {
                "dagster/asset_partition_range_start": "s000000",
                "dagster/asset_partition_range_end": "s77",
            },
            "tags: there is no partition 's77'",
        ),
        ("tags", {"dagster/partition": "s000000"}, ""),
        ("latents", {"dagster/partition": "sdxl|s000000"}, ""),
        ("source_listing", {}, ""),
    ],
)
def test_a_partition_that_is_not_there_is_refused_in_one_line(home, asset, tags, words):
    from jobs.definitions import defs

    graph = defs.resolve_asset_graph()
    with open_instance(home) as instance:
        instance.add_dynamic_partitions("shards", ["s000000"])
        instance.add_dynamic_partitions("encodings", ["sdxl"])
        run = create_run_for_test(instance, asset_selection={dg.AssetKey(asset)}, tags=tags)
        coordinator = instance.run_coordinator
        workspace = SimpleNamespace(asset_graph=graph)
        if not words:
            check_partitions(run, graph, instance)
            return
        with pytest.raises(DataError) as refused:
            coordinator.submit_run(SubmitRunContext(run, workspace=workspace))
        assert str(refused.value) == words
        assert instance.get_run_by_id(run.run_id).status is DagsterRunStatus.FAILURE
