"""Training sets whose prompts tests make."""

import hashlib

import polars as pl

from training.prompts.maker import PromptMaker
from training.prompts.samples import Samples
from training.tables.schemas import TABLES


def image_ids(count):
    """So many ids, in ascending order."""
    return sorted(hashlib.sha256(str(number).encode()).hexdigest() for number in range(count))


def table(rows):
    """A training set of dicts, in their order; what they leave out is plain."""
    ids = image_ids(len(rows))
    full = [
        {
            "image_id": ids[number], "shard": f"s{number % 3:06d}", "height": 90,
            "width": 80, "bucket_height": 64, "bucket_width": 64, "score": 7, "tags": [], "caption": None,
            "made_caption": None, "words": [], "boxes": [], "split": "train", "stable": False, **row,
            **({"tags": [{"name": name, "category": "general"} for name in row["tags"]]} if "tags" in row else {}),
        }
        for number, row in enumerate(rows)
    ]  # fmt: skip
    return TABLES["training_set"].conform(pl.DataFrame(full, schema=TABLES["training_set"].schema))


def repeated(row, count):
    """A training set of one row so often, under other ids."""
    return pl.concat([table([row])] * count).with_columns(image_id=pl.Series(image_ids(count)))


def make_prompts(frame, vocabulary, config, seed=0, epoch=0):
    """The prompts of a training set, without tokens."""
    return PromptMaker(Samples(frame), vocabulary, config, seed, []).prompts(
        range(len(frame)), epoch
    )
