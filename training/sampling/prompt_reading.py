"""Reads the prompts of a set as a protocol has them: which texts each pass shows, and what is
refused or warned of.

Everything is read before a model is loaded, so that a prompt that cannot be drawn costs no
sampling. Needs no torch.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import polars as pl

from training.config.evaluation import Sampler, SamplingConfig
from training.errors import EvaluationError
from training.sampling.prompt_schedules import Parsed, Schedule, late_times, parse, schedule
from training.sampling.prompt_weights import ReadText, read_text, unread_marks

_CALLS_A_STEP: Mapping[Sampler, int] = {"dpmpp_sde": 2}
"""Of samplers that call the UNet more than once; the last step has one, but A1111 counts it as the
others."""
_AND = re.compile(r"\bAND\b")
_LAST_NUMBER = re.compile(r"\s*:\s*([-+]?(?:\d+\.?|\d*\.\d+))$")
_TAG = re.compile(r"<\w+:[^>]+>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A prompt or a negative as it is drawn."""

    passes: tuple[Schedule, ...]
    """Of the first pass and, where there is one, of the second."""
    texts: Mapping[str, ReadText]
    """Each distinct text of the schedules, with its weights."""
    guidance: float = 1.0
    """Factor of the guidance scale."""
    remarks: tuple[str, ...] = ()
    """What A1111 reads otherwise than it looks."""


Readings = Mapping[tuple[str, bool], Reading]
"""By text and whether it is a negative."""


def read(text: str, config: SamplingConfig, *, is_negative: bool = False) -> Reading:
    """Read a prompt.

    Args:
        text: As a person wrote it.
        config: Sampler and steps, which times refer to, and how prompts are read.
        is_negative: A negative has no weight at its end.

    Raises:
        EvaluationError: it cannot be drawn, or not with `prompt_syntax = "strict"`; does not name
            the prompt.
    """
    text, guidance, remarks = (text, 1.0, []) if is_negative else _take_weight(text)
    if _AND.search(text):
        if not is_negative:
            raise EvaluationError(
                "'AND' joins several prompts to one image in A1111, which is not done here"
            )
        remarks.append("'AND' is a mere word in a negative prompt")
    remarks += [
        f"{tag!r} is read as words: LoRAs are named in evaluation.sampling.loras"
        for tag in _TAG.findall(text)
    ]
    parsed = parse(text)
    if parsed.undetermined:
        raise EvaluationError(
            f"{parsed.undetermined!r}: a schedule that touches a bracket or colon outside of all pairs is by chance a "
            "schedule or letters to A1111; put a space between the two"
        )
    first, second = counted_calls(config)
    passes = [schedule(parsed, first, rules=config.prompt_times)]
    if second is not None:
        passes.append(schedule(parsed, first, second, rules=config.prompt_times))
    texts = {
        text: read_text(text, config.prompt_weights) for entries in passes for _, text in entries
    }
    remarks += _letters(parsed)
    calls = f"{first} calls of the UNet" + (f" and {second} of the second pass" if second else "")
    late = late_times(parsed, first, second, config.prompt_times)
    remarks += [f"the time {when} lies beyond the last of {calls}" for when in late]
    if any(entry.num_words for entry in texts.values()):
        remarks.append("'BREAK' in brackets is a word and begins no chunk")
    if config.prompt_weights == "off":
        remarks += _unread(parsed, texts)
    if remarks and config.prompt_syntax == "strict":
        raise EvaluationError(
            f'{remarks[0]}; evaluation.sampling.prompt_syntax="strict" refuses that'
        )
    return Reading(passes=tuple(passes), texts=texts, guidance=guidance, remarks=tuple(remarks))


def counted_calls(config: SamplingConfig) -> tuple[int, int | None]:
    """Calls of the UNet that times count in the first pass and in the second, which may be none; as
    A1111 counts."""
    calls, second = _CALLS_A_STEP.get(config.sampler, 1), config.second_pass
    return config.num_steps * calls, None if second is None else second.num_steps * calls


