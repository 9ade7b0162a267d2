"""Checkpoints: weights that inference tools load, and beside them what is needed to go on training.

    checkpoints/checkpoint_000100/consolidated/   the adapter, or the adapter merged into the base
                                  state/          see finetune.resume
                                  manifest.json   see finetune.manifest
                last, best                        links

A checkpoint is written aside and renamed, so that it is whole or not there at all. What is exported is gathered
parameter by parameter: no rank holds the full model.
"""

import dataclasses
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from model.errors import UserError
from model.lora import lora_layers, merged_weight
from model.transformer import Transformer
from model.weights import SAFETENSORS_NAME, SafetensorsWriter

from .args import TrainArgs
from .distributed import World
from .manifest import damage, seal, sync_folder
from .resume import RUN_NAME, STATE_NAME, RunState, rank_name
from .run_dir import BEST_NAME, WEIGHTS_NAME, checkpoint_name, saved_checkpoints, step_of
from .wrapped_model import ADAPTER_NAME

logger = logging.getLogger("checkpointing")

LAST_NAME = "last"  # a link to the newest one
_IN_MAIN_THREAD = StagingOptions(False, False, False, False)  # copies to host memory are made before a save returns

# One process needs no process group, and knows it.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

_Export = Iterator[tuple[str, torch.Tensor]]


