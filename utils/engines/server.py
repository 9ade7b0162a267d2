"""A server with OpenAI's API: vLLM, `transformers serve`, llama.cpp, Ollama.

Notes are sent to the given address only: no proxy is used and no redirect is followed. Of the environment, only
SERVER_API_KEY is sent. Answers are constrained by a grammar in each request, which vLLM and llama.cpp's server
understand, and are checked: a server may ignore it.
"""

import asyncio
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

from finetune.data.conversation import parse_conversation
from finetune.data.rows import is_identifier
from model.errors import UserError
from utils.engines.engine import Generation, Reply, seed_of
from utils.engines.grammar import TableGrammar
from utils.engines.prompts import Prompt
from utils.engines.server_address import ServerAddress
from utils.icd10.codes import Cim10Table
from utils.icd10.rules import RuleSet
from utils.tables.jsonl import SkippedRowError

KEY_VARIABLE = "SERVER_API_KEY"
_TIMEOUT_S = 600.0  # of one answer
# After 0.5, 1, 2, 4, 8, 8 s, or when the server says so; in all, about as long as a server takes to restart.
_RETRIES = 6
_FIRST_REFUSALS = 3  # replies without any answer, after which the fault is not in the prompts
_REFUSALS = (400, 413, 422)  # HTTP statuses that concern one prompt, such as one that is too long
_GRAMMAR_HINT = (
    "For --cim10, start vLLM with --structured-outputs-config.backend guidance and without --tokenizer-mode mistral."
)
# What a JSON document of another layout raises; openai does not check what it parses.
_NOT_OPENAI = (AttributeError, LookupError, TypeError, ValueError)


def _api_key() -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{KEY_VARIABLE} has characters that no API key has.")
    return key or "none"


