"""Rebuilds the demo's models from nothing: `python -m demo.build [--only NAME]`; see demo/README.md
for times.

Seeds are fixed; on one machine and thread count the same weights come out.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from demo import build_clip, build_heads, build_owl, build_tagger, build_text, build_unet, build_vae
from demo.images import write_aliases
from demo.prompts import write_prompts

MODELS = Path(__file__).with_name("models")


def write_words(models: Path) -> None:
    """The evaluation prompts and the alias table, beside the models."""
    write_prompts(models.parent / "prompts.csv")
    write_aliases(models.parent / "aliases.csv")


PARTS: dict[str, Callable[[Path], None]] = {
    "words": write_words,
    "vae": lambda models: build_vae.build(models / "base" / "vae"),
    "text": build_text.build,
    "clip": build_clip.build,
    "heads": build_heads.build,
    "tagger": build_tagger.build,
    "owlv2": build_owl.build,
    "unet": build_unet.build,
}
"""In the order in which they need each other."""


def main() -> None:
    """Build the parts named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=PARTS, help="may be given several times")
    chosen = parser.parse_args().only or list(PARTS)
    for name in chosen:
        start = time.monotonic()
        PARTS[name](MODELS)
        print(f"{name}: built in {(time.monotonic() - start) / 60:.1f} min", flush=True)


if __name__ == "__main__":
    main()
