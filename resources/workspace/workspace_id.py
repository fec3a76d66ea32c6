"""What tells a workspace from all others, wherever it lies: an id that moves with it and that a
copy does not keep.

`workspace.json` holds the id and the folder that it was written for. A workspace that is found
elsewhere was moved if nothing is left at that folder, and copied if the original is still there:
then the copy gets an id of its own.
"""

import json
import uuid
from pathlib import Path

from training import commit

FILE = "workspace.json"


def workspace_id(home: Path) -> str:
    """The workspace's id, 12 hexadecimal digits; made where there is none.

    Args:
        home: The workspace, resolved.
    """
    if (found := _read(home)) is not None and found[1] == str(home):
        return found[0]
    with commit.lock(home / "locks" / "workspace.lock", f"the id of {home}"):
        found = _read(home)
        if found is not None and found[1] == str(home):
            return found[0]  # another process was faster
        known = uuid.uuid4().hex[:12] if found is None or _is_copy(home, *found) else found[0]
        commit.write_json(home / FILE, {"id": known, "home": str(home)})
        return known


def _is_copy(home: Path, known: str, recorded: str) -> bool:
    """Whether the workspace that `home`'s file was written for still lies at its own place."""
    original = Path(recorded)
    there = _read(original)
    # One folder may have two addresses, such as a mount in a container.
    return there is not None and there[0] == known and not (original / FILE).samefile(home / FILE)


def _read(home: Path) -> tuple[str, str] | None:
    """Id and folder that a workspace's file names; None where there is no such file, or a damaged
    one."""
    try:
        values = json.loads((home / FILE).read_bytes())
        return str(values["id"]), str(values["home"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