class ServerEngine:
    """The model of a server.

    Args:
        address: where it is.
        generation: length and sampling of the answers.
        table: codes that answers may contain; None for unconstrained answers.
        rules: coding rules that such answers follow; None for those of the guide.

    Attributes:
        model: its name.

    Raises:
        UserError: the server is not there, does not have the model, takes no grammar, or must not be used.
    """

    def __init__(
        self,
        address: ServerAddress,
        generation: Generation,
        table: Cim10Table | None = None,
        rules: RuleSet | None = None,
    ) -> None:
        address.require_allowed()
        try:
            import openai
        except ImportError as error:
            raise UserError("--engine server needs the extra `server`: pip install -e '.[server]'.") from error
        self._address = address
        self._generation = generation
        self._openai = openai
        self._options: dict[str, Any] = {
            "base_url": address.url,
            "api_key": _api_key(),
            "timeout": openai.Timeout(_TIMEOUT_S, connect=10.0),
        }
        self._direct: dict[str, Any] = {"trust_env": False, "follow_redirects": False, "auth": self._bare}
        listed = self._listed_models() if table is not None or not address.model else {}
        self.model = address.model or self._only_model(list(listed))
        self._grammar = None if table is None else TableGrammar(table, rules)
        self._grammar_fields = self._grammar and self._grammar.request_fields(next(iter(listed.values()), None))
        if self._grammar and self._grammar_fields is None:
            raise UserError(
                f"The server {address.url} is neither vLLM nor llama.cpp, which take a grammar: leave out --cim10, and "
                "the evaluation counts codes that are not in the table."
            )

    def _bare(self, request: Any) -> Any:
        """Return a request to the server, an httpx.Request, with the headers that it needs.

        openai adds others, from OPENAI_ORG_ID, OPENAI_PROJECT_ID and OPENAI_CUSTOM_HEADERS and about this machine.
        """
        given = request.headers
        request.headers = type(given)(
            {
                "Host": request.url.netloc.decode(),
                "Authorization": f"Bearer {self._options['api_key']}",
                "Accept": "application/json",
                "Content-Type": "application/json",
                "Content-Length": given.get("Content-Length", "0"),
            }
        )
        return request

    def _listed_models(self) -> dict[str, str | None]:
        """Return the owner of each model that the server lists."""
        http_client = self._openai.DefaultHttpxClient(**self._direct)
        try:
            with self._openai.OpenAI(**self._options, max_retries=0, http_client=http_client) as client:
                return {str(model.id): getattr(model, "owned_by", None) for model in client.models.list()}
        except self._openai.NotFoundError as error:
            url = self._address.url
            message = f"The server {url} has no list of models: name one with --model, or correct the path of --server"
            raise UserError(f"{message}, which often ends in /v1.") from error
        except (self._openai.OpenAIError, *_NOT_OPENAI) as error:
            raise self._unavailable(error) from error

    def _only_model(self, names: Sequence[str]) -> str:
        if len(names) != 1:
            raise UserError(
                f"The server {self._address.url} lists {len(names)} models ({', '.join(names[:10]) or 'none'}); name "
                "one with --model."
            )
        return names[0]

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Reply | SkippedRowError]]:
        """Answer several prompts at a time; see `Engine`. Requests end with this generator, however it ends."""
        waiting = iter(prompts)
        running: dict[asyncio.Task[Reply | SkippedRowError | UserError], Prompt] = {}
        refused, answered = 0, False
        http_client = self._openai.DefaultAsyncHttpxClient(**self._direct)
        client = self._openai.AsyncOpenAI(**self._options, max_retries=_RETRIES, http_client=http_client)
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            while True:
                while len(running) < self._address.concurrency and (prompt := next(waiting, None)) is not None:
                    running[loop.create_task(self._answer(client, prompt))] = prompt
                if not running:
                    return
                done, _ = runner.run(asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))
                for task in done:
                    prompt, reply = running.pop(task), task.result()
                    if isinstance(reply, UserError):
                        raise reply
                    refused += isinstance(reply, SkippedRowError)
                    answered = answered or not isinstance(reply, SkippedRowError)
                    if isinstance(reply, SkippedRowError) and refused == _FIRST_REFUSALS and not answered:
                        hint = _GRAMMAR_HINT if self._grammar else "Its log may say why."
                        raise UserError(f"Prompt {prompt.id}: {reply.reason}, like all before. {hint}")
                    yield prompt, reply

    async def _answer(self, client: Any, prompt: Prompt) -> Reply | SkippedRowError | UserError:
        """Return the answer, why there is none, or why there will be none to other prompts either."""
        try:
            completion = await client.chat.completions.create(**self._request(prompt))
            reply = self._read(completion.choices[0])
            return self._grammar.check(reply) if self._grammar and isinstance(reply, Reply) else reply
        except UserError as error:
            return error
        except self._openai.APIStatusError as error:
            if error.status_code in _REFUSALS:
                status, code = str(error.status_code), str(error.code or "")  # vLLM repeats the status
                named = f", {code}" if code != status and is_identifier(code) else ""
                return SkippedRowError(f"the server refused it (HTTP {status}{named})")
            return self._unavailable(error)
        except (self._openai.OpenAIError, *_NOT_OPENAI) as error:
            return self._unavailable(error)

    def _read(self, choice: Any) -> Reply | SkippedRowError:
        """Return the answer in a choice of OpenAI's API.

        Raises:
            AttributeError, TypeError, ValueError: it is not one.
            UserError: it lacks log probabilities.
        """
        text = choice.message.content
        if text is None:
            return SkippedRowError("the server's answer has no text")
        chances: tuple[float, ...] = ()
        pieces: tuple[bytes, ...] = ()
        if self._address.log_probabilities:
            if choice.logprobs is None:
                url = self._address.url
                raise UserError(f"The server {url} sends no log probabilities; leave out --log_probabilities.")
            tokens = choice.logprobs.content or ()
            chances = tuple(float(token.logprob) for token in tokens)
            if not all(map(math.isfinite, chances)):
                raise ValueError
            # A token can be a part of a character, which only `bytes` can say; servers may leave it out.
            pieces = tuple(bytes(getattr(token, "bytes", None) or ()) or str(token.token).encode() for token in tokens)
        text = str.strip(text).encode("utf-8", "replace").decode()  # without unpaired surrogates
        return Reply(text, chances, choice.finish_reason == "stop", pieces)

    def _request(self, prompt: Prompt) -> dict[str, Any]:
        conversation = parse_conversation(prompt.row)
        sampling = self._generation.sampling
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [message.to_openai() for message in conversation.messages],
            "max_tokens": self._generation.max_tokens,
            "temperature": sampling.temperature,
        }
        if conversation.tools:
            request["tools"] = [tool.to_openai() for tool in conversation.tools]
        if sampling.temperature:
            request |= {"top_p": sampling.top_p, "seed": seed_of(prompt, sampling)}
        request["extra_body"] = {"top_k": sampling.top_k} if sampling.top_k else {}
        request["extra_body"] |= self._grammar_fields or {}
        if self._address.log_probabilities:
            request["logprobs"] = True
        return request

    def _unavailable(self, error: Exception) -> UserError:
        url = self._address.url
        if isinstance(error, self._openai.APITimeoutError):
            return UserError(f"The server {url} did not answer within {_TIMEOUT_S:.0f} s.")
        if isinstance(error, self._openai.APIConnectionError):
            return UserError(f"The server {url} cannot be reached. Start it, or correct --server; then run this again.")
        if isinstance(error, self._openai.NotFoundError):
            return UserError(f"The server {url} has no model {self._address.model!r}, or its API is at another path.")
        if isinstance(error, self._openai.APIStatusError):
            hint = f" Set {KEY_VARIABLE} to its key." if error.status_code in (401, 403) else ""
            return UserError(f"The server {url} answered with HTTP {error.status_code}.{hint}")
        return UserError(f"The server {url} sent an answer that is not OpenAI's: {type(error).__name__}.")
