"""The memory that training needs on one process, by arithmetic: no weights are loaded and nothing is run.

The parts are those alive at the peak, which is either after the forward pass, with a chunk of logits in the loss, or in
the backward pass of one of the last two blocks, with what that block recomputes. The tensors that autograd keeps are
those of model/fused_lora.py, whose layers keep no input that can be computed from another kept tensor. Where it is not
used (`lora.enable: false`, adapters with dropout), layers keep their inputs and the estimate is approximate.

T is the number of positions of a micro-batch, N the number of those that are trained, and e the size of an element of
the computation dtype in bytes.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch

from model.args import BaseDtype, LoraArgs, ModelArgs
from model.errors import UserError
from model.lora import add_lora, quantize_linears
from model.transformer import Transformer

from .args import CheckpointMode, OptimArgs, TrainArgs
from .loss import rows_per_chunk
from .mixed_precision import head_dtype
from .optim import optimizer_bytes

CHECKPOINTS: tuple[CheckpointMode, ...] = (False, "selective", True)  # fastest first, least memory last
RESERVE = 0.1  # fraction of the free memory left unused, for what the estimate misses and for fragmentation
_PARTS = ("frozen", "trained", "gradients", "moments", "unsharded", "activations", "transient", "overhead", "total")
SAME: BaseDtype = "same"  # frozen weights have the computation dtype
_FP32 = 4
_ROUTING = 40  # bytes per token and expert: sorted and unsorted indices, weight of the expert
# With FSDP2, in the backward pass: the current block, and the next one whose parameters are being gathered.
_UNSHARDED_BLOCKS = 2
_KERNELS_ON_GPU = 64 << 20  # workspaces of cuBLAS and attention kernels
# On a CPU: memory of libraries and rows, and fragmentation by glibc's malloc as a fraction of temporary tensors. Fitted
# to the peak resident memory of processes (benchmarks/plan.py).
_LIBRARIES_ON_CPU, _GAPS_ON_CPU = 100e6, 0.38


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one process at the peak."""

    frozen: float  # frozen weights
    trained: float  # trained weights, fp32
    gradients: float
    moments: float  # optimizer state
    unsharded: float  # blocks and embeddings gathered temporarily, if weights are sharded or in host memory
    activations: float  # kept for the backward pass
    transient: float  # at most, in addition: of a block's backward pass, or of the loss
    overhead: float  # libraries and allocator
    loss: float  # of the loss; part of `transient`

    @property
    def total(self) -> float:
        """Peak memory."""
        return sum(dataclasses.astuple(self)) - self.loss

    @property
    def permanent(self) -> float:
        """Weights, gradients and optimizer, which no other sequence length makes smaller."""
        return self.frozen + self.trained + self.gradients + self.moments


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Everything that the memory of one process depends on."""

    model: ModelArgs
    lora: LoraArgs
    seq_len: int
    batch_size: int = 1
    checkpoint: CheckpointMode = True  # not auto
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"  # or cpu
    attention: str = "varlen"
    base_dtype: BaseDtype = SAME  # format of the blocks' frozen linear layers
    optim: OptimArgs = dataclasses.field(default_factory=OptimArgs)
    shards: int = 1  # processes that share one copy of the model
    cpu_offload: bool = False
    trained_share: float = 1.0  # N / T; the actual value is not known before the data is read

    @classmethod
    def of(
        cls,
        args: TrainArgs,
        model: ModelArgs,
        dtype: torch.dtype,
        device: str,
        attention: str,
        shards: int,
        trained_share: float = 1.0,
    ) -> "MemoryConfig":
        """Return the configuration of a training YAML, in which `checkpoint` is not auto."""
        return cls(
            model=model,
            lora=args.lora,
            seq_len=args.seq_len,
            batch_size=args.batch_size,
            checkpoint=args.checkpoint,
            dtype=dtype,
            device=device,
            attention=attention,
            base_dtype=args.base_dtype,
            optim=args.optim,
            shards=shards,
            cpu_offload=args.cpu_offload,
            trained_share=trained_share,
        )

    @property
    def is_approximate(self) -> bool:
        """Whether model/fused_lora.py is not used, so that layers keep their inputs."""
        return not self.lora.enable or self.lora.dropout > 0

    def memory(self) -> Memory:
        """Return the memory at the peak."""
        block, root = self._parameters
        trained, frozen = (
            self._sum(lambda parameter: parameter.held(self.shards), trains=trains) for trains in (True, False)
        )
        gradients, moments = trained, self.optimizer_bytes(self.shards)
        if self.device != "cpu" and self.optim.name.startswith("paged_"):  # moves to the host as far as needed
            moments = 0
        if self.cpu_offload and self.device != "cpu":  # a CPU's memory is the host's
            frozen = trained = gradients = moments = 0
        activations, loss, peak = self._passes()
        gathered = _UNSHARDED_BLOCKS * self._whole(block) + self._whole(root)
        return Memory(
            frozen=frozen,
            trained=trained,
            gradients=gradients,
            moments=moments,
            unsharded=gathered if self._is_sharded else 0,
            activations=activations,
            transient=peak - activations,
            overhead=_LIBRARIES_ON_CPU + _GAPS_ON_CPU * peak if self.device == "cpu" else _KERNELS_ON_GPU,
            loss=loss,
        )

    def with_seq_len(self, seq_len: int) -> "MemoryConfig":
        """Return the same configuration for another sequence length, without listing the parameters again."""
        other = dataclasses.replace(self, seq_len=seq_len)
        object.__setattr__(other, "_parameters", self._parameters)
        return other

    def resolved_checkpoint(self, usable_bytes: float) -> CheckpointMode:
        """Return `checkpoint`; for "auto" the fastest mode that fits in `usable_bytes`, or True if none does."""
        if self.checkpoint != "auto":
            return self.checkpoint
        modes = (
            mode for mode in CHECKPOINTS if dataclasses.replace(self, checkpoint=mode).memory().total <= usable_bytes
        )
        return next(modes, True)

    def trained_and_frozen(self) -> tuple[int, int]:
        """Return the numbers of trained and frozen parameters of the whole model, whatever their format."""
        plain = dataclasses.replace(self, base_dtype=SAME)
        trained, frozen = (plain._sum(lambda parameter: parameter.count, trains=trains) for trains in (True, False))
        return int(trained), int(frozen)

    def weight_bytes(self) -> float:
        """Return the bytes of the whole model for inference, in which trained parameters are not fp32."""
        trained, _ = self.trained_and_frozen()
        return self._sum(lambda parameter: parameter.held(1), trains=False) + trained * self.dtype.itemsize

    def optimizer_bytes(self, shards: int) -> float:
        """Return the bytes of the optimizer's state on the process with the largest of `shards` shards."""
        return self._sum(
            lambda parameter: optimizer_bytes(self.optim, parameter.sharded_rows(shards), parameter.columns),
            trains=True,
        )

    # --- Parameters

    @property
    def _is_sharded(self) -> bool:
        return self.shards > 1 or self.cpu_offload

    @cached_property
    def _parameters(self) -> tuple[list["_Parameter"], list["_Parameter"]]:
        """The parameters of one block, which are the same for all blocks, and those outside of blocks."""
        with torch.device("meta"):
            model = Transformer(dataclasses.replace(self.model, n_layers=1))
        if self.lora.enable:
            add_lora(model, self.lora)
        if self.base_dtype != SAME:
            quantize_linears(model, self.base_dtype)
        block: list[_Parameter] = []
        root: list[_Parameter] = []
        for name, parameter in model.named_parameters():
            trains, is_quantized = parameter.requires_grad, parameter.dtype == torch.uint8
            width = _FP32 if trains else 1 if is_quantized else self.dtype.itemsize
            in_block = name.startswith("layers.")
            part = name.split(".")[2] if in_block else ""
            found = _Parameter(part, len(parameter), parameter.numel(), trains, width)
            (block if in_block else root).append(found)
        return block, root

    def _sum(self, size: Callable[["_Parameter"], float], *, trains: bool) -> float:
        """Sum the sizes of the trained or frozen parameters of the model."""
        block, root = (sum(size(p) for p in parameters if p.trains is trains) for parameters in self._parameters)
        return block * self.model.n_layers + root

    def _whole(self, parameters: Iterable["_Parameter"]) -> float:
        """Bytes of gathered parameters; the trained ones are in the computation dtype."""
        return sum(p.count * (self.dtype.itemsize if p.trains else p.width) for p in parameters)

    def _working_copies(self, part: str) -> float:
        """Bytes of kept copies of a part's fp32 parameters in the computation dtype; FSDP2 creates and frees them."""
        if self.dtype.itemsize == _FP32 or self._is_sharded:
            return 0
        trained = (parameter for parameter in self._parameters[0] if parameter.trains and parameter.part == part)
        return self.dtype.itemsize * sum(parameter.count for parameter in trained)

    # --- Activations

    @property
    def _positions(self) -> tuple[int, int]:
        """(T, N)."""
        positions = self.seq_len * self.batch_size
        return positions, math.ceil(positions * self.trained_share)

    def _passes(self) -> tuple[float, float, float]:
        """Bytes kept after the forward pass, bytes of the loss in addition, and the peak of both passes."""
        (positions, trained), layers = self._positions, self.model.n_layers
        head, loss = self._head(), self._loss()
        outside = (4 * self.model.head_dim + 16) * positions + head  # rotary phases, tokens, targets
        earlier, last = self._kept(positions), self._kept(trained, is_last=True)
        # The input of the last norm, and the gradient of its output, which the loss computes in the forward pass.
        hidden = trained * self.model.dim * (_FP32 + self.dtype.itemsize)
        kept = outside + (layers - 1) * earlier + last + hidden
        peak = max(kept + loss, outside + (layers - 1) * earlier + self._block_at_most(trained, True))
        if layers > 1:
            peak = max(peak, outside + (layers - 2) * earlier + self._block_at_most(positions, False))
        return kept, loss, peak

    def _kept(self, rows: int, is_last: bool = False) -> float:
        """Bytes that a block keeps for its backward pass, if `rows` of its positions continue after attention."""
        positions, _ = self._positions
        if self.checkpoint is True:
            return positions * self.model.dim * self.dtype.itemsize
        kept = self._attention(rows, is_last) + self._working_copies("attention")
        if self.checkpoint == "selective":
            return kept
        return kept + rows * self._feed_forward + self._working_copies("feed_forward")

    def _attention(self, rows: int, is_last: bool) -> float:
        """Bytes kept by attention and the residual stream before and after it."""
        model, e, (positions, _) = self.model, self.dtype.itemsize, self._positions
        queries, keys = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
        by_document = self.attention in ("sdpa", "cudnn")
        repeats = self.attention == "xformers" or (by_document and self.device != "cpu")
        stored_keys = queries if repeats else keys
        per_position: float = e * (model.dim + self._low("wq", "wk", "wv") + 2 * queries + 2 * stored_keys)
        per_position += _FP32 * model.n_heads  # log-sum-exp
        per_row: float = e * (self._low("wo") + model.dim)
        if is_last or by_document:  # a copy: of the trained rows, or of all documents in one tensor
            per_row += e * queries
        if self.is_approximate:
            per_position += self._norm_keeps + self._dropped("wq", "wk", "wv", width=model.dim)
            per_row += self._dropped("wo", width=queries)
        return per_position * positions + per_row * rows

    @property
    def _feed_forward(self) -> float:
        """Bytes kept by a feed-forward network per row, without its input."""
        model, e = self.model, self.dtype.itemsize
        per_expert: float = e * (2 * model.hidden_dim + self._low("w1", "w3") + self._low("w2"))
        if self.is_approximate:
            per_expert += e * 2 * model.hidden_dim  # silu(gate) and its product with up
            per_expert += self._dropped("w1", "w3", width=model.dim) + self._dropped("w2", width=model.hidden_dim)
        if model.moe is None:
            return per_expert + (self._norm_keeps if self.is_approximate else 0)
        # Per expert: its input, its output, and its weighted output.
        routed = per_expert + 3 * e * model.dim + _ROUTING
        return model.moe.num_experts_per_tok * routed + self._norm_keeps

    def _low(self, *layers: str) -> int:
        """Total width of the outputs of the layers' A."""
        return self.lora.rank * len({*layers} & {*self.lora.targets}) if self.lora.enable else 0

    @property
    def _norm_keeps(self) -> float:
        """Bytes per row that autograd adds for a norm: its output, and its input in fp32 instead of the input."""
        return self.model.dim * (_FP32 + (0 if self.lora.enable else self.dtype.itemsize))

    def _dropped(self, *layers: str, width: int) -> float:
        """Bytes per row of the inputs of A after dropout, with masks."""
        adapted = len({*layers} & {*self.lora.targets}) if self.lora.enable and self.lora.dropout else 0
        e = self.dtype.itemsize
        return adapted * width * (e + (e if self.device == "cpu" else 1))

    # --- Temporary tensors

    def _block_at_most(self, rows: int, is_last: bool) -> float:
        """Peak bytes of a block in its backward pass, including what it keeps."""
        model, e, (positions, _) = self.model, self.dtype.itemsize, self._positions
        attention = self._attention(rows, is_last) + self._working_copies("attention")
        queries, keys = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
        # The gradient of a norm: that of its output, and four tensors in fp32 (three if its input is one).
        norm = model.dim * (2 * e + (16 if e < _FP32 else 12))
        feed_forward = attention + rows * (self._feed_forward + self._feed_forward_gradients)
        feed_forward += self._working_copies("feed_forward")
        # While a weight is dequantized, its product's result is there, but not yet the gradients of gate and up.
        active = model.moe.num_experts_per_tok / model.moe.num_experts if model.moe else 1
        product = feed_forward - rows * active * 2 * model.hidden_dim * e + self._dequantized
        ffn_norm = attention + rows * (norm + 2 * model.hidden_dim * e * (model.moe is None))
        # FlashAttention accumulates the queries' gradient in fp32 and computes those of keys and values per query head.
        engine = queries * (4 * e + _FP32) if self.device != "cpu" else e * (3 * queries + 4 * keys)
        attention_norm = norm + e * (model.dim + self._low("wq", "wk", "wv") + queries + 2 * keys)
        return max(feed_forward, product, ffn_norm, attention + positions * engine, positions * attention_norm)

    @property
    def _feed_forward_gradients(self) -> float:
        """Bytes per row of the gradients of SwiGLU's product, of `up`, of `gate` and of the output."""
        model, e = self.model, self.dtype.itemsize
        inner = 3 * model.hidden_dim * e
        if model.moe is None:
            return inner + 2 * model.dim * e
        # One expert after the other.
        return model.moe.num_experts_per_tok * (inner / model.moe.num_experts + 2 * model.dim * e)

    @property
    def _dequantized(self) -> float:
        """Bytes of a block's largest weight, dequantized."""
        if self.base_dtype == SAME:
            return 0
        model, e = self.model, self.dtype.itemsize
        largest = model.dim * max(model.hidden_dim, model.n_heads * model.head_dim)
        return (2 * e if self.base_dtype == "fp8" else e) * largest  # NF4 in bitsandbytes' kernel

    def _head(self) -> float:
        """Bytes kept by the head if its weight or an adapter trains: a gradient of the weight's size."""
        model, e = self.model, self.dtype.itemsize
        if not self.lora.enable:
            return _FP32 * model.vocab_size * model.dim
        if "output" in self.lora.targets:
            return 2 * e * model.vocab_size * (model.dim + self.lora.rank)  # including the weight and B in one tensor
        return 0

    def _loss(self) -> float:
        """Bytes of finetune/loss.py, in addition to what is kept."""
        model, e, (_, trained) = self.model, self.dtype.itemsize, self._positions
        hidden, weight = trained * model.dim, model.vocab_size * model.dim
        at_once = rows_per_chunk(model.vocab_size, self.device)
        widens = head_dtype(self.dtype, self.device) != self.dtype  # computes in fp32
        narrow = 0 if e == _FP32 or widens else e  # logits before the cast to fp32, and their gradient
        # Logits and probabilities of a chunk, which are alive until those of the next one are computed.
        per_logit = 2 * _FP32 + narrow if trained <= at_once else 3 * _FP32 + 2 * narrow
        needed: float = per_logit * min(at_once, trained) * model.vocab_size + hidden * e
        if widens:
            needed += _FP32 * (2 * hidden + weight)
        elif not self.lora.enable and e < _FP32:
            needed += e * weight
        return needed


