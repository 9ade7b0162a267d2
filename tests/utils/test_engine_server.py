"""Predictions by a server with OpenAI's API. Real engines: end_to_end/test_serving.py."""

import json
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from tests.support.chat_server import Request, chat_server
from tests.support.patience import PATIENCE_S
from tests.utils.test_answer_grammar import judge, judged
from utils import chat, predict_icd10
from utils.engines.engine import Generation
from utils.engines.prompts import Prompt
from utils.engines.server import ServerEngine
from utils.engines.server_address import ServerAddress
from utils.icd10.answers import Diagnosis, build_answer
from utils.icd10.prompts import prompt_messages

ANSWER = "diagnostic principal : Asthme (J459), diagnistic relié : aucun, diagnostic associé : aucun"
RunCommand = Callable[..., tuple[int, str]]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(f'{{"id": "s{n}", "text": "Séjour secret {n}."}}\n' for n in range(6)), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)


def note_of(request: Request) -> int:
    """Return the number of the note that a request is about."""
    return int(request["messages"][-1]["content"].rstrip(".")[-1])


def predict(run_command: RunCommand, notes: Path, url: str, *options: object) -> tuple[int, str, list[dict]]:
    out = notes.parent / "p.jsonl"
    code, output = run_command(
        predict_icd10, "--engine", "server", "--server", url, "--notes", notes, "--out", out, *options
    )
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
    return code, output, rows


def test_the_prompt_of_training_is_sent_and_the_codes_are_read(notes: Path, run_command: RunCommand) -> None:
    with chat_server(lambda _: ANSWER) as server:
        code, _, rows = predict(run_command, notes, server.url)
    assert code == 0
    assert sorted(row["id"] for row in rows) == [f"s{n}" for n in range(6)]
    assert all([item["code"] for item in row["codes"]] == ["J459"] for row in rows)
    asked = {note_of(request): request for request in server.requests}
    assert not any("logprobs" in request for request in server.requests)
    assert asked[3]["messages"] == prompt_messages("Séjour secret 3.")
    assert all(
        (request["model"], request["temperature"], request["max_tokens"]) == ("demo", 0, 512)
        for request in asked.values()
    )


def test_failures_that_pass_are_tried_again(notes: Path, run_command: RunCommand) -> None:
    tries: Counter[int] = Counter()

    def overloaded_at_first(request: Request) -> str | int:
        tries[note_of(request)] += 1
        return (503, 429, ANSWER)[min(tries[note_of(request)], 3) - 1]

    with chat_server(overloaded_at_first) as server:
        code, _, rows = predict(run_command, notes, server.url)
    assert code == 0 and len(rows) == 6
    assert set(tries.values()) == {3}


def test_a_prompt_that_the_server_refuses_does_not_stop_the_others(notes: Path, run_command: RunCommand) -> None:
    with chat_server(lambda request: 400 if note_of(request) == 4 else ANSWER) as server:
        code, output, rows = predict(run_command, notes, server.url, "--concurrency", 1)
    assert code == 1 and "1 row was not used (s4): the server refused it (HTTP 400, context_length): 1." in output
    assert sorted(row["id"] for row in rows) == ["s0", "s1", "s2", "s3", "s5"]
    assert "secret" not in output
    assert 'refused it (HTTP 400, context_length)",s4' in (notes.parent / "p.left_out.csv").read_text(encoding="utf-8")


def test_a_server_that_refuses_every_prompt_is_soon_not_asked_again(notes: Path, run_command: RunCommand) -> None:
    with chat_server(lambda _: 400) as server:
        code, output, rows = predict(run_command, notes, server.url, "--concurrency", 1)
    assert code == 1 and not rows and len(server.requests) == 3
    assert "refused it (HTTP 400, context_length)" in output and "secret" not in output and "Traceback" not in output


def test_how_to_start_vllm_is_said_if_it_refuses_the_grammar(notes: Path, cim10: Path, run_command: RunCommand) -> None:
    with chat_server(lambda _: 400) as server:
        server.error_code = 400
        code, output, _ = predict(run_command, notes, server.url, "--cim10", cim10)
    assert code == 1 and "refused it (HTTP 400), like all before. For --cim10, start vLLM with" in output


def test_a_first_prompt_that_the_server_refuses_does_not_stop_the_others(notes: Path, run_command: RunCommand) -> None:
    with chat_server(lambda request: 400 if note_of(request) == 0 else ANSWER) as server:
        code, output, rows = predict(run_command, notes, server.url, "--concurrency", 1)
    assert code == 1 and len(rows) == 5 and "1 row was not used (s0)" in output


