"""Checkpoints: weights for inference tools, and the state needed to resume training.

    checkpoints/checkpoint_000100/consolidated/   the adapter, or the adapter merged into the base model
                                  state/          see finetune.resume
                                  manifest.json   see finetune.manifest
                last, best                        symlinks

Checkpoints are written atomically. Sharded parameters are gathered one at a time, so that no rank holds the full model.
"""

import dataclasses
import json
import logging
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from model.atomic import remove_folder, remove_leftovers, replace_folder, replace_symlink, shared_temporary_path
from model.errors import UserError
from model.lora import lora_layers, merged_weight
from model.transformer import Transformer
from model.weights import SAFETENSORS_NAME, SafetensorsWriter

from .args import TrainArgs
from .distributed import World, full_tensor
from .manifest import find_corruption, write_manifest
from .resume import RUN_NAME, STATE_NAME, RunState, rank_name
from .run_dir import BEST_NAME, WEIGHTS_NAME, checkpoint_name, saved_checkpoints, step_of
from .state_files import RunRecord, read_state_file
from .wrapped_model import ADAPTER_NAME

logger = logging.getLogger("checkpointing")

LAST_NAME = "last"  # a symlink to the latest checkpoint

# A single process saves without a process group on purpose.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

_Export = Iterator[tuple[str, torch.Tensor]]


