"""Checkpoints that inference tools load: the adapter, or the adapter merged into the base.

A checkpoint is written aside and renamed, so that it is whole or not there at all. Shards are gathered parameter by
parameter: no rank holds the full model.
"""

import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from torch.distributed.tensor import DTensor

from model.errors import UserError
from model.lora import lora_layers, merged_weight
from model.transformer import Transformer
from model.weights import SAFETENSORS_NAME, SafetensorsWriter

from .args import TrainArgs
from .distributed import World
from .wrapped_model import ADAPTER_NAME

logger = logging.getLogger("checkpointing")

BEST_NAME = "best"  # a link to the checkpoint that did best, with `keep_best`
_CHECKPOINT = re.compile(r"checkpoint_(\d{6,})")


class Checkpointer:
    """Saves a model into `run_dir/checkpoints/checkpoint_{step:06d}/consolidated`, on every rank.

    Tensors are saved in `dtype`, the one that computes; the tokenizer goes beside them.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: InstructTokenizerBase,
        args: TrainArgs,
        run_dir: Path,
        dtype: torch.dtype,
        world: World,
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self._model = model
        self._tokenizer = tokenizer
        self._args = args
        self._dtype = dtype
        self._world = world

    def save(self, step: int, best: bool = False) -> Path:
        """Saves on rank 0 while all ranks hand over their shards; removes checkpoints beyond `num_ckpt_keep`.

        Args:
            step: names the checkpoint.
            best: point `checkpoints/best` at it, which keeps it until a better one comes.

        Returns:
            The folder with the weights.

        Raises:
            UserError: the disk refused, on every rank; what was saved before is untouched.
        """
        final = self.folder / f"checkpoint_{step:06d}"
        tensors = self._gathered()
        failure = None
        if self._world.is_master:
            try:
                self._write(final, tensors)
                if best:
                    _link(self.folder / BEST_NAME, final)
                self._prune()
            except (OSError, UserError) as error:
                reason = str(error).removesuffix(".")
                failure = f"The checkpoint {final} could not be saved: {reason}. Earlier checkpoints are untouched."
        for _ in tensors:
            pass  # gathering takes all ranks: those that write nothing, and rank 0 for the rest after a failure
        self._world.fail_together(failure)
        logger.info("Saved %s", final / "consolidated")
        return final / "consolidated"

    def _write(self, final: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        aside = final.with_name(f"tmp.{final.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder = aside / "consolidated"
        folder.mkdir(parents=True)
        try:
            plan = {name: (tuple(parameter.shape), self._dtype) for name, parameter in self._saved_parameters()}
            with SafetensorsWriter(
                folder / (ADAPTER_NAME if self._args.save_adapters else SAFETENSORS_NAME), plan
            ) as file:
                for name, tensor in tensors:
                    file.write(name, tensor)
            (folder / "params.json").write_text(json.dumps(self._params(), indent=4), encoding="utf-8")
            shutil.copyfile(self._tokenizer.tokenizer.file_path, folder / tokenizer_file_name(self._tokenizer))
            shutil.rmtree(final, ignore_errors=True)
            os.replace(aside, final)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _saved_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        named = self._model.named_parameters()
        return [(name, parameter) for name, parameter in named if (".lora_" in name) == self._args.save_adapters]

    def _gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields what is saved, whole and in the saved dtype; every rank must go through all of it."""
        adapted = {} if self._args.save_adapters else dict(lora_layers(self._model))
        for name, parameter in self._saved_parameters():
            tensor = _whole(parameter)
            if layer := adapted.get(name.removesuffix(".weight")):
                lora_a, lora_b = _whole(layer.lora_A.weight), _whole(layer.lora_B.weight)
                tensor = merged_weight(tensor, lora_a, lora_b, layer.scaling)
            yield name, tensor.to(self._dtype)

    def _params(self) -> dict[str, object]:
        params = dataclasses.asdict(self._model.args)
        moe = params.pop("moe")
        lora = None
        if self._args.save_adapters:
            lora = {key: value for key, value in dataclasses.asdict(self._args.lora).items() if key != "from_adapter"}
            lora["base_model"] = self._args.model_id_or_path  # an adapter is of no use without it
        return params | {"lora": lora, "moe": moe}

    def _prune(self) -> None:
        if self._args.num_ckpt_keep is not None:
            best = (self.folder / BEST_NAME).resolve()
            for path in saved_checkpoints(self.folder)[: -self._args.num_ckpt_keep]:
                if path.resolve() != best:
                    shutil.rmtree(path)


def _link(link: Path, target: Path) -> None:
    """Points `link` at `target`, a neighbour; there is no moment without a link."""
    aside = link.with_name(f"tmp.{link.name}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target.name, target_is_directory=True)
    os.replace(aside, link)


def saved_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's `checkpoints` folder, oldest first."""
    found = [path for path in folder.glob("checkpoint_*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint_")))


def tokenizer_file_name(tokenizer: InstructTokenizerBase) -> str:
    """The name under which Mistral's tools look for a tokenizer: its version is part of it, or of a tekken.json."""
    if isinstance(tokenizer.tokenizer, Tekkenizer):
        return "tekken.json"
    return f"tokenizer.model.{tokenizer.tokenizer.version.value}"


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """The full tensor of a parameter that may be sharded; a collective operation where it is."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()
