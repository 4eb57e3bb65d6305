"""A small HTTP server that answers like a chat server, or in the wrong ways that a real one would take long to show."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "tiny-writer"


class ChatServer(ThreadingHTTPServer):
    """``replies`` are used up one by one, then ``usual`` is given: (status, body, content type). ``asked`` holds what
    came: bodies of chat requests, with the key beside them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[tuple[int, bytes, str]] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.held = threading.Event()  # until it is set, the reply named "held" waits

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


def chat(content: str | None, finish: str = "stop", **message: Any) -> tuple[int, bytes, str]:
    told = {
        "id": "1", "object": "chat.completion", "created": 1, "model": f"{MODEL}@1", "system_fingerprint": "build-1",
        "choices": [{"index": 0, "finish_reason": finish,
                     "message": {"role": "assistant", "content": content, **message}}],
        "usage": {"prompt_tokens": 20, "completion_tokens": 30, "total_tokens": 50},
    }  # fmt: skip
    return 200, json.dumps(told).encode(), "application/json"


def failing(status: int, text: str = "out of order") -> tuple[int, bytes, str]:
    return status, json.dumps({"error": {"message": text}}).encode(), "application/json"


HELD = (0, b"", "")


class Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_GET(self) -> None:
        self.send(200, json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers["authorization"])
        if self.server.replies:
            reply = self.server.replies.pop(0)
        else:
            reply = chat(f"{body['messages'][-1]['content']}, expanded with seed {body['seed']}")
        if reply is HELD:
            self.server.held.wait(30)
            return
        self.send(*reply)

    def send(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving():
    server = ChatServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.held.set()
        server.shutdown()
        server.server_close()
        thread.join()
