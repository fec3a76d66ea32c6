"""Tokenizers of CLIP's rules with a small vocabulary."""

import json

import pytest


@pytest.fixture(scope="session")
def clip_tokenizers():
    """SDXL's two: CLIP's tokenizer with merges, which pad with the end and with `!`."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    rows = [
        "long hair blue eyes photo medium standing outdoors score up watermark it's they've we're"
    ] * 4
    letters = list(bytes_to_unicode().values())
    backend = Backend(models.BPE(end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator(rows, trainer)
    learned = json.loads(backend.to_str())["model"]["merges"]
    words = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *("".join(pair) for pair in learned),
    ]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    merges = [tuple(pair) for pair in learned]
    return [
        CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77, pad_token=pad)
        for pad in ("<|endoftext|>", "!")
    ]
