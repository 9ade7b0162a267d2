"""A server with OpenAI's API: vLLM, `transformers serve`, llama.cpp, Ollama.

Notes are sent to the given address only: no proxy is used and no redirect is followed.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from finetune.data.conversation import parse_conversation
from model.errors import UserError
from utils.engines.engine import Generation, Reply, seed_of
from utils.engines.prompts import Prompt
from utils.engines.server_address import ServerAddress
from utils.tables.jsonl import SkippedRowError

KEY_VARIABLE = "SERVER_API_KEY"
_TIMEOUT_S = 600.0  # of one answer
_RETRIES = (
    6  # after 0.5, 1, 2, 4, 8, 8 s, or when the server says so; in all, about as long as a server takes to restart
)
_REFUSALS = (400, 413, 422)  # HTTP statuses that concern one prompt, such as one that is too long


class ServerEngine:
    """The model of a server.

    Args:
        address: where it is.
        generation: length and sampling of the answers.

    Attributes:
        model: its name.

    Raises:
        UserError: the server is not there, does not have the model, or must not be used.
    """

    def __init__(self, address: ServerAddress, generation: Generation) -> None:
        address.require_allowed()
        try:
            import openai
        except ImportError as error:
            raise UserError("--engine server needs the extra `server`: pip install -e '.[server]'.") from error
        self._address = address
        self._generation = generation
        self._openai = openai
        self._client = openai.OpenAI(
            base_url=address.url,
            api_key=os.environ.get(KEY_VARIABLE, "none"),
            max_retries=_RETRIES,
            timeout=openai.Timeout(_TIMEOUT_S, connect=10.0),
            http_client=openai.DefaultHttpxClient(trust_env=False, follow_redirects=False),
        )
        self.model = address.model or self._only_model()

    def _only_model(self) -> str:
        try:
            names = [model.id for model in self._client.with_options(max_retries=0).models.list()]
        except self._openai.OpenAIError as error:
            raise self._unavailable(error) from error
        if len(names) != 1:
            raise UserError(
                f"The server {self._address.url} lists {len(names)} models ({', '.join(names[:10]) or 'none'}); name "
                "one with --model."
            )
        return names[0]

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Reply | SkippedRowError]]:
        """Answer several prompts at a time; see `Engine`."""
        waiting = iter(prompts)
        running: dict[Future[Reply | SkippedRowError], Prompt] = {}
        pool = ThreadPoolExecutor(self._address.concurrency, thread_name_prefix="server")
        answered = False
        try:
            while True:
                while len(running) < self._address.concurrency and (prompt := next(waiting, None)) is not None:
                    running[pool.submit(self._answer, prompt)] = prompt
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    prompt, reply = running.pop(done), done.result()
                    if isinstance(reply, SkippedRowError) and not answered:
                        raise UserError(f"Prompt {prompt.id}: {reply.reason}. Its log may say why.")
                    answered = True
                    yield prompt, reply
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, prompt: Prompt) -> Reply | SkippedRowError:
        try:
            choice = self._client.chat.completions.create(**self._request(prompt)).choices[0]
        except self._openai.APIStatusError as error:
            if error.status_code in _REFUSALS:
                code = f", {error.code}" if error.code else ""
                return SkippedRowError(f"the server refused it (HTTP {error.status_code}{code})")
            raise self._unavailable(error) from error
        except self._openai.OpenAIError as error:
            raise self._unavailable(error) from error
        tokens = choice.logprobs.content or [] if choice.logprobs else []
        text = (choice.message.content or "").strip()
        return Reply(text, tuple(token.logprob for token in tokens), choice.finish_reason == "stop")

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
        if sampling.top_k:
            request["extra_body"] = {"top_k": sampling.top_k}
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