def choice(message: object, **more: object) -> bytes:
    return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"} | more]}).encode()


BODIES = [b"<html>secret</html>", b"", b"null", b"[]", b'"secret"', b'{"error": {"message": "secret"}}', b'{"choices"']
BODIES += [b'{"choices": []}', b'{"choices": null}', b'{"choices": ["secret"]}', choice(None), choice({"content": 5})]


@pytest.mark.parametrize("body", BODIES)
def test_an_answer_of_another_layout_ends_with_a_sentence(body: bytes, notes: Path, run_command: RunCommand) -> None:
    with chat_server(lambda _: body) as server:
        code, output, rows = predict(run_command, notes, server.url)
        assert code == 1 and not rows and "sent an answer that is not OpenAI's" in output
        assert "Traceback" not in output and "secret" not in output
        if b"choices" not in body and b"error" not in body:
            server.listed = body
            code, output, _ = predict(run_command, notes, server.url)
            assert code == 1 and "Traceback" not in output and output.count("error: ") == 1


def test_an_answer_without_text_is_not_an_empty_answer(notes: Path, run_command: RunCommand) -> None:
    with chat_server(lambda request: choice({"content": None}) if note_of(request) == 4 else ANSWER) as server:
        code, output, rows = predict(run_command, notes, server.url)
    assert code == 1 and len(rows) == 5 and "(s4): the server's answer has no text: 1." in output


def test_an_unpaired_surrogate_in_an_answer_is_replaced(notes: Path, run_command: RunCommand) -> None:
    with chat_server(lambda _: choice({"content": "a\ud800"})) as server:
        code, _, rows = predict(run_command, notes, server.url)
    assert code == 0 and [row["answer"] for row in rows] == ["a?"] * 6


@pytest.mark.parametrize("logprobs", [None, {"content": [{"logprob": None}]}, {"content": [{"logprob": math.nan}]}])
def test_missing_log_probabilities_are_explained(logprobs: object, notes: Path, run_command: RunCommand) -> None:
    with chat_server(lambda _: choice({"content": "a"}, logprobs=logprobs)) as server:
        code, output, rows = predict(run_command, notes, server.url, "--log_probabilities")
    expected = "sent an answer that is not" if logprobs else "sends no log probabilities; leave out --log_probabilities"
    assert code == 1 and not rows and expected in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("key", "expected"), [("", None), ("key-0123456789\n", "key-0123456789"), ("clé-0123456789", None)]
)
def test_the_key_is_sent_and_never_printed(key, expected, notes: Path, run_command: RunCommand, monkeypatch) -> None:
    monkeypatch.setenv("SERVER_API_KEY", key)
    with chat_server(lambda _: 401) as server:
        code, output, _ = predict(run_command, notes, server.url, "--model", "demo")
        assert expected is None or f"Bearer {expected}" == server.headers["authorization"]
    assert code == 1 and "SERVER_API_KEY" in output and (not expected or expected not in output)
    assert key.isascii() or "SERVER_API_KEY has characters that no API key has." in output


@pytest.mark.parametrize(
    "url", ["http://[::1/v1", "http://127.0.0.1:abc/v1", "http://127.0.0.1/v1?key=hidden", "file:///v1"]
)
def test_an_address_that_is_none_is_refused(url: str, notes: Path, run_command: RunCommand) -> None:
    code, output, _ = predict(run_command, notes, url)
    assert code == 1 and "expected an address such as http://127.0.0.1:8000/v1" in output and "hidden" not in output


def test_requests_end_when_answers_are_no_longer_wanted() -> None:
    released, finished = threading.Event(), []

    def first_only(request: Request) -> str:
        if request["messages"][0]["content"] != "a":
            released.wait(PATIENCE_S)
            finished.append(request)
        return ANSWER

    prompts = [Prompt(name, {"messages": [{"role": "user", "content": name}]}) for name in "abc"]
    with chat_server(first_only) as server:
        answers = ServerEngine(ServerAddress(server.url), Generation()).answers(prompts)
        assert next(answers)[0].id == "a"
        answers.close()  # as Ctrl-C does
        assert not finished and not released.is_set()
        released.set()


