"""HTML of the report from the templates beside this module: one column on a phone, light and dark,
no font or file from elsewhere. Every value is escaped unless it is markup of ours."""

import base64
import hashlib
import html
import importlib.resources
import re

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.ext import Extension
from markupsafe import Markup

from training.reports.scores import title_of

_MAX_NAME, _MAX_TEXT = 80, 500
_BREAK = re.compile(r"(?<=[>}])(\s*\n\s*)(?=[<{])")


class _Layout(Extension):
    """Line breaks and indents between tags are for the reader of a template, not for the page: they
    become comments, which also keeps line numbers in errors right."""

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        """Change a template's source before it is read."""
        return _BREAK.sub(r"{#\1#}", source)


def cut(text: object, most: int = _MAX_NAME) -> str:
    """Text of at most so many characters."""
    whole = str(text)
    return whole if len(whole) <= most else f"{whole[: most - 1]}…"


def _escaped(value: object) -> Markup:
    # As html.escape writes it, not as MarkupSafe does (`&#x27;` and `&quot;`, not `&#39;` and
    # `&#34;`): a release records its report's digest, and equal data make equal bytes as before.
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))  # noqa: S704


_ENVIRONMENT = Environment(
    loader=PackageLoader("training.reports"), autoescape=True, undefined=StrictUndefined,
    finalize=_escaped, extensions=[_Layout], auto_reload=False,
)  # fmt: skip
_ENVIRONMENT.globals["max_text"] = _MAX_TEXT
_ENVIRONMENT.filters |= {"cut": cut, "metric": title_of, "number": format}


def render(template: str, **values: object) -> Markup:
    """Fill in a template of this room.

    Args:
        template: Name without `.html.j2`.
        values: What it names; all are escaped but `Markup`.
    """
    return Markup(_ENVIRONMENT.get_template(f"{template}.html.j2").render(values))  # noqa: S704


def render_page(title: str, **values: object) -> str:
    """The whole page, with its style, its script, and the policy that lets it do no more."""
    files = importlib.resources.files("training.reports") / "templates"
    style, script = (f"\n{(files / f'report.{kind}').read_text('utf-8')}" for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Run the one script of ours and show images that the page holds itself.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    values |= {"style": style, "script": script, "policy": policy}
    return str(render("report", title=title, **values))
