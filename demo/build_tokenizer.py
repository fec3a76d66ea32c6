"""Real CLIPTokenizer files cut to the demo's words: complete at byte level, every demo word one
token."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from demo.scenes import ALIASES, WATERMARK_WORDS, all_tags

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77
OTHER_WORDS = (
    "a an and on in at of with the no one two three background picture image photo drawing drawn shape shapes colour "
    "color pattern patterns score up rating general sensitive quality best good normal low worst blurry blurred noisy "
    "noise jpeg artifacts artifact washed out text logo watermark watermarked person dog cat tree house sky water man "
    "woman people face pink brown grey gray gold silver pastel bright dark light left right top bottom centre center "
    "middle above below next to behind front bigger smaller masterpiece great newest recent early old is this that"
)
"""What prompts, negative prompts and captions say beside tags; other words fall into pieces, as in
every CLIP."""


def vocabulary_words() -> list[str]:
    """Every word that becomes one token, sorted."""
    names = [*all_tags(), *(name for names in ALIASES.values() for name in names), *WATERMARK_WORDS]
    parts = " ".join(names).lower().replace("_", " ").split()
    return sorted(
        {part for part in [*parts, *OTHER_WORDS.split()] if part.isascii() and part.isalpha()}
    )


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first (ties by spelling), until each word is one
    piece."""
    pieces = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for parts in pieces.values() for pair in pairwise(parts))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = {word: _merge(parts, best) for word, parts in pieces.items()}


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def build(folder: Path, *, padding: str = EOS, max_length: int = MAX_LENGTH) -> CLIPTokenizer:
    """Write vocab.json, merges.txt and the settings to `folder`, and load them as users do.

    Args:
        folder: Made when missing.
        padding: `<|endoftext|>` (SDXL's first tokenizer, CLIP) or `!`, id 0 (SDXL's second, OWLv2).
        max_length: 77; OWLv2 has 16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    merges = learn_merges(vocabulary_words())
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *("".join(pair) for pair in merges),
        BOS,
        EOS,
    ]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": padding}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)
