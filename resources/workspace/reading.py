"""What a stage reads is what its declaration says: while its body works, anything else is
refused."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from resources.graph import Stage
from training.errors import DeclarationError

_AT_WORK: ContextVar[tuple[Stage, ...]] = ContextVar("stages at work", default=())


@contextmanager
def at_work(*stages: Stage) -> Iterator[None]:
    """Hold what is read from here on to the declarations of the stages whose body works."""
    token = _AT_WORK.set(stages)
    try:
        yield
    finally:
        _AT_WORK.reset(token)


@contextmanager
def beside() -> Iterator[None]:
    """Read for the workspace itself, not for the stage: what there is, what is stale, what MLflow
    lacks."""
    with at_work():
        yield


def check(table: str, columns: Sequence[str] = ()) -> None:
    """Refuse to read what none of the stages at work declares.

    Args:
        table: What is to be read.
        columns: Of its columns those; none for all of them.

    Raises:
        DeclarationError: names the stage, the table and what to declare.
    """
    stages = _AT_WORK.get()
    lacking = [stage.lacks(table, columns) for stage in stages]
    if lacking and all(lacking):
        raise DeclarationError(
            f"stage {stages[0].name} reads {lacking[0]}, which its declaration does not name: add "
            f"Reads({table!r}, ...) to its `reads` where a change makes it stale, to `follows` where "
            "`others` digests it, or to `also` where it is only looked at"
        )
