"""What a sample's prompt says in one epoch, with a trace of every choice.

A pure function of the sample, the frozen vocabulary, the recipe and the generator, which the caller keys by (epoch,
image_id).
"""

from itertools import accumulate
from random import Random
from typing import Any, NamedTuple

from training.data import spelling
from training.data.samples import Sample
from training.data.vocabulary import GENERAL, PEOPLE, Vocabulary
from training.run_config import PromptConfig

WATERMARK = "watermark"
"""The tag of an image that has one."""
_MAX_SCORE_TAGS = 3
_PLACES = {PEOPLE: 0, "character": 1, "copyright": 2, "artist": 3}
"""Categories that stand before special and general tags in Kohaku's order."""
_UP = [f"score_{step}_up" for step in range(1, 10)]
_EXACT = [f"score_{step}" for step in range(10)]
_SENTENCE_ENDS = (".", "!", "?", ",", ";", ":")


class Prompt(NamedTuple):
    """A prompt, in pieces that no token of CLIP spans."""

    pieces: list[str]
    """Tags with the commas after them, words of a caption."""
    bare: list[str]
    """The same without the commas that part them, so that a prompt can be cut after any of them."""
    gaps: list[str] | None
    """White space after each piece; None where a single space parts all of them."""
    num_chunks: int | None
    """Chunks that the recipe's shares give it; None lets it have those that it fills."""
    trace: dict[str, Any]
    """Every choice. `kind`: empty, caption, caption_and_tags, tags; `as` of an empty one: string or zeros; `caption`:
    given or made, and `line` of it; of tags `wanted`, `num_tags`, `tags` and `score_tags` (canonical, in order),
    `dropped`, `aliases` and `misspelled` by tag, `spelling`, `loose`."""

    @property
    def text(self) -> str:
        """The prompt as a string."""
        if self.gaps is None:
            return " ".join(self.pieces)
        return "".join([part for pair in zip(self.pieces, self.gaps, strict=True) for part in pair])


def make_prompt(sample: Sample, vocabulary: Vocabulary, config: PromptConfig, rng: Random) -> Prompt:
    """The prompt of one sample.

    In order: the number of chunks where the recipe has shares of them; the empty prompt with `empty_prob`; caption,
    caption and tags, or tags, by their shares; a caption alone where there is no tag.

    Args:
        sample: As `Samples` gives it.
        vocabulary: Categories and aliases of its tags.
        config: The recipe.
        rng: Draws everything.

    Source: bigASP v1's page and data.py (tags, score tags, spelling, separators); HakuBooru's caption.py (order);
    DALL-E 3, section 3 (given and made captions).
    """
    num_chunks = draw_chunks(config, rng)
    if rng.random() < config.empty_prob:
        return Prompt([], [], None, num_chunks, {"kind": "empty", "as": config.empty_as})
    names = sample.tags + sample.words
    if sample.watermark:
        names.append(WATERMARK)
    trace: dict[str, Any] = {"kind": "tags"}
    words: list[str] = []
    if sample.caption or sample.made_caption:
        draw = rng.random()
        alone = draw < config.caption_prob or not names
        if alone or draw < config.caption_prob + config.caption_and_tags_prob:
            words, trace = _choose_caption(sample, config, rng)
        if words and alone:
            return Prompt(words, words, None, num_chunks, trace)
    tags, trace["wanted"], trace["dropped"] = _choose_tags(names, vocabulary, config, rng)
    score_tags = choose_score_tags(sample.score, rng) if config.score_tags else []
    trace["num_tags"], trace["tags"], trace["score_tags"] = len(tags), tags, score_tags
    pieces, bare, gaps = _write(tags, score_tags, vocabulary, config, rng, trace)
    if words:
        trace["kind"] = "caption_and_tags"
        comma = "," if pieces and not words[-1].endswith(_SENTENCE_ENDS) else ""
        gaps = [" "] * len(words) + gaps if gaps is not None else None
        pieces, bare = [*words[:-1], words[-1] + comma, *pieces], [*words, *bare]
    return Prompt(pieces, bare, gaps, num_chunks, trace)


