"""What the command line says when it is used wrongly, and how quiet it is otherwise."""

import re
import shlex
import subprocess
import sys

import pytest

from jobs.cli import app, shared, training, workspace


@pytest.fixture
def command(monkeypatch, capsys):
    """`command("sql", ...)`: status, standard output and standard error of `foundry sql ...` in
    this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["foundry", *arguments])
        with pytest.raises(SystemExit) as end:
            app.main()
        return end.value.code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["statsu"], "No such command 'statsu'"),
        (["sql"], "Missing argument"),
        (["run", "--max-minutes", "soon"], "'--max-minutes'"),
        (["run", "--fast"], "No such option: --fast"),
    ],
)
def test_a_wrong_command_line_is_named_with_its_usage(command, arguments, said):
    status, _, errors = command(*arguments)
    assert status == 2
    assert "Usage: foundry" in errors
    assert said in errors


def test_ctrl_c_says_that_nothing_is_lost(command, monkeypatch):
    monkeypatch.setattr(shared, "_kept", [])

    def interrupted(home):
        raise KeyboardInterrupt

    monkeypatch.setattr(workspace, "open_store", interrupted)
    status, _, errors = command("sql", "select 1")
    assert status == 130
    assert "what is committed stays" in errors


def test_a_query_says_what_it_found_and_nothing_else(tmp_path):
    """In a process of its own: warnings of libraries come with their first import."""
    home = tmp_path / "workspace"
    foundry = [sys.executable, "-c", "from jobs.cli.app import main; main()"]
    subprocess.run([*foundry, "init", home, "--preset", "demo"], check=True, capture_output=True)
    asked = [*foundry, "sql", "select 7 as n", "--format", "csv", "--home", home]
    done = subprocess.run(asked, check=True, capture_output=True, text=True)
    assert done.stdout == "n\n7\n"
    assert done.stderr == f"workspace {home}\n"


def test_ctrl_c_while_following_says_that_the_trainer_goes_on(command, monkeypatch, tmp_path):
    from resources import torchrun
    from resources.workspace.store import Store

    store = Store(tmp_path)
    folder = store.paths.run_folder("one")
    monkeypatch.setattr(torchrun, "is_running", lambda run: run == folder)
    assert training._train_interrupted(store, "one") == (
        f"the trainer goes on by itself; follow it again with `foundry train --home {tmp_path} --run one`, "
        f"stop it with `foundry train --home {tmp_path} --run one --stop`"
    )
    monkeypatch.setattr(torchrun, "is_running", lambda run: False)
    assert training._train_interrupted(store, "one").startswith(
        "the run has no checkpoint yet; go on with `foundry train"
    )


def test_ctrl_c_in_a_run_names_the_workspace(command, monkeypatch, tmp_path):
    from jobs import pipeline
    from resources.workspace.store import Store

    def interrupted(home, **arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(workspace, "open_store", lambda home: Store(tmp_path))
    monkeypatch.setattr(pipeline, "bring_up_to_date", interrupted)
    status, _, errors = command("run")
    assert status == 130
    assert f"go on with `foundry run --home {tmp_path}`" in errors


def test_ctrl_c_in_a_run_names_the_trainers_that_go_on(monkeypatch, tmp_path):
    from resources import torchrun
    from resources.graph import Scope
    from resources.workspace.currency import Currency
    from resources.workspace.store import Store

    home = tmp_path / "[v1] Bob's set"
    store = Store(home)
    monkeypatch.setattr(
        Currency, "keys", lambda self, scope: ["ended", "going"] if scope is Scope.RUN else []
    )
    monkeypatch.setattr(
        torchrun, "is_running", lambda folder: folder == store.paths.run_folder("going")
    )
    said = workspace._run_interrupted(store)
    assert "the trainer of going goes on by itself" in said
    assert "ended" not in said
    commands = said.split("`")[1::2]
    assert [shlex.split(command) for command in commands] == [
        ["foundry", "run", "--home", str(home)],
        ["foundry", "train", "--home", str(home), "--run", "going", "--stop"],
    ]


def test_a_bar_fits_80_columns_with_its_counts(monkeypatch, capsys):
    from jobs.cli import console
    from training import progress

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with console.progress() as announce:
        announce("checkpoints", 1)
        progress.report("samples", 98_123, 250_000, "0.0 MB")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "98123/250000" in plain
    assert "0.0 MB" in plain
    assert "…" not in plain


@pytest.mark.parametrize("width", [20, 30, 45, 60, 80, 200])
@pytest.mark.parametrize("why", [False, True])
def test_status_shows_every_cell_at_any_width(monkeypatch, capsys, width, why):
    from jobs.cli import console
    from resources.workspace.staleness import StageStatus, StalePartition

    changed = StalePartition(
        "sdxl|s000007", ("[selection] min_score 1 → 3", "model tagger (demo:models/tagger) changed")
    )
    error = "[models] clip = '/a/very/long/path/that/goes/on/and/on' is no folder"
    found = [
        StageStatus("source_listing", 1, (), 0.0),
        StageStatus("bucket_assignments", 10, (changed,), 180.0),
        StageStatus("prompt_statistics", 1, (), 0.0, ("bucket_assignments",)),
        StageStatus("embeddings", 4, (), None, (), error),
    ]
    monkeypatch.setenv("COLUMNS", str(width))
    console.status(found, why=why)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= width
    said = "".join(said.split())
    for cell in (
        "source_listing",
        "bucket_assignments",
        "prompt_statistics",
        "embeddings",
        "1 of 10",
        "3 min",
    ):
        assert "".join(cell.split()) in said
    if width < 46 or width >= 120:  # else a reason is wrapped beside the other columns
        for cell in ("min_score 1 → 3; model tagger", "may follow bucket_assignments", error):
            assert "".join(cell.split()) in said
        assert ("sdxl|s000007:" in said) is why
    assert "…" not in said


@pytest.mark.parametrize("width", [30, 80])
def test_the_summary_of_a_run_loses_no_column_on_a_narrow_terminal(
    monkeypatch, capsys, tmp_path, width
):
    from jobs.cli import console
    from jobs.pipeline import Outcome
    from resources.workspace.store import Store

    (tmp_path / "foundry.toml").write_text("format = 1\n")
    outcome = Outcome(
        stage="bucket_assignments", num_made=12, num_partitions=34, rows_in=56_001, rows_out=56_002, rows_rejected=78,
        seconds=9.5,
    )  # fmt: skip
    monkeypatch.setenv("COLUMNS", str(width))
    console.summary(Store(tmp_path), [outcome], 0.0)
    said = " ".join(capsys.readouterr().out.split())
    for cell in (
        "bucket_assignments",
        "12 of 34",
        "56001",
        "56002",
        "78",
        "9.5",
        "rows in",
        "rejected",
    ):
        assert cell in said
