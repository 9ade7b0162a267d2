"""Notes from Mistral's API: the official client against a local test server."""

import csv
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from model.errors import UserError
from tests.support.patience import PATIENCE_S
from utils import generate_notes
from utils.fictional_notes import api_notes
from utils.fictional_notes.catalogue import load_catalogue
from utils.fictional_notes.notes import write_notes
from utils.tables.jsonl import read_journal

ROOT = Path(__file__).resolve().parents[2]
KEY = "a-secret-key"
CATALOGUE = load_catalogue()


class FakeMistral(ThreadingHTTPServer):
    """Answer chat completions with "note N"; each of `failures` handles one request first."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.failures, self.finish_reason = [], [], "stop"
        self.url = f"http://127.0.0.1:{self.server_port}"

    def shutdown_request(self, request):
        self.close_request(request)  # no shutdown first, so that the client sees a reset


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers["Authorization"], body))
        if self.server.failures:
            self.server.failures.pop(0)(self)
            return
        message = {"role": "assistant", "content": f"  note {len(self.server.requests)} : séjour simple\n"}
        choice = {"index": 0, "finish_reason": self.server.finish_reason, "message": message}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        answer = {"id": "x", "object": "chat.completion", "model": body["model"], "created": 0, "usage": usage}
        self.reply(200, {}, json.dumps(answer | {"choices": [choice]}))

    def reply(self, status, headers, body):
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body.encode()))} | headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *arguments):
        pass


def refuse(status, body="{}", **headers):
    return lambda handler: handler.reply(
        status, {name.replace("_", "-"): value for name, value in headers.items()}, body
    )


def hang_up(handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True


def keep_silent(handler):
    handler.rfile.read(1)  # until the client hangs up
    handler.close_connection = True


@pytest.fixture
def server():
    server = FakeMistral()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def waits(monkeypatch):
    """Seconds slept, on a simulated clock."""
    slept = []
    real_time = time.time
    monkeypatch.setenv(api_notes.KEY_VARIABLE, KEY)
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "time", lambda: real_time() + sum(slept))
    return slept


def requests(count=3, seed=0, length="short", model="some-model"):
    return list(api_notes.note_requests(count, seed, CATALOGUE, length, model))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["generate_notes", "--writer", "mistral", *map(str, arguments)])
    generate_notes.main()


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- Prompts ----------------------------------------------------------------------------------------------------------


def test_stays_are_those_of_the_templates():
    for length in ("short", "long"):
        templates = write_notes(40, 7, CATALOGUE, length)
        for request, note in zip(requests(40, 7, length), templates, strict=True):
            assert sorted(request.diagnoses, key=str) == sorted(note.diagnoses, key=str)


def test_prompts_describe_the_stay_without_codes():
    for request in requests(200, length="long"):
        system, user = request.messages
        assert (system["role"], user["role"]) == ("system", "user")
        assert "{" not in user["content"]
        assert all(item.label in user["content"] for item in request.diagnoses)
        assert not re.search(r"\b[A-Z]\d\d", user["content"])


def test_ids_depend_on_seed_model_and_stay_only():
    ids = [request.id for seed in (0, 1) for model in ("a", "b") for request in requests(50, seed, model=model)]
    assert len(set(ids)) == len(ids) == 200
    assert [request.id for request in requests(50, 1, model="b")] == ids[-50:]
    assert [request.id for request in requests(20)] == [request.id for request in requests(50)][:20]


# --- The client -------------------------------------------------------------------------------------------------------


def test_request_contains_model_messages_and_key(server, waits):
    (request,) = requests(1)
    assert api_notes.connect("some-model", server.url)(request.messages) == "note 1 : séjour simple"
    ((path, authorization, body),) = server.requests
    assert path == "/v1/chat/completions" and authorization == f"Bearer {KEY}"
    assert body["model"] == "some-model" and body["messages"] == request.messages
    assert waits == []


def test_rate_limits_and_failures_are_retried(server, waits, monkeypatch):
    monkeypatch.setattr(api_notes, "_TIMEOUT_MS", 2000)
    server.failures = [*[refuse(503)] * 3, refuse(429, Retry_After="17"), hang_up, keep_silent]
    assert api_notes.connect("m", server.url)(requests(1)[0].messages) == "note 7 : séjour simple"
    assert len(waits) == 6
    assert all(2**n <= wait <= 2**n + 1 for n, wait in enumerate(waits[:3]))  # plus a random fraction of a second
    assert waits[3] == 17


def test_persistent_rate_limit_is_an_error(server, waits):
    server.failures = [refuse(429, '{"message": "Requests rate limit exceeded"}')] * 50
    with pytest.raises(UserError, match=r"answered 429: .*rate limit exceeded.*run the same command"):
        api_notes.connect("m", server.url)(requests(1)[0].messages)
    assert max(waits) <= 60 and 180 < sum(waits) < 300


@pytest.mark.parametrize("status", [400, 401, 422])
def test_refusal_is_reported_without_retry(server, waits, status):
    server.failures = [refuse(status, '{"detail": "Invalid model: m"}')]
    with pytest.raises(UserError, match=f"answered {status}: .*Invalid model: m"):
        api_notes.connect("m", server.url)(requests(1)[0].messages)
    assert waits == [] and len(server.requests) == 1


def test_missing_connection_is_reported(server, waits):
    server.server_close()
    with pytest.raises(UserError, match="cannot be reached"):
        api_notes.connect("m", server.url)(requests(1)[0].messages)


@pytest.mark.parametrize("reason", ["length", "error"])
def test_incomplete_note_is_rejected(server, waits, reason):
    server.finish_reason = reason
    with pytest.raises(UserError, match=f"incomplete note .*{reason}"):
        api_notes.connect("m", server.url)(requests(1)[0].messages)


@pytest.mark.parametrize(
    ("key", "expected"), [("", "is not set"), ("  ", "is not set"), ("two words", "is not a valid key")]
)
def test_missing_or_malformed_key_is_rejected(monkeypatch, tmp_path, key, expected):
    monkeypatch.setenv(api_notes.KEY_VARIABLE, key)
    with pytest.raises(UserError, match=f"MISTRAL_API_KEY {expected}") as error:
        run(monkeypatch, "--n", 10, "--out", tmp_path / "out")
    assert "words" not in str(error.value) and not (tmp_path / "out").exists()


def test_missing_client_names_the_extra_to_install(monkeypatch):
    monkeypatch.setenv(api_notes.KEY_VARIABLE, KEY)
    monkeypatch.setitem(sys.modules, "mistralai.client", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[mistral\]"'):
        api_notes.connect("m")


# --- The command ------------------------------------------------------------------------------------------------------


def test_command_writes_the_same_files_and_never_the_key(server, tmp_path):
    command = [sys.executable, "-m", "utils.generate_notes", "--writer", "mistral", "--server", server.url, "--n", "10"]
    # MISTRAL_DEBUG makes the client log its requests.
    environment = os.environ | {api_notes.KEY_VARIABLE: KEY, "MISTRAL_DEBUG": "1"}
    result = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert result.returncode == 0, result.stderr
    assert "Wrote 10 fictional notes" in result.stdout and "chat/completions" in result.stderr
    written = [path.read_text(encoding="utf-8") for path in tmp_path.iterdir()]
    assert all(KEY not in text for text in (result.stdout, result.stderr, *written))
    texts = read_csv(tmp_path / "text.csv")
    sent = requests(10, length="long", model=api_notes.DEFAULT_MODEL)
    assert [row["visit_occurence_id"] for row in texts] == [request.id for request in sent]
    assert [row["text"] for row in texts] == [f"note {n} : séjour simple" for n in range(1, 11)]
    codes = [tuple(row.values()) for row in read_csv(tmp_path / "codes.csv")]
    assert codes == [(request.id, *item) for request in sent for item in request.diagnoses]


def test_interrupted_command_continues(server, waits, monkeypatch, tmp_path):
    arguments = ("--out", tmp_path, "--server", server.url, "--length", "short")
    journal = tmp_path / "api_notes.jsonl"
    original = Handler.reply

    def stop_after_four(handler, *reply):
        number = len(server.requests)
        if number <= 5:  # each note is saved before the next one is requested
            assert journal.read_text(encoding="utf-8").count("\n") == number - 1
        original(handler, *((400, {}, "{}") if number == 5 else reply))

    monkeypatch.setattr(Handler, "reply", stop_after_four)
    with pytest.raises(UserError, match="answered 400"):
        run(monkeypatch, "--n", 10, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["api_notes.jsonl"]
    complete = journal.read_bytes()
    journal.write_bytes(complete[:-9])  # as after a crash in the middle of a line
    run(monkeypatch, "--n", 10, *arguments)
    assert len(server.requests) == 5 + 7
    sent = [body["messages"] for _, _, body in server.requests]
    assert [*sent[:3], *sent[5:]] == [request.messages for request in requests(10, model=api_notes.DEFAULT_MODEL)]
    texts = [row["text"] for row in read_csv(tmp_path / "text.csv")]
    assert texts == [f"note {n} : séjour simple" for n in (1, 2, 3, *range(6, 13))]
    # More notes are added to these; none is requested twice, and none before the output files may be written.
    with pytest.raises(UserError, match="already exist"):
        run(monkeypatch, "--n", 12, *arguments)
    assert len(server.requests) == 12
    run(monkeypatch, "--n", 12, *arguments, "--overwrite")
    assert len(server.requests) == 14
    assert [row["text"] for row in read_csv(tmp_path / "text.csv")][:10] == texts


def test_dry_run_needs_no_connection_and_no_key(monkeypatch, tmp_path, capsys):
    def no_network(*arguments):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.delenv(api_notes.KEY_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "mistralai.client", None)
    first = requests(5, model="m")[0]
    (tmp_path / "api_notes.jsonl").write_text(json.dumps({"id": first.id, "text": "t"}) + "\n", encoding="utf-8")
    run(monkeypatch, "--n", 5, "--out", tmp_path, "--dry-run", "--length", "short", "--model", "m")
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [{"id": request.id, "messages": request.messages} for request in requests(5, model="m")]
    output = capsys.readouterr().out
    characters = sum(len(message["content"]) for request in requests(5, model="m")[1:] for message in request.messages)
    assert first.messages[1]["content"] in output
    assert "To request: 4 notes (1 are already in" in output and f"{characters:,} characters" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["api_notes.jsonl", "prompts.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--writer", "mistral", "--wordings", "train"), "--wordings train requires --writer templates"),
        (("--writer", "templates", "--dry-run"), "--dry-run requires --writer mistral"),
    ],
)
def test_options_of_the_other_writer_are_rejected(monkeypatch, tmp_path, arguments, expected):
    with pytest.raises(UserError, match=expected):
        run(monkeypatch, "--n", 10, "--out", tmp_path / "out", *arguments)


@pytest.mark.parametrize("content", ["a diary\n", '{"text": "t"}\n', "[1]\n", "an essay"])
def test_another_file_is_not_a_journal(tmp_path, content):
    path = tmp_path / "file.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="is not an output of this command"):
        read_journal(path)
    assert path.read_text(encoding="utf-8") == content


@pytest.mark.parametrize("cut", range(1, 30))
def test_journal_loses_only_an_incomplete_last_line(tmp_path, cut):
    path = tmp_path / "file.jsonl"
    lines = [b'{"id": "a", "text": "un"}\n', '{"id": "b", "text": "é à"}\n'.encode()]
    path.write_bytes(lines[0] + lines[1][:-cut])
    assert set(read_journal(path)) == {"a"}
    assert path.read_bytes() == lines[0]
