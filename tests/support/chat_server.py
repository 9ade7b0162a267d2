"""A server with OpenAI's API on loopback, which answers, refuses, fails, redirects and errs as a test says."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Request = dict[str, Any]


class ChatServer(ThreadingHTTPServer):
    """Answers each request with the text, the HTTP status, or the body of another layout, that `answer` returns.

    Attributes:
        answer: from the request's JSON.
        models: names that it lists.
        owner: of the models, which names the kind of server.
        requests: JSON of the requests so far.
        location: where to redirect all requests to, if anywhere.
        headers: of the last request, in lower case.
        error_code: in its refusals.
        listed: body of the list of models, if it is not that of `models`.
    """

    daemon_threads = True

    def __init__(self, answer: Callable[[Request], str | int | bytes], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.answer = answer
        self.models = ["demo"]
        self.owner = "vllm"
        self.requests: list[Request] = []
        self.location: str | None = None
        self.listed: bytes | None = None
        self.error_code: str | int = "context_length"
        self.headers: dict[str, str] = {}

    def handle_error(self, *_: object) -> None:
        """Print nothing about a client that has gone."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_GET(self) -> None:
        owner = self.server.owner
        listed = [{"id": name, "object": "model", "owned_by": owner} for name in self.server.models]
        models = {"object": "list", "data": listed}
        self._reply(200, models if self.server.listed is None else self.server.listed)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        answer = self.server.answer(request)
        if isinstance(answer, int):
            self._reply(answer, {"error": {"message": f"bad: {request['messages']}", "code": self.server.error_code}})
            return
        if isinstance(answer, bytes):
            self._reply(200, answer)
            return
        message = {"role": "assistant", "content": answer}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        if request.get("logprobs"):
            choice["logprobs"] = {"content": [{"token": "a", "logprob": -0.5, "bytes": None, "top_logprobs": []}]}
        self._reply(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "demo", "choices": [choice]})

    def _reply(self, status: int, content: dict[str, Any] | bytes) -> None:
        self.server.headers = {name.lower(): value for name, value in self.headers.items()}
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(307 if self.server.location else status)
        if self.server.location:
            self.send_header("Location", self.server.location + self.path)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def chat_server(answer: Callable[[Request], str | int | bytes], port: int = 0) -> Iterator[ChatServer]:
    """Serve until the block ends."""
    server = ChatServer(answer, port)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
