"""Find the sentences of a note that support a code: without them, the model finds the code less likely.

Each sentence is left out in turn, and the answer is scored again, many notes at a time. What the model then loses of
the logarithm of a code's probability, given the answer before it, is the sentence's effect on that code. Two sentences
that say the same support each other: without one, the other is still there, and both have a small effect.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from finetune.inference import load_trained
from utils.engines.prompts import Prompt
from utils.engines.token_codec import TokenCodec
from utils.icd10.answers import Diagnosis
from utils.icd10.confidence import locate
from utils.icd10.prompts import USER_PROMPT
from utils.icd10.sentences import Sentence, marks, split_sentences

DEFAULT_BATCH_TOKENS = 8192

_SMALLEST_DROP = 0.05  # a sentence without which the code keeps 95 % of its probability is not shown
_LOGITS = 1 << 26  # elements of [rows, V] in memory at once


class Effects(NamedTuple):
    """What sentences of a note do to the codes of an answer.

    Attributes:
        note: text of the note.
        sentences: of the note, S.
        drops: what the logarithm of each code's probability loses without each sentence, [codes, S].
    """

    note: str
    sentences: list[Sentence]
    drops: list[list[float]]


class EvidenceFinder:
    """A model that scores answers to notes without one of their sentences.

    Args:
        folder: folder of a run, a checkpoint or a model.
        batch_tokens: tokens that are computed at once; more if a single note with its answer has more.

    Raises:
        UserError: the folder cannot be used.
    """

    def __init__(self, folder: Path, batch_tokens: int = DEFAULT_BATCH_TOKENS) -> None:
        self._model, tokenizer = load_trained(folder)
        self._codec = TokenCodec(tokenizer, None)
        self._batch_tokens = batch_tokens

    def effects(self, prompt: Prompt, answer: str, diagnoses: Sequence[Diagnosis]) -> Effects:
        """Return the effect of each sentence on each code.

        Args:
            prompt: with a note in its last message.
            answer: text that contains the codes.
            diagnoses: the codes, in the order of the text.

        Raises:
            SkippedRowError: the prompt cannot be encoded.
        """
        content = str(prompt.messages[-1]["content"])
        before = USER_PROMPT.partition("{note}")[0]
        start = len(before) if content.startswith(before) else 0
        note = content[start:]
        sentences = split_sentences(note)
        notes = [note, *(note[: sentence.start] + note[sentence.end :] for sentence in sentences)]
        tokens, pieces = self._codec.encode_answer(answer)
        scores = self._score([self._encode(prompt, content[:start] + each) for each in notes], tokens)  # [S + 1, A]
        drops = []
        for first, last in _token_ranges(answer, diagnoses, pieces):
            of_code = scores[:, first:last].sum(dim=1)
            drops.append((of_code[0] - of_code[1:]).tolist())
        return Effects(note, sentences, drops)

    def _encode(self, prompt: Prompt, content: str) -> list[int]:
        messages = [*prompt.messages[:-1], prompt.messages[-1] | {"content": content}]
        _, encoded, refused = self._codec.encode([prompt._replace(row=prompt.row | {"messages": messages})])
        for _, reason in refused:
            raise reason
        return encoded[0]

    @torch.no_grad()
    def _score(self, prompts: Sequence[Sequence[int]], answer: Sequence[int]) -> torch.Tensor:
        """Return the logarithm of the probability of each token of the answer after each prompt, [prompts, A]."""
        device = self._model.tok_embeddings.weight.device
        targets = torch.tensor(answer, device=device)
        scores = []
        for batch in self._batches(prompts, len(answer)):
            lengths = [len(prompt) + len(answer) for prompt in batch]
            ids = torch.tensor([token for prompt in batch for token in (*prompt, *answer)], device=device)
            ends = torch.tensor(lengths, device=device).cumsum(0)
            before = torch.arange(-len(answer) - 1, -1, device=device)  # the position before each token of the answer
            positions = (ends[:, None] + before).flatten()

            def head(hidden: torch.Tensor, weight: torch.Tensor, count: int = len(batch)) -> torch.Tensor:
                return _chances(hidden, weight, targets.repeat(count))

            scores.append(self._model(ids, lengths, head, positions).view(len(batch), -1))
        return torch.cat(scores).double().cpu()

    def _batches(self, prompts: Sequence[Sequence[int]], answer: int) -> Iterator[list[Sequence[int]]]:
        batch: list[Sequence[int]] = []
        size = 0
        for prompt in prompts:
            if batch and size + len(prompt) + answer > self._batch_tokens:
                yield batch
                batch, size = [], 0
            batch.append(prompt)
            size += len(prompt) + answer
        yield batch


def _chances(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the probability of each target: [N, D], [V, D], [N] -> [N]."""
    rows = max(1, _LOGITS // len(weight))
    parts = []
    for some, wanted in zip(hidden.split(rows), targets.split(rows)):
        logits = F.linear(some, weight.to(some.dtype)).float()
        parts.append(logits.gather(1, wanted[:, None]).squeeze(1) - logits.logsumexp(dim=-1))
    return torch.cat(parts)


def _token_ranges(answer: str, diagnoses: Sequence[Diagnosis], pieces: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Yield the first token of each code's label and the token after the code's last one; (0, 0) if not found."""
    offset = max(0, b"".join(pieces).find(answer.encode()))
    ends = [sum(map(len, pieces[: index + 1])) - offset for index in range(len(pieces))]
    written = 0
    for item in locate(answer, diagnoses):
        if item is None:
            yield 0, 0
            continue
        start = written if item.start is None else item.start
        inside = [
            index for index, (piece, end) in enumerate(zip(pieces, ends)) if end > start and end - len(piece) < item.end
        ]
        yield inside[0], inside[-1] + 1
        written = item.end


def supporting(effects: Effects, prompt: Prompt, code: int, label: str, most: int) -> list[dict[str, Any]]:
    """Return the sentences with the largest effect on a code, as rows of `utils.explain_icd10`.

    Args:
        effects: of the note.
        prompt: whose documents the note was joined from.
        code: index of the code in the effects.
        label: of the code.
        most: number of sentences.
    """
    drops = effects.drops[code]
    best = sorted(range(len(drops)), key=lambda index: -drops[index])[:most]
    rows = []
    for index in best:
        if drops[index] < _SMALLEST_DROP:
            continue
        sentence = effects.sentences[index]
        text = effects.note[sentence.start : sentence.end]
        part = next((each for each in prompt.documents if each.start <= sentence.start < each.end), None)
        rows.append(
            {
                "sentence": text,
                "start": sentence.start,
                "end": sentence.end,
                "document": part.kind if part else "",
                "date": part.date if part else "",
                "drop": round(drops[index], 4),
                "marks": marks(text, label),
            }
        )
    return rows
