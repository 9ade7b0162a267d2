"""Evaluation: the loss on every rank's own rows, and answers to a sample of questions."""

import json
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

from model.errors import UserError
from model.generate import generate
from model.transformer import Transformer

from .args import EarlyStoppingArgs, GenerationArgs, TrainArgs
from .data.data_loader import Batch, build_data_loader
from .data.dataset import read_rows
from .data.tokenize import SampleEncoder, parse_conversation
from .distributed import World
from .loss import batch_loss
from .monitoring.metrics_logger import answers_log_message, eval_log_message, eval_metrics
from .utils import TrainState
from .wrapped_model import reshard

logger = logging.getLogger("train")

Scoring = Callable[[list[str], list[str]], dict[str, float]]

_PLACEHOLDER = Batch(x=np.zeros(1, dtype=np.int64), y=np.zeros(1, dtype=np.int64), sizes=[1])


@torch.no_grad()
def evaluate(model: Transformer, batches: Iterable[Batch], world: World, by_tokens: bool = False) -> float | None:
    """Mean over all ranks' batches of the batch's loss, in nats per token; None where no rank has a batch.

    With `by_tokens` a batch counts as much as its trained tokens do: the mean over all of them.

    A sharded model needs all ranks in every forward, so a rank whose rows are used up runs along on a token of its
    own, which does not count.
    """
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)  # sum of losses, number of batches (or of tokens)
    rows = iter(batches)
    while True:
        batch = next(rows, None)
        if not world.any(batch is not None):
            break
        loss = batch_loss(model, batch or _PLACEHOLDER, world.device)
        if batch is not None:
            weight = batch.loss_weight if by_tokens else 1
            total += torch.tensor([loss.item() * weight, weight], dtype=torch.float64)
    reshard(model)
    model.train()
    loss_sum, count = world.sum(total).tolist()
    return loss_sum / count if count else None


def check_eval_batches(batches: Iterable[Batch], world: World) -> None:
    """Reads every evaluation row once, so that a bad one is known before training and not at its first evaluation.

    Raises:
        UserError, SystemExit: on every rank, for a bad row on any, or none on all that could be evaluated.
    """
    count = world.run_everywhere(lambda: sum(1 for _ in batches))
    nothing = "`data.eval_instruct_data` holds nothing to evaluate: no row has a token that is trained."
    world.raise_on_all(None if world.any(count > 0) else nothing)


