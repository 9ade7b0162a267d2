"""What a training takes of a process's memory, by arithmetic: nothing is built, nothing is read.

The parts are those that live at the moment when most is alive: behind the forward pass, with the loss's chunk of
logits, or in the backward pass of one of the last two blocks, with whatever that block computes anew. What autograd
keeps follows model/fused_lora.py, where a layer keeps no input that can be computed from something kept. Where it does
not apply (`lora.enable: false`, adapters with dropout), layers keep their inputs and the count is rough.

T are the positions of a micro-batch, N those of them that are trained, e the bytes of a number in the dtype that
computes.
"""

import dataclasses
import math
from collections.abc import Iterable
from functools import cached_property

import torch

from model.args import LoraArgs, ModelArgs
from model.lora import add_lora, quantize_linears
from model.transformer import Transformer

from .args import CheckpointMode, TrainArgs
from .loss import LOGITS_PER_CHUNK, LOGITS_PER_CHUNK_ON_CPU

CHECKPOINTS: tuple[CheckpointMode, ...] = (False, "selective", True)  # from the fastest to the smallest
RESERVE = 0.1  # of the free memory, which is not planned with: what the arithmetic misses, and the allocator's gaps
SAME = "same"  # the base's dtype is the one that computes
MOMENTS_BYTES = {"adamw": 2 * 4, "adamw8bit": 2}  # of the optimizer, per trained parameter
_FP32 = 4
_ROUTING = 40  # bytes of a token's slot: sorted and unsorted indices, its expert's weight
# With FSDP2, in a backward pass: the block at work and the next one, whose parameters are being gathered.
_UNSHARDED_BLOCKS = 2
_KERNELS_ON_GPU = 64 << 20  # workspaces of cuBLAS and of attention
# On a CPU: libraries at work and rows, and the gaps that glibc's malloc leaves between tensors, as a share of those
# that come and go. Fitted to the process's high-water mark (benchmarks/plan.py); no tensor of ours.
_LIBRARIES_ON_CPU, _GAPS_ON_CPU = 100e6, 0.38


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one process."""

    frozen: float  # weights that do not train
    trained: float  # weights that do, fp32
    gradients: float
    moments: float  # of the optimizer
    unsharded: float  # blocks and embeddings that are whole for a time, where weights are sharded or in host memory
    activations: float  # kept for the backward pass
    transient: float  # the most that lives beside them: a block's backward pass, or the loss's chunk
    overhead: float  # of libraries and the allocator
    loss: float  # what the loss takes: `transient` or less

    @property
    def total(self) -> float:
        """The most at any moment."""
        return sum(dataclasses.astuple(self)) - self.loss


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """All that the memory of one process depends on."""

    model: ModelArgs
    lora: LoraArgs
    seq_len: int
    batch_size: int = 1
    checkpoint: CheckpointMode = True  # not auto
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"  # or cpu
    attention: str = "varlen"
    base_dtype: str = SAME  # one of model.args.BASE_DTYPES: how the blocks' linear layers are stored
    optimizer: str = "adamw"
    shards: int = 1  # processes that hold one copy of the model together
    cpu_offload: bool = False
    trained_share: float = 1.0  # of the positions; what the data will have is not known before they are read

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
        """What a training YAML asks for, where `args.checkpoint` is not auto."""
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
            optimizer=args.optim.name,
            shards=shards,
            cpu_offload=args.cpu_offload,
            trained_share=trained_share,
        )

    @property
    def is_approximate(self) -> bool:
        """Whether layers keep their inputs, as autograd has it."""
        return not self.lora.enable or self.lora.dropout > 0

    def memory(self) -> Memory:
        """What is alive when most is."""
        block, root = self._parameters
        held = [*block * self.model.n_layers, *root]
        trained, frozen = (
            sum(parameter.held(self.shards) for parameter in held if parameter.trains == trains)
            for trains in (True, False)
        )
        gradients, moments = trained, trained / _FP32 * MOMENTS_BYTES[self.optimizer]
        if self.cpu_offload and self.device != "cpu":  # there, host memory is the device's
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

    def fastest_checkpoint(self, usable_bytes: float) -> CheckpointMode:
        """Return the fastest of CHECKPOINTS that fits in `usable_bytes`; True, which needs least, if none does."""
        modes = (
            mode for mode in CHECKPOINTS if dataclasses.replace(self, checkpoint=mode).memory().total <= usable_bytes
        )
        return next(modes, True)

    def trained_and_frozen(self) -> tuple[int, int]:
        """Numbers of parameters of the whole model, whatever stores them."""
        block, root = dataclasses.replace(self, base_dtype=SAME)._parameters
        held = [*block * self.model.n_layers, *root]
        trained = sum(parameter.count for parameter in held if parameter.trains)
        return trained, sum(parameter.count for parameter in held) - trained

    # --- Parameters

    @property
    def _is_sharded(self) -> bool:
        return self.shards > 1 or self.cpu_offload

    @cached_property
    def _parameters(self) -> tuple[list["_Parameter"], list["_Parameter"]]:
        """Those of one block, which are all alike, and those outside."""
        with torch.device("meta"):
            model = Transformer(dataclasses.replace(self.model, n_layers=1))
        if self.lora.enable:
            add_lora(model, self.lora)
        if self.base_dtype != SAME:
            quantize_linears(model, self.base_dtype)
        block, root = [], []
        for name, parameter in model.named_parameters():
            trains, is_quantized = parameter.requires_grad, parameter.dtype == torch.uint8
            width = _FP32 if trains else 1 if is_quantized else self.dtype.itemsize
            in_block = name.startswith("layers.")
            part = name.split(".")[2] if in_block else ""
            found = _Parameter(part, len(parameter), parameter.numel(), trains, width)
            (block if in_block else root).append(found)
        return block, root

    def _whole(self, parameters: Iterable["_Parameter"]) -> float:
        """Bytes of parameters that are not sharded; those that train are then in the dtype that computes."""
        return sum(p.count * (self.dtype.itemsize if p.trains else p.width) for p in parameters)

    def _working_copies(self, part: str) -> float:
        """Of a block part's fp32 parameters in the dtype that computes, which are kept; FSDP2 makes and frees them."""
        if self.dtype.itemsize == _FP32 or self._is_sharded:
            return 0
        trained = (parameter for parameter in self._parameters[0] if parameter.trains and parameter.part == part)
        return self.dtype.itemsize * sum(parameter.count for parameter in trained)

    # --- Activations

    @property
    def _positions(self) -> tuple[int, int]:
        """T and N."""
        positions = self.seq_len * self.batch_size
        return positions, math.ceil(positions * self.trained_share)

    def _passes(self) -> tuple[float, float, float]:
        """What is kept behind the forward pass, what the loss takes beside, and the most of both passes."""
        (positions, trained), layers = self._positions, self.model.n_layers
        head, loss = self._head(), self._loss()
        outside = (4 * self.model.head_dim + 16) * positions + head  # with rotary phases, tokens and targets
        earlier, last = self._kept(positions), self._kept(trained, is_last=True)
        # The last norm's input, and the gradient of its output, which the loss computes along the way.
        hidden = trained * self.model.dim * (_FP32 + self.dtype.itemsize)
        kept = outside + (layers - 1) * earlier + last + hidden
        peak = max(kept + loss, outside + (layers - 1) * earlier + self._block_at_most(trained, True))
        if layers > 1:
            peak = max(peak, outside + (layers - 2) * earlier + self._block_at_most(positions, False))
        return kept, loss, peak

    def _kept(self, rows: int, is_last: bool = False) -> float:
        """What a block keeps from its forward to its backward pass, `rows` of the positions behind its attention."""
        positions, _ = self._positions
        if self.checkpoint is True:
            return positions * self.model.dim * self.dtype.itemsize
        kept = self._attention(rows, is_last) + self._working_copies("attention")
        if self.checkpoint == "selective":
            return kept
        return kept + rows * self._feed_forward + self._working_copies("feed_forward")

    def _attention(self, rows: int, is_last: bool) -> float:
        """What attention keeps with the residual stream before and behind it."""
        model, e, (positions, _) = self.model, self.dtype.itemsize, self._positions
        queries, keys = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
        repeats = self.attention == "xformers" or (self.attention == "sdpa" and self.device != "cpu")
        each = e * (model.dim + self._low("wq", "wk", "wv") + queries + 2 * (queries if repeats else keys) + queries)
        each += _FP32 * model.n_heads  # log-sum-exps
        behind = e * (self._low("wo") + model.dim)
        if is_last or self.attention == "sdpa":  # the rows that matter, or the documents' outputs in one tensor
            behind += e * queries
        if self.is_approximate:
            each += self._norm_keeps + self._dropped("wq", "wk", "wv", width=model.dim)
            behind += self._dropped("wo", width=queries)
        return each * positions + behind * rows

    @property
    def _feed_forward(self) -> float:
        """What a feed-forward network keeps of each row, its input `h` left out."""
        model, e = self.model, self.dtype.itemsize
        of_expert = e * (2 * model.hidden_dim + self._low("w1", "w3") + self._low("w2"))
        if self.is_approximate:
            of_expert += e * 2 * model.hidden_dim  # silu(gate), and its product with up
            of_expert += self._dropped("w1", "w3", width=model.dim) + self._dropped("w2", width=model.hidden_dim)
        if model.moe is None:
            return of_expert + (self._norm_keeps if self.is_approximate else 0)
        # Of each slot the expert's input, its output, and that with its weight.
        slot = of_expert + 3 * e * model.dim + _ROUTING
        return model.moe.num_experts_per_tok * slot + self._norm_keeps

    def _low(self, *layers: str) -> int:
        """Width of the products with the layers' A."""
        return self.lora.rank * len({*layers} & {*self.lora.targets}) if self.lora.enable else 0

    @property
    def _norm_keeps(self) -> float:
        """Of a norm by autograd: its output, and its input in fp32, in place of the input itself."""
        return self.model.dim * (_FP32 + (0 if self.lora.enable else self.dtype.itemsize))

    def _dropped(self, *layers: str, width: int) -> float:
        """Inputs of A behind dropout, with masks."""
        adapted = len({*layers} & {*self.lora.targets}) if self.lora.enable and self.lora.dropout else 0
        e = self.dtype.itemsize
        return adapted * width * (e + (e if self.device == "cpu" else 1))

    # --- What lives for a moment

    def _block_at_most(self, rows: int, is_last: bool) -> float:
        """The most that is alive of a block in its backward pass, what it keeps included."""
        model, e, (positions, _) = self.model, self.dtype.itemsize, self._positions
        attention = self._attention(rows, is_last) + self._working_copies("attention") + self._dequantized
        queries, keys = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
        # A norm's gradient: that of its output, four tensors in fp32 (its input is one already with an fp32 base).
        norm = model.dim * (2 * e + (16 if e < _FP32 else 12))
        behind = attention + rows * (self._feed_forward + self._feed_forward_gradients)
        behind += self._working_copies("feed_forward")
        ffn_norm = attention + rows * (norm + 2 * model.hidden_dim * e * (model.moe is None))
        # FlashAttention sums the queries' gradient in fp32 and makes those of keys and values for every query head.
        engine = queries * (4 * e + _FP32) if self.device != "cpu" else e * (3 * queries + 4 * keys)
        attention_norm = norm + e * (model.dim + self._low("wq", "wk", "wv") + queries + 2 * keys)
        return max(behind, ffn_norm, attention + positions * engine, positions * attention_norm)

    @property
    def _feed_forward_gradients(self) -> float:
        """Bytes per row: the gradient of SwiGLU's product, that of `up` and of `gate`, and that of the output."""
        model, e = self.model, self.dtype.itemsize
        inner = 3 * model.hidden_dim * e
        if model.moe is None:
            return inner + 2 * model.dim * e
        slots, experts = model.moe.num_experts_per_tok, model.moe.num_experts
        return slots * (inner / experts + 2 * model.dim * e)  # one expert after the other

    @property
    def _dequantized(self) -> float:
        """The largest weight of a block in the dtype that computes, where it is stored in another."""
        if self.base_dtype == SAME:
            return 0
        model = self.model
        largest = model.dim * max(model.hidden_dim, model.n_heads * model.head_dim)
        return (self.dtype.itemsize + _FP32) * largest  # by way of fp32

    def _head(self) -> float:
        """What the head keeps where its weight, or an adapter of it, trains: a gradient as large as the weight."""
        model, e = self.model, self.dtype.itemsize
        if not self.lora.enable:
            return _FP32 * model.vocab_size * model.dim
        if "output" in self.lora.targets:
            return 2 * e * model.vocab_size * (model.dim + self.lora.rank)  # with the weight and B side by side
        return 0

    def _loss(self) -> float:
        """What finetune/loss.py takes beside what is kept."""
        model, e, (_, trained) = self.model, self.dtype.itemsize, self._positions
        on_cpu = self.device == "cpu"
        hidden, weight = trained * model.dim, model.vocab_size * model.dim
        at_once = max(1, (LOGITS_PER_CHUNK_ON_CPU if on_cpu else LOGITS_PER_CHUNK) // model.vocab_size)
        narrow = 0 if on_cpu or e == _FP32 else e  # logits before they are fp32, and their gradient
        # A chunk's logits and probabilities; the next one's logits come while they are still there.
        each = 2 * _FP32 + narrow if trained <= at_once else 3 * _FP32 + 2 * narrow
        taken = each * min(at_once, trained) * model.vocab_size + hidden * e
        if on_cpu and e < _FP32:  # computes in fp32
            taken += _FP32 * (2 * hidden + weight)
        elif not self.lora.enable and e < _FP32:
            taken += e * weight
        return taken


@dataclasses.dataclass(frozen=True)
class _Parameter:
    part: str  # of the block: attention, feed_forward, or the name of a norm
    rows: int
    count: int  # of its numbers
    trains: bool
    width: int  # bytes of a number, as stored

    def held(self, shards: int) -> int:
        """Bytes on the process that holds most."""
        return self.count // self.rows * -(-self.rows // shards) * self.width


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
