"""What tests of several rooms share: the fixtures of `tests/tools`."""

from clip_vocabulary import clip_tokenizers
from tiny_runs import (
    empty_database,
    make_run,
    other_vae,
    small_source,
    tiny_sdxl,
    train,
    unbroken,
    write_generation,
)