class GenerationEval:
    """A fixed sample of questions that a model answers now and then.

    Args:
        args: which questions; the last message of each row is the answer expected.
        encoder: that of training, so that prompts are the same.

    Raises:
        UserError: no rows, or a row that cannot be asked.
    """

    def __init__(self, args: GenerationArgs, encoder: SampleEncoder) -> None:
        self._args = args
        self._tokenizer = encoder.instruct_tokenizer.tokenizer
        self.expected: list[str] = []
        self._prompts: list[list[int]] = []
        for line, row in read_rows(Path(args.file), args.n_samples):
            conversation = parse_conversation(row)
            *question, answer = conversation.messages
            if not question or answer.role != "assistant" or not isinstance(answer.content, str):
                raise UserError(f"`eval_generation.file`: line {line} of {args.file} does not end with an answer.")
            self.expected.append(answer.content)
            self._prompts.append(encoder.encode_prompt(question, conversation.tools))
        if not self._prompts:
            raise UserError(f"`eval_generation.file`: {args.file} holds no rows.")

    def ask(self, model: Transformer, world: World) -> tuple[list[str], float]:
        """The answers, on every rank, and the share of them that came to an end; each rank writes its part."""
        args, tokenizer = self._args, self._tokenizer
        own = self._prompts[world.rank :: world.size]
        written: list[list[int]] = []
        for start in range(0, -(-len(self._prompts) // world.size), args.batch_size):
            batch = own[start : start + args.batch_size]
            # A rank without questions runs along: a sharded model needs all ranks in every forward.
            prompts = batch or [[tokenizer.bos_id]]
            outputs = generate(
                model, prompts, args.max_tokens, tokenizer.eos_id, any_active=world.any, device=world.device
            )
            written += outputs[: len(batch)]
        reshard(model)
        answers: list[list[int]] = [[]] * len(self._prompts)
        for rank, part in enumerate(world.gather(written)):
            answers[rank :: world.size] = part
        ended = sum(answer[-1] == tokenizer.eos_id for answer in answers) / len(answers)
        return [tokenizer.decode(answer).strip() for answer in answers], ended

    def save(self, answers: list[str], path: Path) -> None:
        """Writes expected and given answers, a jsonl row each; a disk that refuses them does not end the run."""
        rows = (
            {"expected": expected, "answer": answer} for expected, answer in zip(self.expected, answers, strict=True)
        )
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        except OSError as error:
            logger.warning("%s cannot be written: %s.", path, error.strerror)


class Evaluator:
    """All evaluations of a run: the loss on its evaluation data, and answers to a sample of questions.

    Args:
        args: of the run.
        tokenizer: of the model.
        score: what is measured of (expected answers, given answers).
        world: every rank takes part.

    Raises:
        UserError, SystemExit: on every rank, for data or questions that cannot be used.
    """

    def __init__(self, args: TrainArgs, tokenizer: InstructTokenizerBase, score: Scoring, world: World) -> None:
        self._args = args
        self._score = score
        self._world = world
        self._batches, self._questionnaire = None, None
        if not args.no_eval:
            loader = (tokenizer, args.data, args.batch_size, args.seq_len, None, world.rank, world.size)
            self._batches = world.run_everywhere(lambda: build_data_loader(*loader, is_eval=True))
            check_eval_batches(self._batches, world)
        if args.eval_generation.file:
            encoder = SampleEncoder(tokenizer)
            self._questionnaire = world.run_everywhere(lambda: GenerationEval(args.eval_generation, encoder))

    def loss_due(self, state: TrainState) -> bool:
        """Whether the loss on the evaluation data is due."""
        return self._batches is not None and state.due(self._args.eval_freq)

    def examine(self, model: Transformer, state: TrainState) -> dict[str, float]:
        """What is due at this step, logged; empty where nothing is. Questions are also asked before the first step."""
        metrics: dict[str, float] = {}
        if state.step > 0 and self.loss_due(state):
            by_tokens = self._args.loss_normalization == "tokens"
            state.eval_losses[state.step] = evaluate(model, self._batches, self._world, by_tokens)
            metrics = eval_metrics(step=state.step, train_loss=state.last_loss, eval_loss=state.eval_losses[state.step])
            logger.info(eval_log_message(metrics))
        if self._questionnaire and (state.step == 0 or state.due(self._args.eval_generation.freq)):
            answers, ended = self._questionnaire.ask(model, self._world)
            if self._args.eval_generation.keep_answers and self._world.is_master:
                self._questionnaire.save(answers, Path(self._args.run_dir) / "answers" / f"step_{state.step:06d}.jsonl")
            scores = self._score(self._questionnaire.expected, answers) | {"ended": ended}
            logger.info(answers_log_message(state.step, scores))
            metrics = {"step": state.step} | metrics | scores
        return metrics


class EarlyStopping:
    """Watches one metric over the evaluations of a run."""

    def __init__(self, args: EarlyStoppingArgs) -> None:
        self._metric = args.metric
        self._patience = args.patience
        self._sign = -1.0 if args.metric == "eval_loss" else 1.0
        self._best: float | None = None
        self._worse_since = 0

    def improved(self, metrics: dict[str, float]) -> bool:
        """Takes note of an evaluation and says whether it is the best so far."""
        value = metrics.get(self._metric)
        if value is None:
            return False
        if math.isfinite(value) and (self._best is None or self._sign * value > self._sign * self._best):
            self._best, self._worse_since = value, 0
            return True
        self._worse_since += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a continued run takes over."""
        return {"metric": self._metric, "best": self._best, "worse_since": self._worse_since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`, unless another metric is watched now."""
        if state["metric"] == self._metric:
            self._best, self._worse_since = state["best"], state["worse_since"]

    @property
    def should_stop(self) -> bool:
        return 0 < self._patience <= self._worse_since
