"""Ask a trained model: a conversation in the terminal, or one question.

python -m utils.chat RUN                                a conversation; /new starts another, Ctrl-D leaves
python -m utils.chat RUN --prompt "..." --compare       one question, also to the model before fine-tuning
python -m utils.chat RUN --prompt - --icd10 < note.txt  codes of a note
python -m utils.chat RUN --batch Q.jsonl --out A.jsonl  answers to all rows of a file

RUN is a run (its latest checkpoint), a checkpoint, or a model folder. Prompts are encoded as in training. Answers are
greedy unless --temperature is given, and appear as they are written; Ctrl-C ends one.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cli import run_cli
from model.errors import UserError
from utils.engines.choice import add_engine_options, add_shard_option, parse_engine
from utils.engines.engine import Generation
from utils.icd10.prompts import prompt_messages

if TYPE_CHECKING:
    from utils.engines.chat_model import Answer, ChatModel

Messages = list[dict[str, Any]]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="folder of a run, a checkpoint or a model")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit; - reads it from the standard input")
    parser.add_argument("--icd10", action="store_true", help="prompts are notes: ask for their codes as in training")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--compare", action="store_true", help="also answer with the model before fine-tuning")
    parser.add_argument("--json", action="store_true", help="print each answer as one line of JSON")
    parser.add_argument("--batch", type=Path, metavar="FILE", help="answer these rows (jsonl) instead, with any engine")
    parser.add_argument("--out", type=Path, metavar="FILE", help="answers of --batch (jsonl); resumes if interrupted")
    add_shard_option(parser)
    add_engine_options(parser)
    options = parser.parse_args()
    if options.icd10 and options.system:
        parser.error("--icd10 has a system prompt of its own; leave out --system")
    if (options.batch is None) != (options.out is None):
        parser.error("--batch and --out belong together")
    if options.batch and (options.prompt or options.system or options.compare or options.icd10 or options.json):
        parser.error("--batch takes its prompts from the file; leave out the options of a conversation")
    if options.engine != "local" and options.batch is None:
        parser.error(f"--engine {options.engine} is for --batch")
    if (options.batch_size or options.shard) and options.batch is None:
        parser.error("--batch_size and --shard are for --batch")
    if options.run is None and options.engine != "server":
        parser.error("RUN is missing: the folder of a run, a checkpoint or a model")
    return options


def main() -> None:
    options = _arguments()
    choice = parse_engine(options, options.run)
    if options.batch:
        from utils.engines.answer_file import answer_file, report_answered  # imports mistral_common
        from utils.engines.shards import parse_shard

        shard = parse_shard(options.shard)
        return report_answered(answer_file(choice, options.batch, options.out, with_codes=False, shard=shard))
    options.system = options.system and _valid_text(lambda: options.system)
    prompt = options.prompt and _valid_text(sys.stdin.read if options.prompt == "-" else lambda: options.prompt)
    if prompt is not None and not prompt.strip():
        raise UserError("The prompt is empty.")
    from utils.engines.chat_model import ChatModel  # imports torch

    chat = _Chat(ChatModel(options.run, options.step, options.compare), choice.generation, options)
    if prompt is None:
        chat.converse()
    else:
        chat.ask(prompt)


def _valid_text(read: Callable[[], str]) -> str:
    """Return what `read` does.

    Raises:
        UserError: it is not UTF-8; invalid bytes of a command line are unpaired surrogates in Python.
    """
    try:
        text = read()
        text.encode()
    except (UnicodeDecodeError, UnicodeEncodeError):
        raise UserError("The prompt is not UTF-8; convert it, for example with `iconv -f cp1252 -t utf-8`.") from None
    return text


class _Chat:
    """A conversation with each of the models."""

    def __init__(self, model: "ChatModel", generation: Generation, options: argparse.Namespace) -> None:
        self._model = model
        self._generation = generation
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
                prompt = _valid_text(lambda: input("> " if sys.stdin.isatty() else "")).strip()
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
            answers[name] = self._model.answer(name, messages, self._generation)
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
