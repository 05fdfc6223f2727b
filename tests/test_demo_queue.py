"""Jobs of the demo's visitors: who may wait, and whose job is dropped; then the same on the server, over HTTP."""

import asyncio
import json
import signal
import time

import pytest

import scripts
from diffusers_dino.demo.visitors import GoneError, Visitors

pytest.importorskip("httpx", reason="The demo needs Gradio: pip install diffusers-dino[demo]")
from demo_page import PATIENCE, Page


class Server:
    """What Gradio's server does with requests, as far as `Visitors` sees it; its answers are as `status` says."""

    def __init__(self, visitors):
        self.app, self.status, self.bodies, self.closed = visitors.watch(self.gradio), 200, [], asyncio.Event()

    async def gradio(self, scope, receive, send):
        if scope["path"].endswith("/queue/data"):
            await self.closed.wait()
        else:
            self.bodies.append((await receive())["body"])
            await send({"type": "http.response.start", "status": self.status, "headers": []})

    async def join(self, visitor, call=7, body=None):
        content = json.dumps({"session_hash": visitor, "fn_index": call}).encode() if body is None else body
        parts = [{"type": "http.request", "body": content[i : i + 9], "more_body": i + 9 < len(content)}
                 for i in range(0, max(len(content), 1), 9)]  # fmt: skip
        sent = []

        async def receive():
            return parts.pop(0)

        async def send(message):
            sent.append(message)

        await self.app({"type": "http", "path": "/gradio_api/queue/join", "query_string": b""}, receive, send)
        return sent[0]["status"]

    def listen(self, visitor):
        query = f"session_hash={visitor}".encode()
        return asyncio.ensure_future(
            self.app({"type": "http", "path": "/gradio_api/queue/data", "query_string": query}, None, None)
        )


@pytest.fixture
def visitors(monkeypatch):
    monkeypatch.setattr("diffusers_dino.demo.visitors._PATIENCE", 0.05)
    visitors = Visitors()
    visitors.model_calls = {7, 8}
    return visitors


def test_a_visitor_has_one_waiting_job(visitors):
    async def visit():
        server = Server(visitors)
        assert [await server.join("ann") for _ in range(3)] == [200, 429, 429]
        assert [await server.join("ann", call) for call in ("7", 8)] == [429, 429]
        assert [await server.join("ann", call) for call in (3, 3, 3)] == [200] * 3  # those do not run the model
        assert await server.join("ben") == 200
        visitors.begin("ann")
        assert [await server.join("ann") for _ in range(2)] == [200, 429]  # one runs, one waits

        server.status = 503  # the queue is full
        assert [await server.join("cid") for _ in range(2)] == [503, 503]
        server.status = 200
        assert await server.join("cid") == 200
        assert json.loads(server.bodies[-1]) == {"session_hash": "cid", "fn_index": 7}

    asyncio.run(visit())


@pytest.mark.parametrize(
    "body", [b"", b"{", b"null", b"[" * 100_000, b'{"fn_index": 7}', b'{"session_hash": "ann", "fn_index": 1e999}']
)
def test_requests_that_are_no_jobs_are_gradios(visitors, body):
    async def visit():
        server = Server(visitors)
        assert [await server.join("ann", body=body) for _ in range(2)] == [200, 200]
        assert server.bodies == [body, body]

    asyncio.run(visit())


def test_a_request_that_is_too_large_is_refused(visitors, monkeypatch):
    monkeypatch.setattr("diffusers_dino.demo.visitors._MOST_BYTES", 30)
    assert asyncio.run(Server(visitors).join("ann" * 100)) == 413


def test_jobs_of_visitors_who_left_are_of_no_use(visitors):
    async def visit():
        server = Server(visitors)
        stream = server.listen("ann")
        await server.join("ann")
        check = visitors.begin("ann")
        await server.join("ann")
        await asyncio.sleep(0.1)
        check()
        server.closed.set()
        await stream
        with pytest.raises(GoneError):
            check()
        assert await server.join("ann") == 200  # the one that waited has gone

        await server.join("nobody")
        await asyncio.sleep(0.1)
        with pytest.raises(GoneError):
            visitors.begin("nobody")

    asyncio.run(visit())


def test_results_of_a_replaced_image_are_of_no_use(visitors):
    checks = {name: visitors.begin(name) for name in ("ann", "ben")}
    visitors.replace_image("ann")
    with pytest.raises(GoneError):
        checks["ann"]()
    checks["ben"]()
    visitors.begin("ann")()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    pytest.importorskip("gradio", reason="The demo needs Gradio: pip install diffusers-dino[demo]")
    folder = tmp_path_factory.mktemp("demo")
    process = scripts.start_script("demo", fresh=True, environment={"GRADIO_TEMP_DIR": str(folder)})
    yield Page(scripts.address_of(process))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0


@pytest.mark.slow
def test_jobs_that_nobody_listens_to_do_not_keep_visitors_waiting(page):
    answers = [page.vary(f"nobody-{number}", 16, 100).status_code for number in range(40)]
    assert set(answers) <= {200, 503}  # 503 if they come faster than they are dropped
    start = time.monotonic()
    while (answer := page.vary("ann")).status_code == 503:  # the queue is full for a few seconds
        time.sleep(0.2)
    assert answer.status_code == 200
    with page.listening("ann") as heard:
        result = page.result(heard)
    assert result["success"], result
    assert time.monotonic() - start < 30


@pytest.mark.slow
def test_the_running_job_of_a_visitor_who_left_ends(page):
    assert page.vary("ann", 16, 100).status_code == 200
    with page.listening("ann") as heard:
        while heard.get(timeout=PATIENCE)["msg"] != "progress":
            pass
        assert [page.vary("ann", 16, 100).status_code for _ in range(2)] == [200, 429]
    start = time.monotonic()
    assert page.vary("ben").status_code == 200
    with page.listening("ben") as heard:
        assert page.result(heard)["success"]
    assert time.monotonic() - start < 20
