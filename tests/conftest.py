"""What tests of several rooms share: the fixtures of `tests/tools`."""

from clip_vocabulary import clip_tokenizers
from hypothesis import settings
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

# A loaded machine has no deadline but pytest's own.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