def test_after_a_lost_server_the_same_command_answers_the_rest_once(notes: Path, run_command: RunCommand) -> None:
    asked: list[int] = []

    def dies(request: Request) -> str | int:
        asked.append(note_of(request))
        return ANSWER if len(asked) <= 3 else 500

    with chat_server(dies) as server:
        url = server.url
        code, output, rows = predict(run_command, notes, url, "--concurrency", 1)
    assert code == 1 and "answered with HTTP 500" in output and len(rows) == 3
    code, output, rows = predict(run_command, notes, url)
    assert code == 1 and output.count(f"The server {url} cannot be reached. Start it, or correct --server") == 1
    asked.clear()
    with chat_server(lambda request: asked.append(note_of(request)) or ANSWER, server.server_address[1]):
        code, output, rows = predict(run_command, notes, url)
    assert code == 0 and "6 answers (3 from an earlier call)" in output
    assert sorted(row["id"] for row in rows) == [f"s{n}" for n in range(6)] and len(asked) == 3


def test_the_folder_of_a_run_is_not_for_a_server(notes: Path, run_command: RunCommand) -> None:
    code, output, _ = predict(run_command, notes, "http://127.0.0.1:9/v1", "--run", notes.parent)
    assert code == 1 and f"--engine server runs the server's own model: leave out {notes.parent}" in output


@pytest.mark.parametrize("url", ["http://192.0.2.1:8000/v1", "http://hospital.example/v1", "http://127.0.0.1.example/"])
def test_notes_leave_the_machine_only_if_allowed(url: str, notes: Path, run_command: RunCommand) -> None:
    code, output, rows = predict(run_command, notes, url)
    assert code == 1 and not rows
    assert "is another machine, and notes would be sent there. Give --allow_remote" in output


def test_redirects_and_proxies_are_not_used(notes: Path, run_command: RunCommand, monkeypatch) -> None:
    with chat_server(lambda _: ANSWER) as other, chat_server(lambda _: ANSWER) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, other.url)
        assert predict(run_command, notes, server.url)[0] == 0
        server.location = other.url
        (notes.parent / "p.jsonl").unlink()
        code, output, rows = predict(run_command, notes, server.url, "--model", "demo")
        assert code == 1 and not rows and "HTTP 307" in output
        assert not other.requests


@pytest.mark.parametrize("model", [[], ["--model", "demo"]], ids=["list of models", "prompt"])
def test_nothing_else_of_the_environment_is_sent(model, notes: Path, run_command: RunCommand, monkeypatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "environment")
    custom = ("Host", "Accept", "Authorization", "User-Agent", "X-Own")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "".join(f"{name}: environment\n" for name in custom))
    with chat_server(lambda _: ANSWER) as server:
        if not model:
            server.models = []  # and no prompt follows
        predict(run_command, notes, server.url, *model)
        host = server.url.removeprefix("http://").removesuffix("/v1")
    length = server.headers.pop("content-length")
    assert server.headers == {
        "host": host,
        "authorization": "Bearer none",
        "accept": "application/json",
        "content-type": "application/json",
    }
    assert bool(int(length)) == bool(model)


def test_a_server_with_several_models_needs_a_name(notes: Path, run_command: RunCommand) -> None:
    with chat_server(lambda _: ANSWER) as server:
        server.models = ["a", "b"]
        code, output, _ = predict(run_command, notes, server.url)
        assert code == 1 and "lists 2 models (a, b); name one with --model" in output
        assert predict(run_command, notes, server.url, "--model", "b")[0] == 0
    assert server.requests[0]["model"] == "b"


def test_log_probabilities_are_asked_for_if_wanted(notes: Path, run_command: RunCommand) -> None:
    with chat_server(lambda _: ANSWER) as server:
        _, _, rows = predict(run_command, notes, server.url, "--log_probabilities")
    assert all(row["log_probability"] == -0.5 for row in rows)


def test_questions_are_answered_without_codes(tmp_path: Path, run_command: RunCommand) -> None:
    tools = [{"type": "function", "function": {"name": "dose", "description": "", "parameters": {}}}]
    rows = [
        {"id": "a", "messages": [{"role": "user", "content": "Dose ?"}], "tools": tools},
        {"id": "b", "messages": [{"role": "user", "content": "Capitale ?"}, {"role": "assistant", "content": "Paris"}]},
    ]
    batch, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    batch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["--engine", "server", "--temperature", 0.5, "--top_p", 0.9, "--seed", 3]
    with chat_server(lambda _: "Réponse") as server:
        code, _ = run_command(chat, "--batch", batch, "--out", out, "--server", server.url, *options)
    answered = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert code == 0 and sorted(answered, key=lambda row: row["id"]) == [
        {"id": "a", "answer": "Réponse"},
        {"id": "b", "answer": "Réponse"},
    ]
    by_question = {request["messages"][0]["content"]: request for request in server.requests}
    assert by_question["Dose ?"]["tools"][0]["function"]["name"] == "dose"
    assert by_question["Capitale ?"]["messages"] == [{"role": "user", "content": "Capitale ?"}]
    assert by_question["Dose ?"]["seed"] != by_question["Capitale ?"]["seed"]
    assert by_question["Dose ?"]["top_p"] == 0.9