def draw_chunks(config: PromptConfig, rng: Random) -> int | None:
    """Chunks of a prompt by the recipe's shares, the first draw of its generator; None where it has no shares."""
    if not config.chunk_shares:
        return None
    draw = rng.random() * sum(config.chunk_shares)
    return next(
        (number for number, share in enumerate(accumulate(config.chunk_shares), 1) if draw < share),
        len(config.chunk_shares),
    )


def _choose_caption(sample: Sample, config: PromptConfig, rng: Random) -> tuple[list[str], dict[str, Any]]:
    """Words of the sentence that is used, and the trace of its choice; no words where all its lines are blank."""
    given, made = ([line.strip() for line in (text or "").splitlines() if line.strip()]
                   for text in (sample.caption, sample.made_caption))  # fmt: skip
    take_made = bool(made) and (not given or rng.random() < config.made_caption_prob)
    lines = made if take_made else given
    if not lines:
        return [], {"kind": "tags"}
    line = int(rng.random() * len(lines))
    return lines[line].split(" "), {"kind": "caption", "caption": "made" if take_made else "given", "line": line}


def _choose_tags(
    names: list[str], vocabulary: Vocabulary, config: PromptConfig, rng: Random
) -> tuple[list[str], int, list[str]]:
    """Tags in the order of the prompt, the number that was wanted, and those that dropout took."""
    category, random = vocabulary.category, rng.random
    # The order of all of them: by a number drawn for each.
    keys = {name: random() for name in names}
    first = [name for name in config.first_tags if keys.pop(name, None) is not None]
    always = [name for name in config.always_tags if keys.pop(name, None) is not None]
    dropped: list[str] = []
    if config.tag_dropout:
        dropped = [
            name for name in keys if category.get(name, GENERAL) not in _PLACES and random() < config.tag_dropout
        ]
        for name in dropped:
            del keys[name]
    num_forced = len(first) + len(always)
    wanted = num_forced + len(keys)
    if config.mean_tags:
        wanted = max(config.min_tags, int(rng.gauss(config.mean_tags, config.std_tags)))
    chosen = sorted(keys, key=keys.__getitem__)[: max(wanted - num_forced, 0)]
    for name in always:
        chosen.insert(int(random() * (len(chosen) + 1)), name)
    if config.order == "kohaku":
        placed = [name for name in chosen if category.get(name, GENERAL) in _PLACES]
        placed.sort(key=lambda name: (_PLACES[category[name]], name))
        chosen = placed + [name for name in chosen if category.get(name, GENERAL) not in _PLACES]
    return first + chosen, wanted, dropped


def choose_score_tags(score: int | None, rng: Random) -> list[str]:
    """One to three of `score_1_up` to `score_N_up` and `score_N`, so that each alone comes to mean something."""
    if not score:
        return []
    count = 1 + int(rng.random() * min(_MAX_SCORE_TAGS, score + 1))
    candidates = [*_UP[:score], _EXACT[score]]
    return [candidates.pop(int(rng.random() * len(candidates))) for _ in range(count)]


def _write(
    tags: list[str],
    score_tags: list[str],
    vocabulary: Vocabulary,
    config: PromptConfig,
    rng: Random,
    trace: dict[str, Any],
) -> tuple[list[str], list[str], list[str] | None]:
    """Pieces, bare pieces and gaps of the tags as they are typed; the choices go into `trace`."""
    names, trace["aliases"] = spelling.mutate(tags, vocabulary.aliases, config.alias_prob, rng)
    trace["spelling"] = spelling.choose_spelling(config, rng)
    written = spelling.write(score_tags + names, trace["spelling"], rng)
    trace["misspelled"] = misspelled = {}
    if config.misspelling_prob:
        for place, name in enumerate(tags, len(score_tags)):
            if (
                rng.random() < config.misspelling_prob
                and (slip := spelling.misspell(written[place], rng)) != written[place]
            ):
                misspelled[name] = written[place] = slip
    trace["loose"] = rng.random() < config.loose_separators_prob
    if trace["loose"]:
        return spelling.separate_loosely(written, rng)
    return spelling.separate(written), written, None
