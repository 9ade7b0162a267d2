"""A trained model that answers conversations, one at a time, word by word."""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

from finetune.data.conversation import parse_conversation
from finetune.data.tokenize import SampleEncoder
from finetune.inference import load_base_of, load_trained
from model.generate import stream
from model.lora import adapters_disabled, lora_layers
from model.transformer import Transformer
from utils.engines.engine import Generation

BASE, TUNED = "base model", "fine-tuned"


class Answer:
    """An answer while it is written; iterate over it for its text.

    Attributes:
        text: the text so far.
        tokens: number of tokens so far, including the one that ends the answer.
        is_complete: whether the model has ended it; else it was interrupted or reached the maximum length.
    """

    def __init__(self, tokenizer: InstructTokenizerBase, tokens: Generator[int, None, None]) -> None:
        self.text = ""
        self.tokens = 0
        self.is_complete = False
        self._tokenizer = tokenizer.tokenizer
        self._tokens = tokens

    def __iter__(self) -> Iterator[str]:
        """Yield the text piece by piece; a character whose bytes are not all there yet waits for the next piece.

        However it ends, the model is as before: ready for the next answer, with its adapter.
        """
        ids: list[int] = []
        with contextlib.closing(self._tokens):
            for token in self._tokens:
                self.tokens += 1
                if token == self._tokenizer.eos_id:
                    self.is_complete = True
                    return
                ids.append(token)
                text = self._tokenizer.decode(ids).lstrip()
                if not text.endswith("\N{REPLACEMENT CHARACTER}") and text != self.text:
                    piece, self.text = text[len(self.text) :], text
                    yield piece


class ChatModel:
    """The model of a run, a checkpoint or a model folder, and the model that the run started from.

    Args:
        folder: of the run, checkpoint or model.
        step: checkpoint of a run: a step number or "best"; None for the latest.
        compare: also answer with the model before fine-tuning.

    Attributes:
        names: of the models that answer, in order.

    Raises:
        UserError: nothing to load, or nothing to compare with.
    """

    def __init__(self, folder: Path, step: int | str | None = None, compare: bool = False) -> None:
        self._model, self._tokenizer = load_trained(folder, step, merge=not compare)
        self._encoder = SampleEncoder(self._tokenizer)
        self._base: Transformer | None = None
        if compare and not any(lora_layers(self._model)):
            self._base, _ = load_base_of(folder, step)
        self.names = (BASE, TUNED) if compare else (TUNED,)

    def answer(self, name: str, messages: Sequence[dict[str, Any]], generation: Generation) -> Answer:
        """Answer a conversation with one of `names`.

        Raises:
            UserError: the tokenizer does not support the conversation.
        """
        parsed = parse_conversation({"messages": list(messages)}).messages
        prompt = self._encoder.encode_prompt(parsed)
        return Answer(self._tokenizer, self._stream(name, prompt, generation))

    def _stream(self, name: str, prompt: list[int], generation: Generation) -> Generator[int, None, None]:
        max_tokens, sampling = generation
        untuned = name == BASE
        model = self._base if untuned and self._base is not None else self._model
        mode = adapters_disabled(model) if untuned else contextlib.nullcontext()
        eos_id = self._tokenizer.tokenizer.eos_id
        with mode, contextlib.closing(stream(model, [prompt], max_tokens, eos_id, sampling)) as steps:
            for step in steps:
                yield step[0].token
