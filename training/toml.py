"""TOML to dataclasses and back: strict about keys and types, and exact about where a mistake
stands."""

import dataclasses
import difflib
import re
import tomllib
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from training.errors import ConfigError

T = TypeVar("T")


def load(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: the file is missing or is not TOML; the message names file and line.
    """
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def build(
    cls: type[T], values: Mapping[str, Any], *, origin: Path | None = None, prefix: str = ""
) -> T:
    """Make the dataclass `cls` from parsed TOML.

    Args:
        cls: A frozen keyword-only dataclass of plain values, dataclasses, tuples and dicts of them.
        values: Parsed TOML.
        origin: File that the values came from, for error messages.
        prefix: Dotted path of `values` inside the file.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a missing key, a value of another
            type, or a rule of the dataclass; the message names the key and, when known, file and
            line.
    """
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if key not in fields:
            deeper = [name for name in _leaves(cls) if name.rpartition(".")[2] == key]
            hint = (
                f"did you mean {prefix + deeper[0]!r}?" if deeper else nearest(key, sorted(fields))
            )
            raise ConfigError(f"{_where(origin, key)}unknown key {path!r}; {hint}")
        arguments[key] = _convert(hints[key], value, origin, path)
    for name, item in fields.items():
        required = (
            item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        )
        if required and name not in arguments:
            raise ConfigError(f"{_where(origin, None)}key {prefix}{name!r} is required")
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{_where(origin, None)}{error}") from None


def build_with(
    cls: type[T],
    values: Mapping[str, Any],
    assignments: list[str],
    *,
    origin: Path | None = None,
    prefix: str = "",
) -> T:
    """`build` with `a.b=VALUE` assignments over the values, whose mistakes are told from those of
    the file.

    Raises:
        ConfigError: as `build` does; a wrong assignment is named as what follows `--set`.
    """
    if not assignments:
        return build(cls, values, origin=origin, prefix=prefix)
    given = override(dict(values), assignments)
    if _mistake(cls, given) is None:
        return build(cls, given)
    of_file = _mistake(cls, values)
    for one in assignments:
        mistake = _mistake(cls, override(dict(values), [one]))
        if mistake not in (None, of_file):
            raise ConfigError(f"--set {one}: {mistake}")
    if _mistake(cls, given) == of_file:
        build(cls, values, origin=origin, prefix=prefix)
    raise ConfigError(f"--set {' --set '.join(assignments)}: {_mistake(cls, given)}")


def _mistake(cls: type[Any], values: Mapping[str, Any]) -> str | None:
    try:
        build(cls, values)
    except ConfigError as error:
        return str(error)
    return None


def nearest(word: str, known: Collection[str]) -> str:
    """The end of a message about an unknown word: the one that was meant, or all there are."""
    near = difflib.get_close_matches(word, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known) or 'none'}"


def _leaves(cls: type[Any]) -> list[str]:
    """Dotted paths of all keys in the tables of a dataclass."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        is_table = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        found += [f"{name}.{inner}" for inner in _leaves(hint)] if is_table else [name]
    return found


def dump(value: Any) -> dict[str, Any]:
    """A dataclass as plain JSON-able values, tuples as lists: the resolved section that manifests
    record."""
    return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as `a.b.c` keys, for differences between two configurations."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def override(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """A copy of nested `values` with `a.b=VALUE` assignments applied; VALUE is TOML, or a bare
    string.

    Raises:
        ConfigError: an assignment without `=`, or a path through something that is not a table.
    """
    result = _copy(values)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {assignment!r} must have the form key=value")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        table = result
        *parents, last = path.split(".")
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {assignment!r}: {parent!r} is not a table")
        table[last] = value
    return result


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return dump(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _where(origin: Path | None, key: str | None) -> str:
    if origin is None:
        return ""
    if key is not None and origin.is_file():
        for number, line in enumerate(origin.read_text("utf-8-sig").splitlines(), 1):
            if re.match(rf"\s*(\[+.*\b)?{re.escape(key)}\b", line):
                return f"{origin}:{number}: "
    return f"{origin}: "


def _convert(hint: Any, value: Any, origin: Path | None, path: str) -> Any:
    """`value` as the annotated type; dispatches on the few shapes that configurations use."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise _wrong(origin, path, value, "a table")
        return build(hint, value, origin=origin, prefix=f"{path}.")
    if kind is dict:
        if not isinstance(value, Mapping):
            raise _wrong(origin, path, value, "a table")
        return {
            key: _convert(arguments[1], item, origin, f"{path}.{key}")
            for key, item in value.items()
        }
    if kind is tuple:
        if not isinstance(value, (list, tuple)):
            raise _wrong(origin, path, value, "a list")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise _wrong(origin, path, value, f"a list of {len(kinds)}")
        return tuple(
            _convert(kind, item, origin, f"{path}[{i}]")
            for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if kind is typing.Literal:
        if not any(type(value) is type(known) and value == known for known in arguments):
            raise _wrong(origin, path, value, f"one of {', '.join(map(repr, arguments))}")
        return value
    if kind is types.UnionType:
        return value if value is None else _convert(arguments[0], value, origin, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint or value != value:
        raise _wrong(
            origin,
            path,
            value,
            {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}[
                hint
            ],
        )
    return value


def _wrong(origin: Path | None, path: str, value: Any, rule: str) -> ConfigError:
    return ConfigError(
        f"{_where(origin, path.rsplit('.', maxsplit=1)[-1])}{path}={value!r} must be {rule}"
    )
