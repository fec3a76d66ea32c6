"""Reads prompts whose words change while an image is drawn: `[from:to:when]` and `[a|b]`, as A1111
reads them.

The behaviour is that of A1111's parser of November 2023, as measured on it: docs/sampling.md shows
it by examples, docs/decisions/0011-prompt-schedules.md says what is followed and why. A prompt
without such marks is one text.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from training.config.evaluation import PromptEnds, PromptTimes
from training.errors import EvaluationError

Schedule = tuple[tuple[int, str], ...]
"""Texts, each with the call of the UNet that it ends at. Ends rise to the number of calls that are
counted."""

_TOKEN = re.compile(r"\\.|[^\\\[\]():|]+|[\[\]():|]")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_DEEPEST = 100
"""Brackets within each other."""


@dataclass(frozen=True, slots=True)
class Edit:
    """`[before:after:when]`."""

    before: "Nodes"
    after: "Nodes"
    when: str
    """The number as it is written, which tells a step from a fraction."""


@dataclass(frozen=True, slots=True)
class Turns:
    """`[a|b|c]`: each call has the next one."""

    texts: tuple["Nodes", ...]


Node = str | Edit | Turns
Nodes = tuple[Node, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """A prompt taken apart."""

    nodes: Nodes
    literal: str = ""
    """What makes A1111 read the whole prompt as it is written; empty where nothing does."""
    loose: tuple[tuple[int, str], ...] = ()
    """Brackets outside every complete pair, which are letters here: place from 1, bracket."""
    undetermined: str = ""
    """The end of a schedule that A1111 reads now as a schedule and now as letters."""


def parse(prompt: str) -> Parsed:
    """Take a prompt apart.

    Raises:
        EvaluationError: brackets nest deeper than any reader goes.
    """
    tokens = _TOKEN.findall(prompt)
    if (
        "".join(tokens) != prompt
    ):  # a backslash needs a character behind it, and a line break is none
        return Parsed(nodes=(prompt,), literal="a backslash at its end or before a line break")
    places = [0, *itertools.accumulate(len(token) for token in tokens)]
    parser = _Parser(tokens)
    try:
        parser.run()
    except _LiteralError as error:
        return Parsed(
            nodes=(prompt,),
            literal=f"'|' (character {places[error.token] + 1}) outside of any [a|b]",
        )
    loose = sorted(place for place in parser.loose if tokens[place] != ":")
    undetermined = parser.undetermined()
    return Parsed(
        nodes=tuple(parser.nodes),
        loose=tuple((places[place] + 1, tokens[place]) for place in loose),
        undetermined=""
        if undetermined is None
        else "".join(tokens[parser.pairs[undetermined][0] : undetermined + 2]),
    )


def schedule(
    parsed: Parsed, num_calls: int, second_calls: int | None = None, *, rules: PromptTimes = "new"
) -> Schedule:
    """The texts of one pass.

    Args:
        parsed: The prompt.
        num_calls: Calls of the UNet that are counted in the first pass.
        second_calls: None for the schedule of the first pass, for that of the second the calls
            counted in that.
        rules: `new`: a number with a point is a fraction of the pass, 0 to 1 of the first and 1 to
            2 of the second, and one without is a step, counted through both. `old`: a number below
            1 is a fraction, others are steps, and both passes have the schedule of the first.

    Raises:
        EvaluationError: a time is too large for a number.
    """
    total = num_calls if second_calls is None or rules == "old" else second_calls

    def end_of(when: str) -> int:
        value = float(when)
        if rules == "old":
            value = value * total if value < 1 else value
        elif "." in when:
            value = (value if second_calls is None else value - 1.0) * total
        elif second_calls is not None:
            value = value - num_calls
        try:
            return min(total, int(value))
        except OverflowError:
            raise EvaluationError(
                f"the time {when} in a schedule is too large for a number"
            ) from None

    ends = {total}
    for node in _marks(parsed.nodes):
        ends.update(range(1, total + 1) if isinstance(node, Turns) else [end_of(node.when)])
    return tuple((end, _write(parsed.nodes, end, end_of)) for end in sorted(ends) if end >= 1)


def text_at(texts: Schedule, call: int, ends: PromptEnds) -> str:
    """The text that a call of the UNet sees, counted from 0.

    Args:
        texts: Of the pass.
        call: Which.
        ends: `a1111` compares an end, which counts from 1, with the number of the call, which
            counts from 0: the first text has one call more than it says. `exact` gives it as many
            as it says.

    Returns:
        The first text where the call lies beyond the last end: there A1111 begins anew.
    """
    number = call if ends == "a1111" else call + 1
    return next((text for end, text in texts if number <= end), texts[0][1])


def late_times(
    parsed: Parsed, num_calls: int, second_calls: int | None, rules: PromptTimes
) -> list[str]:
    """Times, as written, that lie beyond the last call of all passes."""
    further = 0 if second_calls is None or rules == "old" else second_calls
    late = []
    for node in _marks(parsed.nodes):
        if isinstance(node, Edit):
            value = float(node.when)
            if "." in node.when if rules == "new" else value < 1:
                is_late = value > (2 if further else 1)
            else:
                is_late = int(value) > num_calls + further
            late += [node.when] if is_late else []
    return late


def _marks(nodes: Nodes) -> Iterator[Edit | Turns]:
    for node in nodes:
        if not isinstance(node, str):
            yield node
            for part in node.texts if isinstance(node, Turns) else (node.before, node.after):
                yield from _marks(part)


def _write(nodes: Nodes, call: int, end_of: Callable[[str], int]) -> str:
    """The text at a call, counted from 1."""
    written = []
    for node in nodes:
        if isinstance(node, str):
            written.append(node)
        elif isinstance(node, Turns):
            written.append(_write(node.texts[(call - 1) % len(node.texts)], call, end_of))
        else:
            written.append(
                _write(node.before if call <= end_of(node.when) else node.after, call, end_of)
            )
    return "".join(written)


class _LiteralError(Exception):
    """The prompt has no reading but the literal one."""

    def __init__(self, token: int) -> None:
        """Name the token that is at fault."""
        self.token = token


@dataclass(frozen=True, slots=True)
class _Open:
    """A bracket that waits for its partner."""

    token: int
    parts: list[list[Node]] = field(default_factory=lambda: [[]])
    """What is parted by `:` and `|`."""
    separators: list[int] = field(default_factory=list)
    """Tokens."""


class _Parser:
    """One pass over the tokens; a bracket without its partner makes letters of all brackets that
    are open around it."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = tokens
        self.nodes: list[Node] = []
        self.loose: list[int] = []
        self.pairs: dict[int, tuple[int, Nodes]] = {}
        """Closing token of each complete pair -> opening one, and what the pair became."""
        self._open: list[_Open] = []

    def run(self) -> None:
        """Fill `nodes`, `loose` and `pairs`."""
        for place, text in enumerate(self.tokens):
            if text in ("(", "["):
                if len(self._open) == _DEEPEST:
                    raise EvaluationError(f"brackets are nested more than {_DEEPEST} deep")
                self._open.append(_Open(place))
            elif text in (")", "]"):
                self._close(place)
            elif text == "|" and not (self._open and self.tokens[self._open[-1].token] == "["):
                raise _LiteralError(place)
            elif text in (":", "|") and self._open:
                self._open[-1].parts.append([])
                self._open[-1].separators.append(place)
            else:
                self._add((text,))
        self._give_up()

    def _add(self, nodes: Nodes) -> None:
        (self._open[-1].parts[-1] if self._open else self.nodes).extend(nodes)

    def _close(self, place: int) -> None:
        made = self._make(self._open[-1], self.tokens[place]) if self._open else None
        if made is None:
            self._give_up()
            self.loose.append(place)
            made = (self.tokens[place],)
        else:
            self.pairs[place] = (self._open.pop().token, made)
        self._add(made)

    def _make(self, opened: _Open, closer: str) -> Nodes | None:
        """What a pair of brackets is; None where the two are no pair."""
        kind = self.tokens[opened.token] + closer
        marks = "".join(self.tokens[place] for place in opened.separators)
        parts = [tuple(part) for part in opened.parts]
        if kind == "()" and marks in ("", ":"):
            return ("(", *parts[0], *((":", *parts[1]) if marks else ()), ")")
        if kind != "[]":
            return None
        if not marks:
            return ("[", *parts[0], "]")
        if set(marks) == {"|"}:
            return (Turns(tuple(parts)),)
        when = "".join(node if isinstance(node, str) else "?" for node in parts[-1]).strip()
        if marks in (":", "::") and _NUMBER.fullmatch(when):
            return (Edit(parts[0] if marks == "::" else (), parts[-2], when),)
        return None

    def _give_up(self) -> None:
        """Make letters of all brackets that are open and of what parts their contents."""
        for opened in self._open:
            self.loose.append(opened.token)
            for place, part in zip([opened.token, *opened.separators], opened.parts, strict=True):
                if self.tokens[place] == "|":
                    raise _LiteralError(place)
                self.nodes += [self.tokens[place], *part]
        self._open.clear()

    def undetermined(self) -> int | None:
        """The last token of a schedule that A1111 may take for a letter, or None.

        To its grammar a run of brackets and colons may be letters together, however long, and which
        of two such runs it takes depends on the hash seed of its process: the `]` of a schedule may
        become part of a run that begins with it. Seen from the end of the prompt, `reached` holds
        all places where such a run may have begun.
        """
        reached = {len(self.tokens)}
        for end in range(len(self.tokens), 0, -1):
            if end not in reached:
                continue
            if self._is_letter(end - 1):
                for place in range(end - 1, -1, -1):
                    _, made = self.pairs.get(place, (place, ("",)))
                    if isinstance(made[0], Edit):
                        return place
                    if self.tokens[place] not in ("[", "]", "(", ")", ":") or isinstance(
                        made[0], Turns
                    ):
                        break
                    reached.add(place)
            else:
                first = end
                while first and not self._is_letter(first - 1):
                    first = self.pairs[first - 1][0] if first - 1 in self.pairs else first - 1
                    reached.add(first)
        return None

    def _is_letter(self, place: int) -> bool:
        return self.tokens[place] in ("[", "]", "(", ")", ":") and place not in self.pairs
