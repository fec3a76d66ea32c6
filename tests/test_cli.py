"""What the command line says when it is used wrongly, and how quiet it is otherwise."""

import subprocess
import sys

import pytest

from jobs import cli


@pytest.fixture
def command(monkeypatch, capsys):
    """`command("sql", ...)`: status, standard output and standard error of `foundry sql ...` in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["foundry", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
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
    def interrupted(home):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "open_store", interrupted)
    status, _, errors = command("sql", "select 1")
    assert status == 130
    assert "what is committed stays" in errors


def test_a_query_says_what_it_found_and_nothing_else(tmp_path):
    """In a process of its own: warnings of libraries come with their first import."""
    home = tmp_path / "workspace"
    foundry = [sys.executable, "-c", "from jobs.cli import main; main()"]
    subprocess.run([*foundry, "init", home, "--preset", "demo"], check=True, capture_output=True)
    asked = [*foundry, "sql", "select 7 as n", "--format", "csv", "--home", home]
    done = subprocess.run(asked, check=True, capture_output=True, text=True)
    assert done.stdout == "n\n7\n"
    assert done.stderr == f"workspace {home}\n"
