"""Each workspace has an instance of its own, and a bare `dagster dev` opens the same one as `--home
workspace`."""

import os
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.instance import InstanceRef

from resources.instance import ROOT_YAML, check_instance, instance, write_instance
from resources.run_launcher import FoundryRunLauncher
from training.errors import WorkspaceError

ROOT = Path(__file__).parents[2]


@dg.op
def nothing() -> None:
    pass


@dg.job
def empty_job() -> None:
    nothing()


def bare_instance(folder: Path) -> dg.DagsterInstance:
    """What `dagster dev` opens in a folder that holds the repository's dagster.yaml."""
    (folder / "dagster.yaml").write_text(ROOT_YAML)
    (folder / ".tmp_dagster_home").mkdir(exist_ok=True)
    return dg.DagsterInstance.from_ref(
        InstanceRef.from_dir(str(folder / ".tmp_dagster_home"), config_dir=str(folder))
    )


def test_the_repository_holds_the_root_settings():
    assert (ROOT / "dagster.yaml").read_text() == ROOT_YAML, (
        "write resources.instance.ROOT_YAML to dagster.yaml"
    )


def test_bare_dagster_and_workspace_share_runs_and_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    home = tmp_path / "workspace"
    write_instance(home)
    with instance(home) as opened:
        ours = empty_job.execute_in_process(instance=opened).run_id
        settings = opened.get_ref().settings
        assert isinstance(opened.run_launcher, FoundryRunLauncher)
        assert opened.get_concurrency_config().run_queue_config.max_concurrent_runs == 4
        coordinator = opened.get_ref().run_coordinator_data
    with bare_instance(tmp_path) as bare:
        check_instance(bare, home)
        assert [run.run_id for run in bare.get_runs()] == [ours]
        assert bare.all_logs(ours)
        theirs = empty_job.execute_in_process(instance=bare).run_id
        assert bare.get_ref().settings == settings
        assert bare.get_ref().run_coordinator_data == coordinator
        logs = Path(bare.get_ref().compute_logs_data.config_dict["base_dir"]).resolve()
    with instance(home) as opened:
        assert {run.run_id for run in opened.get_runs()} == {ours, theirs}
        assert Path(opened.get_ref().compute_logs_data.config_dict["base_dir"]).resolve() == logs


def test_two_workspaces_share_no_runs(tmp_path):
    for name in ("one", "two"):
        write_instance(tmp_path / name)
    with instance(tmp_path / "one") as one:
        empty_job.execute_in_process(instance=one)
        one.add_dynamic_partitions("shards", ["s000000"])
        with pytest.raises(WorkspaceError, match=r"workspace .*two"):
            check_instance(one, tmp_path / "two")
    with instance(tmp_path / "two") as two:
        assert two.get_runs() == []
        assert two.get_dynamic_partitions("shards") == []
        check_instance(two, tmp_path / "two")


def test_an_instance_that_keeps_nothing_is_accepted(tmp_path):
    with dg.DagsterInstance.ephemeral() as opened:
        check_instance(opened, tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("storage", "storage: {{sqlite: {{base_dir: {other}}}}}"),
        ("storage", "storage: {{sqlite: {{base_dir: {{env: ELSEWHERE}}}}}}"),
        (
            "compute_logs",
            "compute_logs: {{module: dagster._core.storage.local_compute_log_manager, "
            "class: LocalComputeLogManager, config: {{base_dir: {other}}}}}",
        ),
    ],
)
def test_storage_outside_of_the_workspace_is_refused(tmp_path, monkeypatch, key, value):
    other = tmp_path / "home-other" / "dagster"
    monkeypatch.setenv("ELSEWHERE", str(other))
    home = tmp_path / "home"
    write_instance(home)
    with (home / "dagster" / "dagster.yaml").open("a") as file:
        file.write(value.format(other=other) + "\n")
    with (
        pytest.raises(WorkspaceError, match=f"Dagster's {key} lies in .* outside of workspace"),
        instance(home),
    ):
        pass
    assert not other.exists()


def test_inside_the_environment_names_the_workspace(tmp_path, monkeypatch):
    write_instance(tmp_path)
    inside = {"DAGSTER_HOME": str(tmp_path / "dagster"), "FOUNDRY_HOME": str(tmp_path)}
    for name in inside:
        monkeypatch.delenv(name, raising=False)
    with instance(tmp_path):
        assert {name: os.environ.get(name) for name in inside} == inside
    assert not inside.keys() & os.environ.keys()
    for name in inside:
        monkeypatch.setenv(name, "/elsewhere")
    with instance(tmp_path):
        assert {name: os.environ.get(name) for name in inside} == inside
    assert {os.environ[name] for name in inside} == {"/elsewhere"}


def test_a_folder_without_settings_is_no_instance(tmp_path):
    with (
        pytest.raises(WorkspaceError, match=r"dagster\.yaml is missing.*foundry init"),
        instance(tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
