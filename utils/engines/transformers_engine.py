"""transformers, on an exported model."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.data.tokenizer_files import load_instruct_tokenizer
from finetune.hardware import choose_device
from model.errors import UserError
from model.hf_config import CONFIG_NAME
from utils.engines.engine import DEFAULT_GENERATION, Generation, Reply, seed_of
from utils.engines.prompts import Prompt
from utils.engines.token_codec import TokenCodec
from utils.icd10.codes import Cim10Table
from utils.icd10.constrained_decoding import AnswerConstraint
from utils.icd10.rules import RuleSet
from utils.tables.jsonl import SkippedRowError


class TransformersEngine:
    """An exported model that transformers runs in batches; prompts are encoded as in training.

    Sampled answers depend on the batch: transformers has one source of random numbers for all of its rows.

    Args:
        folder: what `utils.export --to hf --merged` wrote.
        generation: length and sampling of the answers.
        table: codes that answers may contain; None for unconstrained answers.
        batch_size: prompts per batch.
        rules: coding rules that answers with a table follow; None for those of the guide.

    Raises:
        UserError: transformers is not installed, or the folder has another format.
    """

    def __init__(
        self,
        folder: Path,
        generation: Generation = DEFAULT_GENERATION,
        table: Cim10Table | None = None,
        batch_size: int = 16,
        rules: RuleSet | None = None,
    ) -> None:
        if not (folder / CONFIG_NAME).is_file():
            raise UserError(
                f"{folder} has no {CONFIG_NAME}; --engine transformers needs a model in Hugging Face's format: "
                "python -m utils.export RUN --to hf --merged --out DIR."
            )
        try:
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise UserError("--engine transformers needs the extra `transformers`.") from error
        self._device = choose_device(0)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        self._model = model.to(self._device).eval()
        self._codec = TokenCodec(load_instruct_tokenizer(folder, model.config.vocab_size), table, rules)
        self._generation = generation
        self._batch_size = batch_size

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Reply | SkippedRowError]]:
        """Answer prompts, those of similar length together; see `Engine`."""
        return self._codec.answer_batches(prompts, self._batch_size, self._answer)

    @torch.no_grad()
    def _answer(self, prompts: Sequence[Prompt], encoded: Sequence[list[int]]) -> list[Reply]:
        width = max(map(len, encoded))
        padded = torch.zeros(len(encoded), width, dtype=torch.long)  # [B, width], on the left
        mask = torch.zeros_like(padded)
        for row, ids in enumerate(encoded):
            padded[row, width - len(ids) :], mask[row, width - len(ids) :] = torch.tensor(ids), 1
        watch = _Watch(self._codec.constraints(len(prompts)), len(prompts), self._codec.eos_id)
        max_tokens, sampling = self._generation
        torch.manual_seed(seed_of(prompts[0], sampling))
        sampled = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        output = self._model.generate(
            padded.to(self._device),
            attention_mask=mask.to(self._device),
            max_new_tokens=max_tokens,
            eos_token_id=self._codec.eos_id,
            pad_token_id=self._codec.eos_id,
            do_sample=sampling.temperature > 0,
            logits_processor=[watch],
            **(sampled if sampling.temperature else {}),
        )
        watch.take(output)
        return self._codec.replies(watch.tokens, watch.log_probabilities, watch.constraints)


class _Watch:
    """Follows generation as a logits processor: constrains it, and records tokens and their probabilities."""

    def __init__(self, constraints: list[AnswerConstraint] | None, size: int, eos_id: int) -> None:
        self.constraints = constraints
        self.tokens: list[list[int]] = [[] for _ in range(size)]
        self.log_probabilities: list[list[float]] = [[] for _ in range(size)]
        self._eos_id = eos_id
        self._last: torch.Tensor | None = None  # [B, V] of the previous step

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Receive all ids so far [B, S] and the logits of the next token [B, V]; return those allowed."""
        self.take(ids)
        if self.constraints is not None:
            allowed = torch.full_like(scores, -torch.inf)
            for row, constraint in enumerate(self.constraints):
                columns = torch.as_tensor(constraint.allowed(), device=scores.device)
                allowed[row, columns] = scores[row, columns]
            scores = allowed
        self._last = scores.float().log_softmax(dim=-1)
        return scores

    def take(self, ids: torch.Tensor) -> None:
        """Record the last column of `ids` [B, S], the tokens that were chosen after the previous call."""
        if self._last is None:
            return
        for row, token in enumerate(ids[:, -1].tolist()):
            if self._eos_id in self.tokens[row][-1:]:  # ended; the rest is padding
                continue
            self.tokens[row].append(token)
            self.log_probabilities[row].append(float(self._last[row, token]))
            if self.constraints is not None:
                self.constraints[row].take(token)
