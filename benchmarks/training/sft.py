"""The peer TRL: its SFTTrainer on the model of `peer`, with its own packing, loss, optimizer step and loop.

It gets whole samples, tokenized as for the others, and packs them itself (best fit, decreasing, without padding). Its
loss is its default, `chunked_nll`, which computes logits in chunks and only where there is a label. As for `peer`,
adapters have the dtype of the base and there is no autocast: the faster of the settings available to its users.
"""

import dataclasses
import itertools
import math
import os
import tempfile
import time
from typing import Any

import numpy as np
import torch

from benchmarks.measure import seconds_since_start
from finetune.args import TrainArgs
from finetune.data.data_loader import Batch
from model.args import ModelArgs
from model.errors import UserError

from .inputs import packed_batches
from .peer import IGNORED, peft_model
from .trial import Trial
from .work import Work, document_bounds, synchronize

_MORE_ROWS = 1.25  # than the steps need in our packing, so that in TRL's, which may be denser, none is repeated


def train_trl(args: TrainArgs, shapes: ModelArgs, device: torch.device, warmup: int) -> Trial:
    """Train a model with random weights.

    Raises:
        UserError: TRL is not installed, or does not support a setting.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise UserError('--impl trl needs TRL: run `pip install -e ".[peers]"`.') from error
    model, attention, dtype = peft_model(args, shapes, device)
    with tempfile.TemporaryDirectory() as folder:
        trainer, seen = _trainer(model, args, device, folder)
        clock = _clock(warmup, args.max_steps, device)
        trainer.add_callback(clock)
        trainer.train()
    work, first = Work(), warmup * args.num_microbatches
    work.add(*itertools.islice(map(as_batch, seen), first, args.max_steps * args.num_microbatches))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Trial(work, work.positions, clock.end - clock.start, clock.first_step, losses, attention, dtype)


def _trainer(model: torch.nn.Module, args: TrainArgs, device: torch.device, folder: str) -> tuple[Any, list[dict]]:
    """Return the trainer, and the list to which it appends the inputs of each micro-batch."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=folder,
        packing=True,
        loss_type="chunked_nll",
        max_length=args.seq_len,
        completion_only_loss=True,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.num_microbatches,
        max_steps=args.max_steps,
        gradient_checkpointing=args.checkpoint,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=args.optim.lr,
        weight_decay=args.optim.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=args.max_norm,
        bf16=False,
        use_cpu=device.type == "cpu",
        seed=args.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(whole_samples(args)), processing_class=_tokenizer()
    )
    trainer.remove_callback(PrinterCallback)
    collate, seen = trainer.data_collator, []

    def collated(examples: list[dict]) -> dict:
        seen.append(collate(examples))
        return dict(seen[-1])

    trainer.data_collator = collated
    return trainer, seen


def _clock(warmup: int, last: int, device: torch.device) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Reads the time where the timed steps begin and end, and after the first step."""

        def on_step_begin(self, arguments, state, control, **_):
            if state.global_step == warmup:
                synchronize(device)
                self.start = time.perf_counter()

        def on_step_end(self, arguments, state, control, **_):
            if state.global_step in (1, last):
                synchronize(device)
                self.end = time.perf_counter()
            if state.global_step == 1:
                self.first_step = seconds_since_start()

    return Clock()


def whole_samples(args: TrainArgs) -> list[dict[str, list[int]]]:
    """Return the samples of the training's first batches: their tokens, and which of them are trained."""
    data = dataclasses.replace(args.data, packing="best_fit")  # which keeps them whole
    batches = packed_batches(dataclasses.replace(args, data=data))
    count = math.ceil(_MORE_ROWS * args.max_steps * args.num_microbatches)
    samples = []
    for batch in itertools.islice(batches, count):
        mask = np.ones(len(batch.x), bool) if batch.y_mask is None else batch.y_mask
        for start, end in document_bounds(batch):
            if mask[start:end].any():  # padding has no trained position, samples have
                tokens = [*batch.x[start:end].tolist(), int(batch.y[end - 1])]
                samples.append({"input_ids": tokens, "completion_mask": [0, *map(int, mask[start:end])]})
    batches.close()
    return samples


def as_batch(inputs: dict[str, Any]) -> Batch:
    """Return what a micro-batch of TRL trains as one of ours: n - 1 positions for a sample of n tokens."""
    tokens, labels = inputs["input_ids"].flatten().numpy(), inputs["labels"].flatten().numpy()
    starts = np.flatnonzero(inputs["position_ids"].flatten().numpy() == 0)
    sizes = np.diff([*starts, len(tokens)])
    predicted = np.setdiff1d(np.arange(len(tokens)), starts)  # each token but the first of a sample
    return Batch(
        x=tokens[predicted - 1],
        y=tokens[predicted],
        sizes=(sizes - 1).tolist(),
        y_mask=labels[predicted] != IGNORED,
        rows=[""] * len(sizes),
    )


def _tokenizer() -> Any:
    """Return a tokenizer that SFTTrainer requires, and uses only for the id of padding."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    vocabulary = {token: number for number, token in enumerate(("<unk>", "<s>", "</s>"))}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<unk>")), **special)
