"""Which losses of a source people have accepted: each for exactly the listing that it was seen
in."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from resources.workspace.store import Store
from training.commit import write_json
from training.errors import ConfigError, DataError
from training.sources.absence import Loss

FILE = "missing.json"
"""Of a workspace: per source the digest of the listing that was refused or accepted; not there
while nothing is."""


def accept(store: Store, names: Sequence[str]) -> None:
    """Accept what is missing from sources, as their folders are now, for `foundry run
    --accept-missing`.

    A loss that was refused before is accepted only while the folder is still as it was then:
    whoever accepts has read its counts. What differs is refused again, with new counts.

    Raises:
        ConfigError: no source has that name.
    """
    configured = [source.name for source in store.config.sources]
    for name in names:
        if name not in configured:
            raise ConfigError(
                f"--accept-missing {name!r}: no source has that name; there are: {', '.join(configured)}"
            )
        digest = store.paths.source(name).fingerprint()
        entries = _read(store)
        if entries.get(name, {}).get("digest", digest) == digest:
            _write(store, {**entries, name: {"digest": digest, "accepted": True}})


def require_accepted(store: Store, losses: Sequence[Loss]) -> None:
    """Let a listing go on only if each loss of its sources was accepted as it is now.

    Raises:
        DataError: one was not; says the counts and what to do.
    """
    refused = []
    for loss in losses:
        digest = store.paths.source(loss.source).fingerprint()
        entry = {"digest": digest, "accepted": True}
        if _read(store).get(loss.source) != entry:
            _write(store, {**_read(store), loss.source: {**entry, "accepted": False}})
            refused.append(loss)
    if refused:
        accepts = " ".join(f"--accept-missing {loss.source}" for loss in refused)
        raise DataError(
            f"{'; '.join(map(str, refused))}; nothing was changed: see whether all is mounted and readable, "
            f"or, if they are meant to be missing, run `foundry run {accepts}`"
        )


def settle(store: Store) -> None:
    """Forget what was refused and accepted, once a listing is committed."""
    if (store.home / FILE).exists():
        (store.home / FILE).unlink()


def _read(store: Store) -> Mapping[str, Mapping[str, Any]]:
    try:
        return dict(json.loads((store.home / FILE).read_bytes()))
    except FileNotFoundError:
        return {}


def _write(store: Store, entries: Mapping[str, Any]) -> None:
    write_json(store.home / FILE, entries)