class Checkpointer:
    """Save a run to `run_dir/checkpoints`, on every rank, one checkpoint at a time.

    Saving is asynchronous: the adapter and the state are copied to host memory and written in the background. A merged
    model is too large for a second copy and is written before `save` returns. The tensors in `consolidated/` have the
    compute dtype `dtype`; the tokenizer is saved with them.
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
        self._owner = world.gather(secrets.token_hex(4))[0]  # of temporary names: no other run writes under them

    def recover(self, step: int) -> None:
        """Complete what a killed process left unfinished, and rename checkpoints after `step`, on rank 0.

        A checkpoint after the one that training resumes from is corrupt, or belongs to a run that was resumed from an
        earlier step. It is kept as `superseded_*`, which nothing resumes from.

        Raises:
            UserError: a file system error, on every rank.
        """
        with self._world.synchronized_errors():
            if self._world.is_master:
                self._recover(step)

    def _recover(self, step: int) -> None:
        try:
            self._complete_and_supersede(step)
        except OSError as error:
            raise UserError(f"The checkpoints in {self.folder} cannot be cleaned up: {error}.") from error

    def _complete_and_supersede(self, step: int) -> None:
        if not self.folder.is_dir():
            return
        remove_leftovers(self.folder)
        for later in (path for path in saved_checkpoints(self.folder) if step_of(path) > step):
            replace_folder(later, later.with_name(f"superseded_{later.name}"))
        if (latest := self.folder / checkpoint_name(step)).is_dir():
            self._link_and_prune(latest, read_state_file(latest / STATE_NAME / RUN_NAME, RunRecord)["best"])

    @property
    def has_failed(self) -> bool:
        """Whether the current save has failed on this rank, in which case `finish` will raise."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def save(self, step: int, state: RunState | None = None, best: bool = False) -> Path:
        """Start saving a checkpoint, on every rank.

        Args:
            step: step number, used as its name.
            state: the state needed to resume; None: save the weights only.
            best: point the symlink `checkpoints/best` at it, which protects it from pruning.

        Returns:
            The folder that will contain the weights.

        Raises:
            UserError: this save or the previous one failed, on every rank; earlier checkpoints are untouched.
        """
        self.finish()
        self._saving = final = self.folder / checkpoint_name(step)
        temporary = shared_temporary_path(final, self._owner)
        self._on_master(lambda: _start_folder(temporary, [WEIGHTS_NAME] + [STATE_NAME] * (state is not None)))
        export = self._gathered()
        if self._args.save_adapters:
            export = iter([(name, tensor.to("cpu", copy=True)) for name, tensor in export if self._world.is_master])
        else:
            self._on_all(lambda: self._write_merged(temporary, export))
        written = self._start_writing(state, temporary, best) if state is not None else None
        if self._world.is_master:
            self._pending = self._background.submit(self._complete, temporary, final, export, written, best)
        else:
            self._pending = written
        return final / WEIGHTS_NAME

    def finish(self) -> None:
        """Wait for the current save, if any; every rank must call this.

        Raises:
            UserError: the save failed, on every rank.
        """
        if self._saving is None:
            return
        pending, self._pending = self._pending, None
        self._on_all(lambda: pending.result() if pending else None)
        self._saving = None

    def _on_master(self, action: Callable[[], object]) -> None:
        self._on_all(lambda: action() if self._world.is_master else None)

    def _on_all(self, action: Callable[[], object]) -> None:
        """Run `action` on every rank; if it fails on one of them, raise its error on all."""
        from torch.distributed.checkpoint.api import CheckpointException

        failure = None
        try:
            action()
        except (OSError, UserError, CheckpointException) as error:
            reason = _reason(error).removesuffix(".")
            failure = f"The checkpoint {self._saving} could not be saved: {reason}. Earlier checkpoints are untouched."
            if self._world.is_master and self._saving is not None:
                shutil.rmtree(shared_temporary_path(self._saving, self._owner), ignore_errors=True)
        self._world.raise_on_all(failure)

    def _start_writing(self, state: RunState, checkpoint: Path, best: bool) -> Future:
        """Copy this rank's part of the state to host memory and start writing it in the background."""
        import torch.distributed.checkpoint as dcp  # slow to import
        from torch.distributed.checkpoint import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        folder = checkpoint / STATE_NAME
        run = state.of_run(self._args, self._world) | {"best": best}

        def write_numbers() -> None:
            (folder / rank_name(self._world.rank)).write_text(json.dumps(state.of_rank()), encoding="utf-8")
            if self._world.is_master:
                (folder / RUN_NAME).write_text(json.dumps(run, indent=1), encoding="utf-8")

        self._on_all(write_numbers)
        written = dcp.async_save(
            state.tensors(),
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
            process_group=self._world.background_group,
            async_stager=DefaultStager(StagingOptions(False, False, False, False)),  # copy before this returns
            no_dist=self._world.size == 1,
        )
        assert isinstance(written, Future), "a stager that copies at once returns one"
        return written

    def _complete(self, temporary: Path, final: Path, export: _Export, written: Future | None, best: bool) -> None:
        """On rank 0, in the background: wait for the state of all ranks, then rename the checkpoint."""
        try:
            if written is not None:
                written.result()
            if self._args.save_adapters:
                self._write_export(temporary, export)
            write_manifest(temporary)
            replace_folder(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if problem := find_corruption(final, hashes=False):
            raise UserError(f"verification failed ({problem})")
        self._link_and_prune(final, best)
        logger.info("Checkpoint saved: %s", final / WEIGHTS_NAME)

    def _write_merged(self, checkpoint: Path, export: _Export) -> None:
        try:
            if self._world.is_master:
                self._write_export(checkpoint, export)
        finally:
            for _ in export:
                pass  # gathering is collective: ranks that write nothing take part, and so does rank 0 after a failure

    def _write_export(self, checkpoint: Path, tensors: _Export) -> None:
        folder = checkpoint / WEIGHTS_NAME
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
        """Yield the saved tensors, unsharded and in the saved dtype; every rank must exhaust the iterator."""
        adapted = {} if self._args.save_adapters else dict(lora_layers(self._model))
        for name, parameter in self._saved_parameters():
            tensor = full_tensor(parameter.detach())
            if layer := adapted.get(name.removesuffix(".weight")):
                lora_a, lora_b = (full_tensor(adapter.weight.detach()) for adapter in (layer.lora_A, layer.lora_B))
                tensor = merged_weight(tensor, lora_a, lora_b, layer.scaling)
            yield name, tensor.to(self._dtype)

    def _params(self) -> dict[str, object]:
        params = {key: value for key, value in dataclasses.asdict(self._model.args).items() if value is not None}
        moe = params.pop("moe", None)
        lora = None
        if self._args.save_adapters:
            lora = {key: getattr(self._args.lora, key) for key in ("enable", "rank", "dropout", "scaling")}
            lora["base_model"] = self._args.model_id_or_path  # an adapter is useless without its base model
        return params | {"lora": lora, "moe": moe}

    def _link_and_prune(self, latest: Path, best: bool) -> None:
        _link(self.folder / LAST_NAME, latest)
        if best:
            _link(self.folder / BEST_NAME, latest)
        if self._args.num_ckpt_keep is not None:
            kept = (self.folder / BEST_NAME).resolve()
            for path in saved_checkpoints(self.folder)[: -self._args.num_ckpt_keep]:
                if path.resolve() != kept:
                    remove_folder(path)


def _start_folder(checkpoint: Path, parts: list[str]) -> None:
    shutil.rmtree(checkpoint, ignore_errors=True)
    for part in parts:
        (checkpoint / part).mkdir(parents=True)


def _reason(error: BaseException) -> str:
    """Return the error of one rank; torch.distributed.checkpoint wraps it in the tracebacks of all ranks."""
    from torch.distributed.checkpoint.api import CheckpointException

    if isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    return str(error)


def _link(link: Path, target: Path) -> None:
    try:
        replace_symlink(link, target.name)
    except OSError as error:  # some file systems have no symlinks
        logger.warning("Symlink %s could not be created (%s); the checkpoint itself is saved.", link, error.strerror)


def tokenizer_file_name(tokenizer: InstructTokenizerBase) -> str:
    """Return the file name that Mistral's tools expect: it contains the version, unless it is `tekken.json`."""
    if isinstance(tokenizer.tokenizer, Tekkenizer):
        return "tekken.json"
    return f"tokenizer.model.{tokenizer.tokenizer.version.value}"
