"""The guard serves our own pages and local programs, and no one else's pages."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resources.guard import Guard, judge

PORT = 3000
OURS = {"host": "127.0.0.1:3000"}
JSON = {"content-type": "application/json"}

names = st.text(st.characters(codec="ascii", exclude_categories=["C"]), max_size=30)


def request(method="GET", path="/", query="", kind="http", **headers):
    return request_of(
        method, path, {**OURS, **{k.replace("_", "-"): v for k, v in headers.items()}}, query, kind
    )


def request_of(method, path, headers, query="", kind="http"):
    return {
        "type": kind,
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }


def status(scope):
    answer = judge(scope, PORT)
    return 200 if answer is None else answer.status


@pytest.mark.parametrize("host", ["127.0.0.1:3000", "localhost:3000", "LocalHost:3000"])
@pytest.mark.parametrize("origin", [None, "http://127.0.0.1:3000", "http://localhost:3000"])
def test_our_own_pages_and_local_programs_are_served(host, origin):
    headers = {"host": host, **({"origin": origin} if origin else {})}
    for path in ("/", "/assets", "/ajax-api/2.0/mlflow/runs/search"):
        for method in ("GET", "POST", "PATCH"):
            assert status(request_of(method, path, headers)) == 200
    assert status(request_of("POST", "/graphql", headers | JSON)) == 200
    assert (
        status(
            request_of(
                "POST", "/graphql", headers | {"content-type": "application/json; charset=utf-8"}
            )
        )
        == 200
    )
    assert status(request_of("GET", "/graphql", headers, kind="websocket")) == 200


@given(host=names)
def test_any_other_host_is_refused(host):
    expected = 200 if host.strip().lower() in ("127.0.0.1:3000", "localhost:3000") else 403
    assert status(request(host=host)) == expected


@given(
    origin=names
    | st.sampled_from(
        ["null", "https://127.0.0.1:3000", "http://127.0.0.1:5000", "http://evil.test"]
    )
)
def test_any_other_origin_is_refused(origin):
    ours = origin.strip().lower() in ("http://127.0.0.1:3000", "http://localhost:3000")
    for scope in (
        request("POST", "/graphql", origin=origin, **{"content-type": "application/json"}),
        request("POST", "/report_asset_materialization/x", origin=origin),
        request("GET", "/graphql", kind="websocket", origin=origin),
    ):
        assert status(scope) == (200 if ours else 403)


def test_hosts_and_origins_that_come_twice_are_refused():
    scope = request("POST", "/x", origin="http://127.0.0.1:3000")
    scope["headers"] += [(b"Origin", b"http://evil.test")]
    assert status(scope) == 403
    scope = request()
    scope["headers"] += [(b"HOST", b"evil.test")]
    assert status(scope) == 403
    assert status(request_of("GET", "/", {})) == 403


def test_only_requests_from_within_our_site_are_served():
    for site, expected in (
        ("same-origin", 200),
        ("same-site", 200),
        ("none", 200),
        ("cross-site", 403),
    ):
        assert status(request(sec_fetch_site=site)) == expected
        assert status(request(kind="websocket", sec_fetch_site=site)) == expected


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_agent_with_a_shell_answers_nobody(method):
    for path in ("/ajax-api/3.0/mlflow/assistant/message", "/ajax-api/3.0/mlflow/assistant"):
        assert status(request(method, path, content_type="application/json")) == 403
    assert (
        status(request(method, "/ajax-api/2.0/mlflow/runs/search", content_type="application/json"))
        == 200
    )


@pytest.mark.parametrize("path", ["/graphql", "/graphql/", "/api/graphql"])
@given(
    method=st.sampled_from(["GET", "HEAD", "POST", "PUT", "OPTIONS"]),
    media_type=st.sampled_from(
        [
            "application/json",
            "Application/JSON; charset=utf-8",
            "text/plain",
            "text/plain; x=application/json",
            "application/graphql",
            "multipart/form-data; boundary=application/json",
            "",
        ]
    ),
)
def test_graphql_is_answered_to_json_posts_only(path, method, media_type):
    served = method == "POST" and media_type.lower().startswith("application/json")
    scope = request_of(method, path, OURS | {"content-type": media_type})
    assert status(scope) == (200 if served else 405)


def test_a_second_content_type_does_not_help():
    scope = request("POST", "/graphql", content_type="application/json")
    scope["headers"] += [(b"content-type", b"text/plain")]
    assert status(scope) == 405


def test_a_page_opened_as_localhost_moves_to_the_one_name():
    answer = judge(
        request(
            path="/runs/a%2Fb", query="x=1&y=é", host="localhost:3000", sec_fetch_dest="document"
        ),
        PORT,
    )
    assert answer is not None
    assert (answer.status, answer.location.encode("latin-1")) == (
        307,
        "http://127.0.0.1:3000/runs/a%2Fb?x=1&y=é".encode(),
    )
    assert status(request(host="localhost:3000", sec_fetch_dest="image")) == 200
    assert status(request(sec_fetch_dest="document")) == 200


def drive(scope):
    """Run the guard around an application that says so; return what was sent and whether the
    application ran."""
    sent, ran = [], []

    async def application(scope, receive, send):
        ran.append(scope["type"])

    async def receive():
        return {"type": "websocket.connect" if scope["type"] == "websocket" else "http.request"}

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(application, PORT)(scope, receive, send))
    return sent, ran


def test_the_application_hears_nothing_of_a_refused_request():
    assert drive(request()) == ([], ["http"])
    assert drive({"type": "lifespan"}) == ([], ["lifespan"])
    sent, ran = drive(request(host="evil.test"))
    assert (ran, sent[0]["status"]) == ([], 403)
    assert b"open http://127.0.0.1:3000/" in sent[1]["body"]
    sent, ran = drive(request(kind="websocket", origin="http://evil.test"))
    assert (ran, sent[0]["type"]) == ([], "websocket.close")


def test_our_pages_find_each_other_on_whichever_port():
    sent = []

    async def application(scope, receive, send):
        sent.append("application")

    async def send(message):
        sent.append(message)

    guard = Guard(application, PORT, {"/mlflow": "http://127.0.0.1:5123"})
    paths = {
        "/mlflow": "",
        "/mlflow/": "",
        "/mlflow/runs/1": "runs/1",
        "/mlflow//evil.test/": "evil.test/",
    }
    for path, there in paths.items():
        sent.clear()
        asyncio.run(guard(request(path=path, sec_fetch_dest="document"), None, send))
        assert sent[0]["status"] == 307
        assert (b"location", f"http://127.0.0.1:5123/{there}".encode()) in sent[0]["headers"]
    sent.clear()
    asyncio.run(guard(request(path="/mlflowers"), None, send))
    assert sent == ["application"]
    sent.clear()
    asyncio.run(guard(request(path="/mlflow", sec_fetch_site="cross-site"), None, send))
    assert sent[0]["status"] == 403