class Checkpointer:
    """Saves a run into `run_dir/checkpoints`, on every rank; one save at a time.

    The steps that follow a save do not wait for the disk: the adapter and the state are copied to host memory and
    written in the background. A merged model, too large to be held twice, is written before `save` returns. Tensors
    of `consolidated` are saved in `dtype`, the one that computes; the tokenizer goes beside them.
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
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None
        self._saving: Path | None = None

    def settle(self, step: int) -> None:
        """Finishes what a process that died left half done, and sets aside what lies ahead of `step`, on rank 0.

        What lies ahead is damaged, or was saved by a run that went on from here before: kept, under another name, it
        is neither continued nor in the way.

        Raises:
            UserError: the disk refuses it, on every rank.
        """
        self._world.run_everywhere(lambda: self._settle(step) if self._world.is_master else None)

    def _settle(self, step: int) -> None:
        try:
            self._finish_half_done(step)
        except OSError as error:
            raise UserError(f"The checkpoints in {self.folder} cannot be put in order: {error}.") from error

    def _finish_half_done(self, step: int) -> None:
        if not self.folder.is_dir():
            return
        for left in self.folder.glob("tmp.*"):
            left.unlink() if left.is_symlink() else shutil.rmtree(left, ignore_errors=True)
        for ahead in (path for path in saved_checkpoints(self.folder) if step_of(path) > step):
            _remove(superseded := ahead.with_name(f"superseded_{ahead.name}"))
            os.replace(ahead, superseded)
        if (newest := self.folder / checkpoint_name(step)).is_dir():
            run = json.loads((newest / STATE_NAME / RUN_NAME).read_text(encoding="utf-8"))
            self._link_and_prune(newest, run["best"])

    @property
    def has_failed(self) -> bool:
        """Whether the save under way has failed on this rank, so that `finish` will raise."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def save(self, step: int, state: RunState | None = None, best: bool = False) -> Path:
        """Starts saving, on every rank.

        Args:
            step: names the checkpoint.
            state: what a continued run needs; None: weights alone.
            best: point `checkpoints/best` at it, which keeps it until a better one comes.

        Returns:
            The folder that will hold the weights.

        Raises:
            UserError: the disk refused this save or the one before, on every rank; what was saved before is untouched.
        """
        self.finish()
        self._saving = final = self.folder / checkpoint_name(step)
        aside = final.with_name(f"tmp.{final.name}")
        self._on_master(lambda: _start_folder(aside, [WEIGHTS_NAME] + [STATE_NAME] * (state is not None)))
        export = self._gathered()
        if self._args.save_adapters:
            export = iter([(name, tensor.to("cpu", copy=True)) for name, tensor in export if self._world.is_master])
        else:
            self._together(lambda: self._write_merged(aside, export))
        written = self._start_writing(state, aside, best) if state is not None else None
        if self._world.is_master:
            self._pending = self._background.submit(self._complete, aside, final, export, written, best)
        else:
            self._pending = written
        return final / WEIGHTS_NAME

    def finish(self) -> None:
        """Waits for the save that is under way; every rank must call it.

        Raises:
            UserError: it failed, on every rank.
        """
        if self._saving is None:
            return
        pending, self._pending = self._pending, None
        self._together(lambda: pending.result() if pending else None)
        self._saving = None

    def _on_master(self, action: Callable[[], object]) -> None:
        self._together(lambda: action() if self._world.is_master else None)

    def _together(self, action: Callable[[], object]) -> None:
        """Does something on every rank; where the disk refuses one of them, all end with the reason."""
        failure = None
        try:
            action()
        except (OSError, UserError, CheckpointException) as error:
            reason = _reason(error).removesuffix(".")
            failure = f"The checkpoint {self._saving} could not be saved: {reason}. Earlier checkpoints are untouched."
            if self._world.is_master and self._saving is not None:
                shutil.rmtree(self._saving.with_name(f"tmp.{self._saving.name}"), ignore_errors=True)
        self._world.raise_on_all(failure)

    def _start_writing(self, state: RunState, aside: Path, best: bool) -> Future:
        """Copies this rank's part of the state and has it written in the background."""
        folder = aside / STATE_NAME
        run = state.of_run(self._args, self._world) | {"best": best}

        def write_numbers() -> None:
            (folder / rank_name(self._world.rank)).write_text(json.dumps(state.of_rank()), encoding="utf-8")
            if self._world.is_master:
                (folder / RUN_NAME).write_text(json.dumps(run, indent=1), encoding="utf-8")

        self._together(write_numbers)
        return dcp.async_save(
            state.tensors(),
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
            process_group=self._world.background_group,
            async_stager=DefaultStager(_IN_MAIN_THREAD),
            no_dist=self._world.size == 1,
        )

    def _complete(self, aside: Path, final: Path, export: _Export, written: Future | None, best: bool) -> None:
        """On rank 0, in the background: waits for all ranks' state, then makes the checkpoint visible at once."""
        try:
            if written is not None:
                written.result()
            if self._args.save_adapters:
                self._write_export(aside, export)
            seal(aside)
            _remove(final)
            os.replace(aside, final)
            sync_folder(self.folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        if fault := damage(final, hashes=False):
            raise UserError(f"it is not whole on the disk ({fault})")
        self._link_and_prune(final, best)
        logger.info("Saved %s", final / WEIGHTS_NAME)

    def _write_merged(self, aside: Path, export: _Export) -> None:
        try:
            if self._world.is_master:
                self._write_export(aside, export)
        finally:
            for _ in export:
                pass  # gathering takes all ranks: those that write nothing, and rank 0 for the rest after a failure

    def _write_export(self, aside: Path, tensors: _Export) -> None:
        folder = aside / WEIGHTS_NAME
        plan = {name: (tuple(parameter.shape), self._dtype) for name, parameter in self._saved_parameters()}
        with SafetensorsWriter(folder / (ADAPTER_NAME if self._args.save_adapters else SAFETENSORS_NAME), plan) as file:
            for name, tensor in tensors:
                file.write(name, tensor)
        (folder / "params.json").write_text(json.dumps(self._params(), indent=4), encoding="utf-8")
        shutil.copyfile(self._tokenizer.tokenizer.file_path, folder / tokenizer_file_name(self._tokenizer))

    def _saved_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        named = self._model.named_parameters()
        return [(name, parameter) for name, parameter in named if (".lora_" in name) == self._args.save_adapters]

    def _gathered(self) -> _Export:
        """Yields what is saved, whole and in the saved dtype; every rank must go through all of it."""
        adapted = {} if self._args.save_adapters else dict(lora_layers(self._model))
        for name, parameter in self._saved_parameters():
            tensor = _whole(parameter)
            if layer := adapted.get(name.removesuffix(".weight")):
                lora_a, lora_b = _whole(layer.lora_A.weight), _whole(layer.lora_B.weight)
                tensor = merged_weight(tensor, lora_a, lora_b, layer.scaling)
            yield name, tensor.to(self._dtype)

    def _params(self) -> dict[str, object]:
        params = {key: value for key, value in dataclasses.asdict(self._model.args).items() if value is not None}
        moe = params.pop("moe", None)
        lora = None
        if self._args.save_adapters:
            lora = {key: getattr(self._args.lora, key) for key in ("enable", "rank", "dropout", "scaling")}
            lora["base_model"] = self._args.model_id_or_path  # an adapter is of no use without it
        return params | {"lora": lora, "moe": moe}

    def _link_and_prune(self, newest: Path, best: bool) -> None:
        _link(self.folder / LAST_NAME, newest)
        if best:
            _link(self.folder / BEST_NAME, newest)
        if self._args.num_ckpt_keep is not None:
            kept = (self.folder / BEST_NAME).resolve()
            for path in saved_checkpoints(self.folder)[: -self._args.num_ckpt_keep]:
                if path.resolve() != kept:
                    _remove(path)


def _start_folder(aside: Path, parts: list[str]) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    for part in parts:
        (aside / part).mkdir(parents=True)


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint that may or may not be there; at no moment is half of one to be seen."""
    if checkpoint.exists():
        hidden = checkpoint.with_name(f"tmp.old_{checkpoint.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(checkpoint, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """What one of the ranks met; torch.distributed.checkpoint wraps it in the tracebacks of all."""
    if isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    return str(error)


def _link(link: Path, target: Path) -> None:
    """Points `link` at `target`, a neighbour; there is no moment without a link. Some file systems have none."""
    aside = link.with_name(f"tmp.{link.name}")
    try:
        aside.unlink(missing_ok=True)
        aside.symlink_to(target.name, target_is_directory=True)
        os.replace(aside, link)
    except OSError as error:
        logger.warning("No link %s could be made (%s); the checkpoint itself is saved.", link, error.strerror)


def tokenizer_file_name(tokenizer: InstructTokenizerBase) -> str:
    """The name under which Mistral's tools look for a tokenizer: its version is part of it, or of a tekken.json."""
    if isinstance(tokenizer.tokenizer, Tekkenizer):
        return "tekken.json"
    return f"tokenizer.model.{tokenizer.tokenizer.version.value}"


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """The full tensor of a parameter that may be sharded; a collective operation where it is."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()
