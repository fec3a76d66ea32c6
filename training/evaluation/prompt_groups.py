"""Prompts that ask for what fine-tunes are known to lose or never to learn, by group, and negative
prompts by name.

They are scored per group, base against fine-tuned, and do not count in the verdict over all
prompts: a fine-tune may forget what it was not made for. A group has 32 prompts, because a verdict
needs 30.
"""

import hashlib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence

import polars as pl

from training.config.evaluation import PROMPT_GROUPS
from training.errors import EvaluationError

SIZE = 32
"""Prompts of a group."""
_PEOPLE = (
    "a woman", "a man", "a girl with red hair", "an old fisherman", "a nurse", "a boy in a raincoat", "a dancer",
    "a bearded cook",
)  # fmt: skip
_COLOURS = ("red", "blue", "green", "yellow", "white", "black", "purple", "orange")
_THINGS = ("car", "umbrella", "chair", "teapot", "bicycle", "suitcase", "door", "scarf")
_RARE = (
    "harpsichord", "kayak", "weathervane", "sextant", "abacus", "trebuchet", "zeppelin", "beehive oven", "loom",
    "barometer", "gondola", "anvil", "sundial", "accordion", "lighthouse lens", "drawbridge", "plough", "wine press",
    "telegraph key", "orrery", "butter churn", "aqueduct", "printing press", "spinning wheel", "water mill",
    "diving bell", "hot-air balloon basket", "cable car", "haystack", "stave church", "pottery kiln", "chess clock",
    "oil lamp", "roller coaster", "snowplough", "windlass", "yurt", "tram depot", "observatory dome", "grain silo",
    "coal scuttle", "cheese wheel", "fishing trawler", "bandstand", "toll booth", "greenhouse boiler", "metronome",
    "pinball machine",
)  # fmt: skip
"""Words of everyday English that image boards have hardly a tag for."""


def _grid(pattern: str, *columns: Sequence[str]) -> list[str]:
    """`pattern` filled with every combination, thinned evenly to a group's size."""
    rows = [pattern.format(*row) for row in itertools.product(*columns)]
    return [rows[place * len(rows) // SIZE] for place in range(min(SIZE, len(rows)))]


def _pairs() -> list[tuple[str, str]]:
    """Two different colours, each pair once."""
    return [(one, other) for one, other in itertools.permutations(_COLOURS, 2)][:: 56 // SIZE][
        :SIZE
    ]


GROUPS: Mapping[str, Callable[[], list[str]]] = {
    "hands": lambda: _grid(
        "{} {}", _PEOPLE,
        ("holding a cup in both hands", "waving with one hand", "with folded arms", "tying a shoelace, close-up"),
    ),
    "heads": lambda: _grid(
        "{}: {}",
        ("full body portrait, from head to toe", "standing in a doorway, whole figure",
         "jumping, all of the body in the frame", "wide shot, walking across a square"),
        _PEOPLE,
    ),
    "sides": lambda: [
        *(f"{who} looking to the {side}, profile" for who in _PEOPLE for side in ("left", "right")),
        *(f"a {one} on the left and a {other} on the right"
          for one, other in itertools.islice(itertools.permutations(_THINGS, 2), 0, 48, 3)),
    ],
    "pose": lambda: _grid(
        "{} {}", _PEOPLE,
        ("doing a handstand", "kneeling on one knee", "sitting cross-legged on the floor", "lying on the back"),
    ),
    "two_colours": lambda: [
        f"a {one} {_THINGS[place % 8]} beside a {other} {_THINGS[(place + 3) % 8]}"
        for place, (one, other) in enumerate(_pairs())
    ],
    "writing": lambda: _grid(
        '{} with the word "{}"',
        ("a wooden sign", "a neon sign at night", "a book cover", "a cake"),
        ("OPEN", "HELLO", "EXIT", "COFFEE", "2049", "WINTER", "LUCKY", "STOP"),
    ),
    "general": lambda: _grid(
        "{} {}",
        ("a photograph of", "an oil painting of", "a pencil drawing of", "an aerial view of"),
        ("a lighthouse on a cliff in a storm", "a bowl of ripe figs", "a steam train crossing a viaduct",
         "a sleeping fox in the snow", "a street market in the rain", "an empty swimming pool", "a cathedral at dawn",
         "a field of sunflowers"),
    ),
}  # fmt: skip
"""Group to its prompts. `general` is far from most data sets and shows how far the model has
drifted."""
UNKNOWN_WORDS = "unknown_words"
"""Group of words that the data set has no tag for: bigASP's page warns that they degrade it."""
_SHIPPED_ID = rf"^(?:{'|'.join(PROMPT_GROUPS)})-[0-9a-f]{{12}}$"
"""Ids that `group_prompts` gives; a file may have groups of the same names."""

NEGATIVES: Mapping[str, str] = {
    "basic": "low quality, worst quality, blurry, jpeg artifacts, watermark, signature, text",
    "drawn": "low quality, worst quality, photo, realistic, 3d, bad anatomy, bad hands, extra digits, text",
    "realistic": "drawing, painting, illustration, cartoon, anime, 3d render, plastic skin, oversaturated, watermark",
    "non_adult": "nsfw, nude, naked, nipples, underwear, sexual, explicit",
    "letter_box": "letterboxed, black borders, white borders, frame, border, split screen, collage",
}
"""Negative prompts by name."""


def negative_prompt(name_or_text: str) -> str:
    """The negative prompt of that name, or the text itself."""
    return NEGATIVES.get(name_or_text, name_or_text)


def group_prompts(group: str, known_words: Collection[str] = ()) -> list[tuple[str, str]]:
    """The prompts of a group as `(prompt_id, text)`; an id follows from group and text alone.

    Args:
        group: One of `PROMPT_GROUPS`.
        known_words: Tags and aliases of the data set, in any spelling; `unknown_words` leaves them
            out.

    Raises:
        EvaluationError: the data set knows too many of the rare words to make the group.
    """
    if group == UNKNOWN_WORDS:
        known = {word.replace("_", " ").casefold() for word in known_words}
        texts = [f"a photo of a {word}, detailed" for word in _RARE if word not in known][:SIZE]
        if len(texts) < SIZE:
            raise EvaluationError(
                f"prompt group {group!r}: the data set has tags for all but {len(texts)} of {len(_RARE)} rare words, "
                f"{SIZE} are needed; leave the group out"
            )
    else:
        texts = GROUPS[group]()
    return [(f"{group}-{hashlib.sha256(text.encode()).hexdigest()[:12]}", text) for text in texts]


def counted(rows: pl.DataFrame) -> pl.DataFrame:
    """Those rows (prompt_id) that a verdict over all prompts is on: all but the shipped groups';
    where there are no others, all."""
    own = rows.filter(~pl.col("prompt_id").str.contains(_SHIPPED_ID))
    return rows if own.is_empty() else own
