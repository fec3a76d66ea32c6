"""A CLIP tokenizer from its folder by the `tokenizers` library alone: counting a run's tokens needs
no transformers.

Gives the ids that transformers' `CLIPTokenizer` gives, which it is tested against.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from training.errors import ModelError
from training.models.base_model import read_json

_SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>"}  # fmt: skip
"""CLIP's own, where a folder names no other."""
# OpenAI's CLIP, simple_tokenizer.py: special tokens, English endings, words, single digits, runs of
# anything else.
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class ClipTokenizer:
    """What `training.prompts.tokens` asks of a tokenizer."""

    def __init__(
        self, backend: Tokenizer, bos_token_id: int, eos_token_id: int, pad_token_id: int
    ) -> None:
        """Take a tokenizer whose special tokens are added already, and the ids of three of them."""
        self.backend_tokenizer = backend
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            bos_token_id,
            eos_token_id,
            pad_token_id,
        )

    @classmethod
    def load(cls, folder: Path) -> "ClipTokenizer":
        """Read a folder as transformers writes it, new or old.

        Raises:
            ModelError: files are missing or broken.
        """
        try:
            vocabulary, merges = _read_words(folder)
            special, added = _read_special(folder)
            backend = Tokenizer(
                BPE(
                    vocab=vocabulary, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>",
                    unk_token=special["unk_token"],
                )
            )  # fmt: skip
            backend.normalizer = normalizers.Sequence(
                [
                    normalizers.NFC(),
                    normalizers.Replace(Regex(r"\s+"), " "),
                    normalizers.Lowercase(),
                ]
            )
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
            backend.add_tokens(added)
        except ModelError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exceptions on broken files
            raise ModelError(f"tokenizer cannot be loaded from {folder}: {error}") from error
        known = backend.get_vocab()
        return cls(
            backend, *(known[special[key]] for key in ("bos_token", "eos_token", "pad_token"))
        )

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, truncation: bool, verbose: bool
    ) -> Any:
        """The ids of each text under `input_ids`; none are added, and none are cut."""
        assert not add_special_tokens, "chunks put BOS and EOS themselves"
        assert not truncation, "chunks cut"
        encoded = self.backend_tokenizer.encode_batch(text, add_special_tokens=False)
        return {"input_ids": [one.ids for one in encoded]}


def _read_words(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges, of `tokenizer.json` or of the pair of files before it."""
    if (folder / "tokenizer.json").is_file():
        model = read_json(folder / "tokenizer.json")["model"]
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        return model["vocab"], [(first, second) for first, second in pairs]
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"tokenizer in {folder} has neither tokenizer.json nor {' and '.join(missing)}"
        )
    return BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))


def _read_special(folder: Path) -> tuple[dict[str, str], list[AddedToken]]:
    """The names of the four special tokens, and every token that is found whole in a text, in the
    order of ids."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    added: dict[str, AddedToken] = {}
    if "added_tokens_decoder" in settings:
        listed = sorted(settings["added_tokens_decoder"].items(), key=lambda item: int(item[0]))
        added = {token["content"]: AddedToken(**token) for _, token in listed}
    else:
        older = folder / "special_tokens_map.json"
        settings |= json.loads(older.read_text("utf-8")) if older.is_file() else {}
        if (folder / "tokenizer.json").is_file():
            for token in read_json(folder / "tokenizer.json").get("added_tokens", []):
                options = {key: value for key, value in token.items() if key != "id"}
                added[token["content"]] = AddedToken(**options)
    special = {}
    for key, default in _SPECIAL.items():
        value = settings.get(key) or default
        options = (
            {**value, "special": True}
            if isinstance(value, dict)
            else {"content": value, "special": True}
        )
        options.pop("__type", None)
        special[key] = options["content"]
        added.setdefault(special[key], AddedToken(**options))
    return special, list(added.values())
