"""Ask a trained model: a conversation in the terminal, or one question.

python -m utils.chat RUN                                a conversation; /new starts another, Ctrl-D leaves
python -m utils.chat RUN --prompt "..." --compare       one question, also to the model before fine-tuning
python -m utils.chat RUN --prompt - --icd10 < note.txt  codes of a note

RUN is a run (its latest checkpoint), a checkpoint, or a model folder. Prompts are encoded as in training. Answers are
greedy unless --temperature is given, and appear as they are written; Ctrl-C ends one.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cli import add_step_option, run_cli
from model.errors import UserError
from utils.icd10.prompts import prompt_messages

if TYPE_CHECKING:
    from model.generate import Sampling
    from utils.models.chat_model import Answer, ChatModel

Messages = list[dict[str, Any]]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, a checkpoint or a model")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit; - reads it from the standard input")
    parser.add_argument("--icd10", action="store_true", help="prompts are notes: ask for their codes as in training")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--compare", action="store_true", help="also answer with the model before fine-tuning")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for the most likely tokens (default)")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample from tokens with this total probability")
    parser.add_argument("--top_k", type=int, default=0, help="sample from this many tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    parser.add_argument("--max_tokens", type=int, default=512, help="maximum answer length (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print each answer as one line of JSON")
    add_step_option(parser)
    options = parser.parse_args()
    if options.icd10 and options.system:
        parser.error("--icd10 has a system prompt of its own; leave out --system")
    return options


def _sampling(options: argparse.Namespace) -> "Sampling":
    if options.temperature < 0 or not 0 < options.top_p <= 1 or options.top_k < 0 or options.max_tokens < 1:
        raise UserError(
            "--temperature and --top_k must be at least 0, --top_p above 0 and at most 1, --max_tokens at least 1."
        )
    if options.temperature == 0 and (options.top_p < 1 or options.top_k > 0 or options.seed):
        raise UserError("--top_p, --top_k and --seed have no effect on the most likely tokens; give --temperature.")
    from model.generate import Sampling

    return Sampling(options.temperature, options.top_k, options.top_p, options.seed)


def main() -> None:
    options = _arguments()
    sampling = _sampling(options)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if prompt is not None and not prompt.strip():
        raise UserError("The prompt is empty.")
    from utils.models.chat_model import ChatModel  # imports torch

    chat = _Chat(ChatModel(options.run, options.step, options.compare), sampling, options)
    if prompt is None:
        chat.converse()
    else:
        chat.ask(prompt)


class _Chat:
    """A conversation with each of the models."""

    def __init__(self, model: "ChatModel", sampling: "Sampling", options: argparse.Namespace) -> None:
        self._model = model
        self._sampling = sampling
        self._options = options
        self._start()

    def _start(self) -> None:
        system = self._options.system
        first = [{"role": "system", "content": system}] if system else []
        self._conversations: dict[str, Messages] = {name: [*first] for name in self._model.names}

    def converse(self) -> None:
        """Answer what is typed, until the input ends."""
        if sys.stdin.isatty():
            import readline  # noqa: F401 - arrow keys and history in input()

            print("Type a prompt and Enter. /new starts another conversation, Ctrl-D leaves.", file=sys.stderr)
        while True:
            try:
                prompt = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            if prompt == "/new" or self._options.icd10:
                self._start()  # each note is a conversation of its own
            if prompt and prompt != "/new":
                self.ask(prompt)

    def ask(self, prompt: str) -> None:
        """Add a prompt to the conversations and print the answers."""
        answers = {}
        for name, messages in self._conversations.items():
            messages += prompt_messages(prompt) if self._options.icd10 else [{"role": "user", "content": prompt}]
            answers[name] = self._model.answer(name, messages, self._sampling, self._options.max_tokens)
            if len(self._conversations) > 1 and not self._options.json:
                print(f"--- {name}")
            self._write(answers[name])
            messages.append({"role": "assistant", "content": answers[name].text})
        if self._options.json:
            print(json.dumps({name: _as_json(answer) for name, answer in answers.items()}, ensure_ascii=False))

    def _write(self, answer: "Answer") -> None:
        """Print an answer while it is written; Ctrl-C ends it."""
        try:
            for piece in answer:
                if not self._options.json:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if self._options.prompt is not None:
                raise
        if not self._options.json:
            print("" if answer.is_complete else " [incomplete]", flush=True)


def _as_json(answer: "Answer") -> dict[str, Any]:
    return {"answer": answer.text, "tokens": answer.tokens, "is_complete": answer.is_complete}


if __name__ == "__main__":
    run_cli(main)
