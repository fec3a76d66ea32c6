"""What the command line says when it is used wrongly, and how quiet it is otherwise."""

import re
import shlex
import subprocess
import sys

import pytest

from jobs.cli import app, shared


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

    monkeypatch.setattr(app, "open_store", interrupted)
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
    assert app._train_interrupted(store, "one") == (
        f"the trainer goes on by itself; follow it again with `foundry train --home {tmp_path} --run one`, "
        f"stop it with `foundry train --home {tmp_path} --run one --stop`"
    )
    monkeypatch.setattr(torchrun, "is_running", lambda run: False)
    assert app._train_interrupted(store, "one").startswith(
        "the run has no checkpoint yet; go on with `foundry train"
    )


def test_ctrl_c_in_a_run_names_the_workspace(command, monkeypatch, tmp_path):
    from jobs import pipeline
    from resources.workspace.store import Store

    def interrupted(home, **arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "open_store", lambda home: Store(tmp_path))
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
    said = app._run_interrupted(store)
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