def read_set(prompts: pl.DataFrame, config: SamplingConfig) -> Readings:
    """Read all prompts and negatives of a set.

    Args:
        prompts: Rows of table `prompt_sets`.
        config: As in `read`.

    Raises:
        EvaluationError: one of them cannot be drawn; names it.
    """
    readings: dict[tuple[str, bool], Reading] = {}
    for prompt_id, *texts in prompts.select("prompt_id", "text", "negative").iter_rows():
        for is_negative, text in zip((False, True), texts, strict=True):
            if (text, is_negative) in readings:
                continue
            try:
                readings[text, is_negative] = read(text, config, is_negative=is_negative)
            except EvaluationError as error:
                what = "the negative of prompt" if is_negative else "prompt"
                raise EvaluationError(f"{what} {prompt_id!r} cannot be drawn: {error}") from None
    return readings


def remarks(prompts: pl.DataFrame, readings: Readings) -> list[dict[str, object]]:
    """What A1111 reads otherwise than it looks, once for each prompt and negative.

    Returns:
        Rows `prompt_id` (the first that has it), `text` (`prompt` or `negative`) and `read as`.
    """
    rows: dict[tuple[str, bool], dict[str, object]] = {}
    for prompt_id, *texts in prompts.select("prompt_id", "text", "negative").iter_rows():
        for is_negative, text in zip((False, True), texts, strict=True):
            if found := readings[text, is_negative].remarks:
                name = "negative" if is_negative else "prompt"
                row = {"prompt_id": prompt_id, "text": name, "read as": "; ".join(found)}
                rows.setdefault((text, is_negative), row)
    return list(rows.values())


def is_plain(text: str) -> bool:
    """Whether a text that no one wrote as a prompt is one text to every reader, with the words that
    it has."""
    try:
        found = read(text, SamplingConfig(prompt_syntax="strict"))
    except EvaluationError:
        return False
    return list(found.texts) == [text]


def _take_weight(text: str) -> tuple[str, float, list[str]]:
    """A prompt without the number at its end, which A1111 takes for the weight of what AND would
    part, and without the white space there; the number, and what is to be said of it."""
    text = text.rstrip()
    if not (number := _LAST_NUMBER.search(text)):
        return text, 1.0, []
    remark = (
        f"{number[0]!r} at the end is no text, but makes the guidance {number[1]} times as strong"
    )
    return text[: number.start()], float(number[1]), [remark]


def _letters(parsed: Parsed) -> list[str]:
    """Marks that are letters to the schedule, as far as they show: round brackets that are weights
    do not."""
    if parsed.literal:
        return [f"{parsed.literal} makes A1111 read every schedule of the prompt as letters"]
    opened: list[tuple[int, str]] = []
    alone: list[tuple[int, str]] = []
    for entry in parsed.loose:
        if entry[1] == ")" and opened:
            opened.pop()
        else:
            (opened if entry[1] == "(" else alone).append(entry)
    listed = ", ".join(
        f"{bracket!r} (character {place})" for place, bracket in sorted([*alone, *opened])
    )
    return (
        [f"{listed}: letters, as no [from:to:when], [a|b], [text] or (text:weight) is whole there"]
        if listed
        else []
    )


def _unread(parsed: Parsed, texts: Iterable[str]) -> list[str]:
    """Marks of weights, where none are read, but for brackets that `_letters` has named."""
    named = {bracket for _, bracket in parsed.loose}
    found = dict.fromkeys(
        mark for text in texts for mark in unread_marks(text) if mark not in named
    )
    if not found:
        return []
    listed = ", ".join(repr(mark) for mark in found)
    verb = "is" if len(found) == 1 else "are"
    return [
        f'{listed} {verb} read as letters, because prompt_weights = "off" reads no weights and no BREAK'
    ]
