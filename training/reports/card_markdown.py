"""Markdown of a model card, and the front matter that Hugging Face reads: text from strangers stays
text."""

import json
import re
from collections.abc import Mapping, Sequence

_MARKUP = re.compile(r"([\\`*_{}\[\]()#+\-.!|~>:$])")
_PAIR = re.compile(r"\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})")
_NOT_A_NAME = re.compile(r"[^a-z0-9.]+")

LICENCES = frozenset((
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigcode-openrail-m", "bigscience-bloom-rail-1.0",
    "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc",
    "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0",
    "creativeml-openrail-m", "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1",
    "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "llama2",
    "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "openrail", "openrail++", "osl-3.0",
    "pddl", "postgresql", "unknown", "unlicense", "wtfpl", "zlib",
))  # fmt: skip
"""Identifiers that Hugging Face knows; all others are `other` with a name. Source: its page on
licences."""
BASES: Mapping[str, str] = {
    "stable-diffusion-xl-base-1.0": "stabilityai/stable-diffusion-xl-base-1.0",
    "stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
"""Folder name of a base model -> its identifier there, the only thing that `base_model` may
hold."""


def escape(text: str) -> str:
    """Text as Markdown that shows it and nothing else: no markup, no HTML, no link, one line."""
    plain = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return _MARKUP.sub(r"\\\1", plain)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [tuple(head), ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def licence_fields(name: str, file: str | None) -> dict[str, str]:
    """What the front matter says of a licence.

    Args:
        name: An identifier of Hugging Face's, or any other name.
        file: Of the text, beside the card; None where there is none.
    """
    if name in LICENCES:
        return {"license": name}
    fields = {
        "license": "other",
        "license_name": _NOT_A_NAME.sub("-", name.lower()).strip("-") or "unnamed",
    }
    return fields | ({"license_link": file} if file else {})


def front_matter(fields: Mapping[str, object]) -> str:
    """YAML between its marks; fields that are None are left out."""
    lines = [f"{name}: {_yaml(value)}\n" for name, value in fields.items() if value is not None]
    return f"---\n{''.join(lines)}---\n"


def _yaml(value: object) -> str:
    """JSON in ASCII is YAML, whatever its strings hold, but for letters that it writes as two."""
    return _PAIR.sub(lambda pair: f"\\U{ord(_joined(pair[1], pair[2])):08x}", json.dumps(value))


def _joined(high: str, low: str) -> str:
    return bytes.fromhex(high + low).decode("utf-16-be")