@pytest.fixture
def cim10(tmp_path: Path) -> Path:
    path = tmp_path / "cim10.tsv"
    path.write_text("code\ttype_mco\tlabel\nJ459\t0\tAsthme\nX59\t2\tChute\n", encoding="utf-8")
    return path


ALLOWED = build_answer([Diagnosis("DP", "J459", "Asthme"), Diagnosis("DAS", "X59", "Chute")])


@pytest.mark.parametrize("owner", ["vllm", "llamacpp"])
def test_the_grammar_is_sent_in_the_field_of_the_server(
    owner: str, notes: Path, cim10: Path, run_command: RunCommand
) -> None:
    with chat_server(lambda _: ALLOWED) as server:
        server.owner = owner
        code, output, rows = predict(run_command, notes, server.url, "--cim10", cim10, "--model", "demo")
    assert code == 0, output
    assert {tuple(item["code"] for item in row["codes"]) for row in rows} == {("J459", "X59")}
    request = server.requests[0]
    assert {"structured_outputs", "grammar"} & request.keys() == {
        {"vllm": "structured_outputs", "llamacpp": "grammar"}[owner]
    }
    if owner == "vllm":
        matcher = judge(request["structured_outputs"]["grammar"])
        for text in (ALLOWED, f" {ALLOWED}"):  # the first token of a SentencePiece model has a space
            assert judged(matcher, text.encode()) == (len(text.encode()), True)
        assert not judged(matcher, ALLOWED.replace("J459", "X59").encode())[1]
    else:
        assert request["grammar"].startswith("root ::= opening") and '"Chute (X59)"' in request["grammar"]


def test_an_answer_that_ignores_the_grammar_is_reported(notes: Path, cim10: Path, run_command: RunCommand) -> None:
    swapped = ALLOWED.replace("Asthme (J459)", "Chute (X59)")  # not allowed as DP
    with chat_server(lambda request: swapped if note_of(request) == 4 else ALLOWED) as server:
        code, output, rows = predict(run_command, notes, server.url, "--cim10", cim10)
        assert code == 1 and len(rows) == 5
        assert "(s4): the answer is not restricted to the codes of --cim10: the engine did not follow the" in output
        (notes.parent / "p.jsonl").unlink()
        server.answer = lambda _: swapped
        code, output, rows = predict(run_command, notes, server.url, "--cim10", cim10, "--concurrency", 1)
        assert code == 1 and not rows and "did not follow the grammar, like all before" in output


def test_an_answer_that_is_too_long_keeps_its_complete_codes(notes: Path, cim10: Path, run_command: RunCommand) -> None:
    cut = choice({"content": ALLOWED[:-3]}, finish_reason="length")
    with chat_server(lambda request: cut if note_of(request) else choice({"content": ALLOWED[:-3]})) as server:
        code, output, rows = predict(run_command, notes, server.url, "--cim10", cim10)
    assert code == 1 and "(s0)" in output  # the same text is not an answer if the model ended it
    assert [[item["code"] for item in row["codes"]] for row in rows] == [["J459"]] * 5


def test_a_server_that_takes_no_grammar_is_refused_at_once(notes: Path, cim10: Path, run_command: RunCommand) -> None:
    with chat_server(lambda _: ALLOWED) as server:
        server.owner = "somebody"
        code, output, _ = predict(run_command, notes, server.url, "--cim10", cim10)
    assert code == 1 and not server.requests
    assert "is neither vLLM nor llama.cpp, which take a grammar: leave out --cim10" in output


class Network:
    """Hosts and ports that this process looks up or connects to, while `recording`."""

    recording = False
    peers: ClassVar[set[tuple[str, int]]] = set()

    @classmethod
    def hook(cls, event: str, args: tuple) -> None:
        """Audit hooks cannot be removed, so there is one, which mostly does nothing."""
        if cls.recording and event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            cls.peers.add(args[1][:2])
        elif cls.recording and event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.getnameinfo"):
            cls.peers.add((args[0], args[1] if len(args) > 1 else 0))


sys.addaudithook(Network.hook)


def test_nothing_but_the_given_address_is_looked_up_or_connected_to(
    notes: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    with chat_server(lambda _: ANSWER) as server:
        monkeypatch.setattr(Network, "peers", set())
        monkeypatch.setattr(Network, "recording", True)
        assert predict(run_command, notes, server.url)[0] == 0
        Network.recording = False
    assert Network.peers == {("127.0.0.1", server.server_address[1])}
