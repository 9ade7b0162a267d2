"""Answers of this project and of transformers' generate: the same weights in fp32, prompts and greedy tokens.

Each answer has as many tokens as the right one, so that an untrained model's answers have realistic lengths.
transformers gets batches in the order of the file, as a loop over it does, and sorted by length, as ours are.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase
from transformers import AutoModelForCausalLM, StoppingCriteria

from benchmarks.measure import measure, print_table, spread
from finetune.data.conversation import parse_conversation
from finetune.data.tokenize import SampleEncoder
from finetune.inference import load_trained
from model.generate import Request, collect_tokens, stream_requests
from utils.fictional_notes.catalogue import load_catalogue
from utils.fictional_notes.notes import LENGTHS, write_notes
from utils.icd10.answers import build_answer
from utils.icd10.prompts import prompt_messages
from utils.models.exports import export

_NO_END = -1  # no token ends an answer
_SEED = 7  # of the notes; a model's training has other ones
OURS, IN_ORDER, BY_LENGTH = "this project", "transformers, in the order of the file", "transformers, by length"


def mixed_requests(tokenizer: InstructTokenizerBase, count: int) -> list[Request]:
    """Return notes, every second one long, as prompts with the length of the right answer."""
    catalogue, encoder = load_catalogue(), SampleEncoder(tokenizer)
    kinds = [write_notes(-(-count // 2), _SEED, catalogue, length) for length in LENGTHS]
    found = []
    for note in [note for pair in zip(*kinds) for note in pair][:count]:
        prompt = encoder.encode_prompt(parse_conversation({"messages": prompt_messages(note.text)}).messages)
        answer = tokenizer.tokenizer.encode(build_answer(note.diagnoses), bos=False, eos=True)
        found.append(Request(prompt, len(answer)))
    return found


class _RightLengths(StoppingCriteria):
    """Ends each row of a batch after its number of tokens."""

    def __init__(self, width: int, requests: Sequence[Request]) -> None:
        self._ends = torch.tensor([width + request.max_tokens for request in requests])

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return ids.shape[1] >= self._ends


class _Compared:
    """Both engines, with the model of a folder (a run, a checkpoint or a model)."""

    def __init__(self, folder: Path, notes: int) -> None:
        self._ours, tokenizer = load_trained(folder)
        self._requests = mixed_requests(tokenizer, notes)
        self._expected: list[list[int]] = []
        with tempfile.TemporaryDirectory() as exported:
            export(folder, "hf", Path(exported) / "hf", merged=True, dtype="fp32")
            self._theirs: Any = AutoModelForCausalLM.from_pretrained(Path(exported) / "hf", dtype=torch.float32).eval()

    def run(self, case: dict[str, Any]) -> dict[str, float]:
        """Answer all prompts; the answers of the first case are what those of the others are compared with."""
        order: Sequence[int] = range(len(self._requests))
        if case["engine"] != IN_ORDER:
            order = sorted(order, key=lambda index: len(self._requests[index].prompt))
        requests = [self._requests[index] for index in order]
        wall, processor = time.perf_counter(), time.process_time()
        if case["engine"] == OURS:
            found = collect_tokens(stream_requests(self._ours, requests, _NO_END, places=case["batch"]))
        else:
            starts = range(0, len(requests), case["batch"])
            found = [answer for start in starts for answer in self._generate(requests[start : start + case["batch"]])]
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        answers = [answer for _, answer in sorted(zip(order, found))]
        self._expected = self._expected or answers
        tokens = sum(map(len, answers))
        return {
            "notes_per_second": len(requests) / wall,
            "tokens_per_second": tokens / wall,
            "processor_seconds": processor,
            "equal_answers": sum(one == other for one, other in zip(answers, self._expected, strict=True)),
            "prompt_tokens": sum(len(request.prompt) for request in requests),
            "answer_tokens": tokens,
        }

    @torch.no_grad()
    def _generate(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Yield transformers' greedy answers to a batch, padded on the left."""
        width = max(len(request.prompt) for request in requests)
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt, *_ in requests])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, *_ in requests])
        answers = self._theirs.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(request.max_tokens for request in requests),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[_RightLengths(width, requests)],
        )
        for answer, request in zip(answers[:, width:].tolist(), requests):
            yield answer[: request.max_tokens]


def compare(folder: Path, notes: int, rounds: int, threads: int, batches: Sequence[int]) -> None:
    """Measure this project and transformers alternately, and print a table with our best case relative to each."""
    compared = _Compared(folder, notes)
    cases = [
        {"engine": engine, "batch": batch, "threads": threads, "notes": notes}
        for batch in batches
        for engine in (OURS, IN_ORDER, BY_LENGTH)
    ]
    record = measure("generate", cases, rounds, compared.run)
    best = min(case["processor_seconds"][1] for case in record["results"] if case["engine"] == OURS)
    columns = {
        "engine": lambda case: case["engine"],
        "at once": lambda case: str(case["batch"]),
        "notes/s": lambda case: spread(case["notes_per_second"]),
        "tokens/s": lambda case: spread(case["tokens_per_second"], digits=1),
        "processor time, s": lambda case: spread(case["processor_seconds"], digits=1),
        "times our best": lambda case: f"{case['processor_seconds'][1] / best:.2f}",
        "equal answers": lambda case: f"{case['equal_answers'][0]:.0f}",
    }
    print_table(record, columns)
