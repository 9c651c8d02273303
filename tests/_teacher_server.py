"""A small OpenAI-compatible server over real HTTP that can misbehave in every way a test asks for."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mmedx_fast.data.records import Record
from mmedx_fast.guidelines import GUIDELINES

USAGE = {"prompt_tokens": 100, "completion_tokens": 40}


class TeacherServer:
    """Answers questions of ``records`` from their own traces.

    ``wrong(record id, guideline, seed)`` makes an answer wrong. ``fault(n)`` gives the misbehaviour of
    the n-th request overall (from 0) or None; see ``_Handler._misbehave``. ``delay``: seconds before each
    answer.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = {" ".join(record.question.split()): record for record in records}
        self.wrong: Callable[[str, str, int], bool] = lambda name, guideline, seed: False
        self.fault: Callable[[int], str | None] = lambda n: None
        self.delay = 0.0
        self.together = 1
        """So many requests are waited for, ten seconds at most, before the first is answered."""
        self.usage: dict | None = USAGE
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.asked: collections.Counter[str] = collections.Counter()
        self.answered: collections.Counter[str] = collections.Counter()
        self.times: list[float] = []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.http = _Http(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def reset(self) -> None:
        self.bodies, self.headers, self.times = [], [], []
        self.asked, self.answered = collections.Counter(), collections.Counter()
        self.most_busy = 0

    def completion(self, body: dict) -> str:
        user = body["messages"][-1]["content"]
        text = " ".join(user[-1]["text"].split())
        record = next(r for question, r in self.records.items() if text.startswith(question))
        guideline = next(n for n, g in GUIDELINES.items() if text.endswith(g.instruction))
        answer = record.answer_label
        if self.wrong(record.id, guideline, body.get("seed", 0)):
            answer = next(letter for letter in record.options if letter != answer)
        return f"<think>\n{record.reasoning[guideline]}\n</think>\n<answer>{answer}</answer>"


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed or give up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    owner: TeacherServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: two would wait for one another
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        server = self.owner
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body, key = json.loads(raw), hashlib.sha256(raw).hexdigest()
        with server.lock:
            number = sum(server.asked.values())
            server.asked[key] += 1
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.times.append(time.monotonic())
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._answer(server, number, key, body)
        finally:
            with server.lock:
                server.busy -= 1

    def _answer(self, server: TeacherServer, number: int, key: str, body: dict) -> None:
        assert self.path == "/v1/chat/completions", self.path
        fault = server.fault(number)
        if fault is not None:
            self._misbehave(fault)
            return
        time.sleep(server.delay)
        limit = time.monotonic() + 10
        while server.most_busy < server.together and time.monotonic() < limit:
            time.sleep(0.01)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": server.completion(body)},
            "finish_reason": "stop",
        }
        reply = {"id": "x", "model": body["model"], "choices": [choice]}
        if server.usage is not None:
            reply["usage"] = server.usage
        # Counted before it is sent: whoever reads the answer may look at the count at once.
        with server.lock:
            server.answered[key] += 1
        self._send(200, json.dumps(reply))

    def _misbehave(self, fault: str) -> None:
        """``status[:retry-after]``, or one of the names below."""
        if fault[:1].isdigit():
            status, _, after = fault.partition(":")
            headers = {"Retry-After": after} if after else {}
            self._send(int(status), json.dumps({"error": {"message": f"said {status}"}}), **headers)
        elif fault == "stall":
            time.sleep(3)
        elif fault == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            for _ in range(30):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
        elif fault == "drop":
            self.close_connection = True
            self.connection.close()
        elif fault == "broken_json":
            self._send(200, '{"choices": [{"message": {"content": "<think>a')
        elif fault == "empty_choices":
            self._send(200, '{"choices": []}')
        elif fault == "no_message":
            self._send(200, '{"choices": [{"text": "old style"}]}')
        elif fault == "number":
            self._send(200, '{"choices": [{"message": {"content": 7}}]}')
        elif fault == "html":
            self._send(200, "<html>a proxy's page</html>", **{"Content-Type": "text/html"})
        elif fault == "truncated":
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.wfile.flush()
            self.close_connection = True
        else:
            raise AssertionError(fault)

    def _send(self, status: int, text: str, **headers: str) -> None:
        data = text.encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def serving(records: Sequence[Record]) -> Iterator[TeacherServer]:
    server = TeacherServer(records)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
