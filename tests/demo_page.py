"""A visitor of the demo without a browser: what the page asks of the server, over HTTP."""

import json
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

PATIENCE = 60  # seconds


class Page:
    """The server's side of a page in the browser."""

    def __init__(self, address: str) -> None:
        self.address = f"{address.rstrip('/')}/gradio_api"
        config = httpx.get(f"{address.rstrip('/')}/config").json()
        names = {part["id"]: part["props"]["value"] for part in config["components"] if part["type"] == "button"}
        self.calls = {names[i]: one["id"] for one in config["dependencies"] for i, _ in one["targets"] if i in names}

    def ask(self, visitor: str, call: int, *data) -> httpx.Response:
        body = {"session_hash": visitor, "fn_index": call, "data": data}
        return httpx.post(f"{self.address}/queue/join", json=body, timeout=PATIENCE)

    def vary(self, visitor: str, count: int = 1, steps: int = 1) -> httpx.Response:
        return self.ask(visitor, self.calls["Make variations"], None, count, steps, 2, 0, "the model's own")

    @contextmanager
    def listening(self, visitor: str) -> Iterator[queue.Queue]:
        """What the visitor hears, in order."""
        heard, begun, stop = queue.Queue(), threading.Event(), threading.Event()

        def listen():
            with httpx.stream(
                "GET", f"{self.address}/queue/data", params={"session_hash": visitor}, timeout=PATIENCE
            ) as stream:
                begun.set()
                for line in stream.iter_lines():
                    if stop.is_set():
                        return
                    if line.startswith("data: "):
                        heard.put(json.loads(line.removeprefix("data: ")))

        threading.Thread(target=listen, daemon=True).start()
        begun.wait(PATIENCE)
        yield heard
        stop.set()

    def result(self, heard: queue.Queue) -> dict:
        while (message := heard.get(timeout=PATIENCE))["msg"] != "process_completed":
            pass
        return message
