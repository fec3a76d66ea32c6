"""What may talk to our web pages: an ASGI middleware, and the two applications that are served
behind it.

Dagster runs mutations by GET and by text/plain from any page that the user happens to have open
(measured). A bind to 127.0.0.1 does not help against that, because the request comes from the
user's own browser.
"""

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, NamedTuple

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

MLFLOW_PATH = "/mlflow"
"""Where Dagster's pages find MLflow, whichever ports are served: links that are stored must stay
true."""
DAGSTER_PATH = "/dagster"
"""Where MLflow's pages find Dagster."""
ASSISTANT_PATH = "/ajax-api/3.0/mlflow/assistant"
"""Of MLflow 3.17: an agent with a shell on the host, for whoever may talk to the page."""


class Answer(NamedTuple):
    """What the guard says instead of the application."""

    status: int
    text: str
    location: str = ""


class Guard:
    """Lets through what our own pages and local programs ask for; answers the rest itself."""

    def __init__(
        self,
        application: Application,
        port: int,
        elsewhere: Mapping[str, str] = MappingProxyType({}),
    ):
        """Serve `application` on `port`; `elsewhere` has paths that other pages of ours answer, and
        their addresses."""
        self._application = application
        self._port = port
        self._elsewhere = elsewhere

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        answer = None if scope["type"] == "lifespan" else judge(scope, self._port)
        if answer is None and scope["type"] == "http" and (address := self._elsewhere_of(scope)):
            answer = Answer(307, "moved", address)  # a browser keeps what stands after the #
        if answer is None:
            await self._application(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": answer.text[:120]})
        else:
            headers = [
                (b"content-type", b"text/plain; charset=utf-8"),
                (b"cache-control", b"no-store"),
            ]
            if answer.location:
                headers.append((b"location", answer.location.encode("latin-1")))
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            await send({"type": "http.response.body", "body": f"{answer.text}\n".encode()})

    def _elsewhere_of(self, scope: Scope) -> str:
        """The address of another page of ours that a path means; empty where it means ours."""
        asked = scope["raw_path"].decode("latin-1").partition("?")[0]
        query = f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else ""
        for path, address in self._elsewhere.items():
            if asked == path or asked.startswith(f"{path}/"):
                return f"{address}/{asked.removeprefix(path).lstrip('/')}{query}"
        return ""


def judge(scope: Scope, port: int) -> Answer | None:
    """What to answer to a request instead of serving it, or None to serve it.

    Args:
        scope: ASGI scope of type http or websocket.
        port: The port that is served.

    Source: Fetch Metadata, https://www.w3.org/TR/fetch-metadata/. Without this guard
        Dagster's web server runs GraphQL mutations by GET from any page (seen with 1.13.27).
    """
    headers: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), []).append(
            value.decode("latin-1").strip().lower()
        )
    page = f"http://127.0.0.1:{port}"
    hosts = (f"127.0.0.1:{port}", f"localhost:{port}")
    host = headers.get("host", [])
    if len(host) != 1 or host[0] not in hosts:
        return Answer(
            403,
            f"refused: Host {host} is not ours; open {page}/ (a tunnel must end at port {port} too)",
        )
    if not set(headers.get("origin", [])) <= {f"http://{name}" for name in hosts}:
        return Answer(403, f"refused: Origin {headers['origin']} is not ours")
    if "cross-site" in headers.get("sec-fetch-site", []):
        return Answer(
            403, f"refused: a page of another site asks; open {page}/ from the address bar"
        )
    if scope["path"].startswith(ASSISTANT_PATH):
        return Answer(403, "refused: MLflow's assistant may run commands on this machine")
    if scope["type"] == "websocket":
        return None
    if scope["path"].rstrip("/").endswith("/graphql"):
        media_types = [value.partition(";")[0].strip() for value in headers.get("content-type", [])]
        if scope["method"] != "POST" or media_types != ["application/json"]:
            return Answer(
                405, "refused: GraphQL is answered to POST with Content-Type application/json only"
            )
    if (
        host[0] == hosts[1]
        and headers.get("sec-fetch-dest") == ["document"]
        and scope["method"] == "GET"
    ):
        # One name for each page, so that links between Dagster and MLflow stay within one site.
        query = f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else ""
        return Answer(307, "moved", f"{page}{scope['raw_path'].decode('latin-1')}{query}")
    return None