@dataclasses.dataclass(frozen=True)
class _Parameter:
    part: str  # of its block: attention, feed_forward, or the name of a norm
    rows: int
    count: int  # number of elements
    trains: bool
    width: int  # bytes per element, as stored

    @property
    def columns(self) -> int:
        """Elements per row."""
        return self.count // self.rows

    def sharded_rows(self, shards: int) -> int:
        """Return the number of rows on the process with the largest shard."""
        return -(-self.rows // shards)

    def held(self, shards: int) -> int:
        """Return the bytes on the process with the largest shard."""
        return self.columns * self.sharded_rows(shards) * self.width


def largest_seq_len(config: MemoryConfig, usable_bytes: float) -> int:
    """Return the longest sequence that fits in `usable_bytes`; 0 if none does."""

    def fits(seq_len: int) -> bool:
        return config.with_seq_len(seq_len).memory().total <= usable_bytes

    low, high = 0, 1
    while high < 1 << 30 and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def memory_rows(config: MemoryConfig, base_dtypes: tuple[BaseDtype, ...], usable: float) -> list[dict[str, Any]]:
    """Estimate every combination of `base_dtype` and `checkpoint`.

    Args:
        config: configuration of the YAML's settings.
        base_dtypes: formats to try.
        usable: bytes of memory per process.

    Returns:
        For each combination the bytes of each part, whether it fits, and the longest `seq_len` that fits.
    """
    rows = []
    for base_dtype in base_dtypes:
        if base_dtype != config.base_dtype and not _can_store(base_dtype, config):
            continue
        for checkpoint in CHECKPOINTS:
            setting = dataclasses.replace(config, base_dtype=base_dtype, checkpoint=checkpoint)
            memory = setting.memory()
            row: dict[str, Any] = {"base_dtype": base_dtype, "checkpoint": checkpoint}
            row |= {part: int(getattr(memory, part)) for part in (*_PARTS, "loss")}
            rows.append(row | {"fits": memory.total <= usable, "largest_seq_len": largest_seq_len(setting, usable)})
    return rows


def _can_store(base_dtype: BaseDtype, config: MemoryConfig) -> bool:
    """Return whether the model's shapes can be stored in this format."""
    try:
        dataclasses.replace(config, base_dtype=base_dtype).memory()
    except UserError:
        return False
    return True
