"""Evaluation: the loss on held-out rows, and generated answers to a sample of prompts."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from model.atomic import owner_only
from model.errors import UserError
from model.generate import collect_tokens, stream
from model.transformer import Transformer

from .args import EarlyStoppingArgs, GenerationArgs, TrainArgs
from .data.conversation import message_text, parse_conversation
from .data.data_loader import Batch, EvalLoader, build_data_loader
from .data.rows import read_rows
from .data.tokenize import SampleEncoder
from .distributed import World
from .loss import batch_loss
from .monitoring.metrics_logger import answers_log_message, eval_log_message, eval_metrics
from .preemption import StopRequest
from .utils import TrainState
from .wrapped_model import reshard

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

logger = logging.getLogger("train")

Scoring = Callable[[list[str], list[str]], dict[str, float]]  # (expected answers, generated answers) -> scores

AnyActive = Callable[[bool], bool]  # whether the flag is set on any rank

_PLACEHOLDER = Batch(x=np.zeros(1, dtype=np.int64), y=np.zeros(1, dtype=np.int64), sizes=[1])


class EvaluationInterruptedError(Exception):
    """A rank has been asked to stop; raised on every rank at the same batch or token."""


@contextlib.contextmanager
def _evaluation_mode(model: Transformer) -> Iterator[None]:
    """Switch to evaluation mode; afterwards, even if interrupted, make the model ready for training and saving."""
    model.eval()
    try:
        yield
    finally:
        reshard(model)
        model.train()


@torch.no_grad()
def evaluate(
    model: Transformer,
    batches: Iterable[Batch],
    world: World,
    by_tokens: bool = False,
    any_active: AnyActive | None = None,
    at_once: int = 1,
) -> float:
    """Return the mean over all ranks' batches of the batch loss, in nats per token; NaN if no rank has a batch.

    With `by_tokens` a batch is weighted by its trained tokens, which gives the mean over all tokens. `at_once` batches
    are computed together; the result is the same.

    A sharded model needs all ranks in every forward pass, so a rank without batches left computes a placeholder,
    which does not count. `any_active` replaces `world.any`; it may raise to interrupt the evaluation.
    """
    any_active = any_active or world.any
    total = torch.zeros(2, dtype=torch.float64)  # sum of losses; number of batches, or of tokens
    remaining = iter(batches)
    with _evaluation_mode(model):
        while True:
            group = list(itertools.islice(remaining, at_once))
            if not any_active(bool(group)):
                break
            batch, weight, count = _joined(group, by_tokens) if group else (_PLACEHOLDER, 0.0, 0.0)
            loss = batch_loss(model, batch, world.device).item()
            if group:
                total += torch.tensor([loss * weight, count], dtype=torch.float64)
    loss_sum, count = world.sum(total).tolist()
    return loss_sum / count if count else math.nan


def _joined(batches: list[Batch], by_tokens: bool) -> tuple[Batch, float, float]:
    """Join batches.

    Returns:
        The batch, the factor that turns its loss into the sum of all losses, and the number of losses: of batches,
        or of trained tokens with `by_tokens`.
    """
    if len(batches) == 1:
        weight = batches[0].loss_weight if by_tokens else 1.0
        return batches[0], weight, weight
    masks = [np.ones(len(batch.x), np.float32) if batch.y_mask is None else batch.y_mask for batch in batches]
    if not by_tokens:  # each batch counts the same, however many trained tokens it has
        masks = [mask / max(mask.sum(), 1e-30) for mask in masks]
    joined = Batch(
        x=np.concatenate([batch.x for batch in batches]),
        y=np.concatenate([batch.y for batch in batches]),
        sizes=[size for batch in batches for size in batch.sizes],
        y_mask=np.concatenate(masks),
    )
    return joined, joined.loss_weight, joined.loss_weight if by_tokens else len(batches)


def check_eval_batches(batches: Iterable[Batch], world: World) -> None:
    """Read every evaluation row once, so that an invalid one is reported before training, not at an evaluation.

    Raises:
        UserError, SystemExit: on every rank, if any rank has an invalid row, or none has a row to evaluate.
    """
    with world.synchronized_errors():
        count = sum(1 for _ in batches)
    if not world.any(count > 0):
        world.raise_on_all("`data.eval_instruct_data` has nothing to evaluate: no row has a trained token.")


class GenerationEval:
    """A fixed sample of prompts that the model answers during training.

    Args:
        args: which rows; the last message of each is the expected answer.
        encoder: the one used for training, so that prompts are identical.

    Raises:
        UserError: there are no rows, or a row does not end with an answer.
    """

    def __init__(self, args: GenerationArgs, encoder: SampleEncoder) -> None:
        self._args = args
        self._tokenizer = encoder.instruct_tokenizer.tokenizer
        self.expected: list[str] = []
        self._prompts: list[list[int]] = []
        for line, row in read_rows(Path(args.file), args.n_samples):
            conversation = parse_conversation(row)
            *question, answer = conversation.messages
            if not question or answer.role != "assistant" or answer.content is None:
                raise UserError(f"`eval_generation.file`: line {line} of {args.file} does not end with an answer.")
            self.expected.append(message_text(answer))
            self._prompts.append(encoder.encode_prompt(question, conversation.tools))
        if not self._prompts:
            raise UserError(f"`eval_generation.file`: {args.file} has no rows.")

    def generate_answers(
        self, model: Transformer, world: World, any_active: AnyActive | None = None
    ) -> tuple[list[str], float]:
        """Generate the answers, distributed over the ranks; `any_active` is as for `evaluate`.

        Returns:
            All answers and the share of them that end before the token limit, on every rank.
        """
        args, tokenizer = self._args, self._tokenizer
        with _evaluation_mode(model):
            steps = stream(
                model,
                self._prompts[world.rank :: world.size],
                args.max_tokens,
                tokenizer.eos_id,
                any_active=any_active or world.any,
                device=world.device,
                places=args.batch_size,
            )
            written = collect_tokens(steps)
        answers: list[list[int]] = [[]] * len(self._prompts)
        for rank, part in enumerate(world.gather(written)):
            answers[rank :: world.size] = part
        ended = sum(answer[-1] == tokenizer.eos_id for answer in answers) / len(answers)
        return [tokenizer.decode(answer).strip() for answer in answers], ended

    def save(self, answers: list[str], path: Path) -> None:
        """Write expected and generated answers as jsonl. A failed write is logged and does not end the run."""
        rows = (
            {"expected": expected, "answer": answer} for expected, answer in zip(self.expected, answers, strict=True)
        )
        try:
            path.parent.mkdir(exist_ok=True)
            with open(path, "w", encoding="utf-8", opener=owner_only) as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            logger.warning("%s cannot be written: %s.", path, error.strerror)


class Evaluator:
    """All evaluations of a run: the loss on its evaluation data, and generated answers.

    Args:
        args: of the run.
        tokenizer: of the model.
        score: computes metrics from expected and generated answers.
        world: every rank takes part.

    Raises:
        UserError, SystemExit: on every rank, if the data or the prompts cannot be used.
    """

    def __init__(self, args: TrainArgs, tokenizer: InstructTokenizerBase, score: Scoring, world: World) -> None:
        self._args = args
        self._score = score
        self._world = world
        self._batches: EvalLoader | None = None
        self._generation: GenerationEval | None = None
        if not args.no_eval:
            with world.synchronized_errors():
                self._batches = build_data_loader(
                    tokenizer, args.data, args.batch_size, args.seq_len, None, world.rank, world.size, is_eval=True
                )
            check_eval_batches(self._batches, world)
        if args.eval_generation.file:
            with world.synchronized_errors():
                self._generation = GenerationEval(args.eval_generation, SampleEncoder(tokenizer))

    def loss_due(self, state: TrainState) -> bool:
        """Return whether the evaluation loss is due after this step."""
        return self._batches is not None and state.due(self._args.eval_freq)

    def evaluate_if_due(self, model: Transformer, state: TrainState, stop: StopRequest) -> dict[str, float]:
        """Run and log the evaluations due after this step; answers are also generated before the first step.

        A request to stop, on any rank, interrupts them between two batches or tokens, or before the first. Their
        results are discarded and `state.evaluation_pending` is set, so that the resumed run evaluates this step.

        Returns:
            Their metrics; empty if none is due, or if they were interrupted.
        """

        def any_active(flag: bool) -> bool:
            if self._world.any(bool(stop)):
                raise EvaluationInterruptedError
            return self._world.any(flag)

        metrics: dict[str, float] = {}
        try:
            if self._batches is not None and state.step > 0 and self.loss_due(state):
                metrics = self._evaluate_loss(model, state, any_active)
            if self._generation and (state.step == 0 or state.due(self._args.eval_generation.freq)):
                metrics = {"step": state.step} | metrics | self._score_answers(model, state.step, any_active)
        except EvaluationInterruptedError:
            state.evaluation_pending = True
            return {}
        state.evaluation_pending = False
        return metrics

    def _evaluate_loss(self, model: Transformer, state: TrainState, any_active: AnyActive) -> dict[str, float]:
        assert self._batches is not None
        by_tokens = self._args.loss_normalization == "tokens"
        at_once = (self._args.eval_batch_size or self._args.batch_size) // self._args.batch_size
        eval_loss = evaluate(model, self._batches, self._world, by_tokens, any_active, at_once)
        state.eval_losses[state.step] = eval_loss
        # Missing only if a resumed run repeats an evaluation and `no_eval` was true when the step was trained.
        train_loss = math.nan if state.last_loss is None else state.last_loss
        metrics = eval_metrics(step=state.step, train_loss=train_loss, eval_loss=eval_loss)
        logger.info(eval_log_message(metrics))
        return metrics

    def _score_answers(self, model: Transformer, step: int, any_active: AnyActive) -> dict[str, float]:
        assert self._generation is not None
        answers, ended = self._generation.generate_answers(model, self._world, any_active)
        if self._args.eval_generation.keep_answers and self._world.is_master:
            self._generation.save(answers, Path(self._args.run_dir) / "answers" / f"step_{step:06d}.jsonl")
        scores = self._score(self._generation.expected, answers) | {"ended": ended}
        logger.info(answers_log_message(step, scores))
        return scores


class EarlyStopping:
    """Track the best value of one metric, and whether it has stopped improving."""

    def __init__(self, args: EarlyStoppingArgs) -> None:
        self._metric = args.metric
        self._patience = args.patience
        self._sign = -1.0 if args.metric == "eval_loss" else 1.0
        self._best: float | None = None
        self._worse_since = 0

    def update(self, metrics: dict[str, float]) -> bool:
        """Record an evaluation. Return whether it is the best so far."""
        value = metrics.get(self._metric)
        if value is None:
            return False
        if math.isfinite(value) and (self._best is None or self._sign * value > self._sign * self._best):
            self._best, self._worse_since = value, 0
            return True
        self._worse_since += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON-serializable state needed to resume."""
        return {"metric": self._metric, "best": self._best, "worse_since": self._worse_since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state`, unless it is of another metric."""
        if state["metric"] == self._metric:
            self._best, self._worse_since = state["best"], state["worse_since"]

    @property
    def should_stop(self) -> bool:
        """Whether the last `patience` evaluations brought no improvement; patience 0 disables early stopping."""
        return 0 < self._patience <= self._worse_since
