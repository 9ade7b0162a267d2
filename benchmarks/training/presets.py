"""Settings of the training benchmark: shapes, batches and rows."""

import dataclasses

from model.args import ModelArgs, MoeArgs

_7B = ModelArgs(
    dim=4096,
    n_layers=32,
    head_dim=128,
    hidden_dim=14336,
    n_heads=32,
    n_kv_heads=8,
    norm_eps=1e-5,
    vocab_size=32768,
    rope_theta=1e6,
)
_8X7B = dataclasses.replace(_7B, moe=MoeArgs(num_experts=8, num_experts_per_tok=2))
_60M = dataclasses.replace(_7B, dim=512, n_layers=8, head_dim=64, hidden_dim=1408, n_heads=8, n_kv_heads=4)
# The two experts of a token are together as wide as the dense feed-forward network: the same active parameters.
_60M_MOE = dataclasses.replace(_60M, hidden_dim=704, moe=_8X7B.moe)
_TINY = dataclasses.replace(_60M, dim=64, n_layers=2, head_dim=16, hidden_dim=128, n_heads=4, n_kv_heads=2)


@dataclasses.dataclass(frozen=True)
class Preset:
    shapes: ModelArgs
    rows: str  # one of benchmarks.data.ROWS
    seq_len: int
    rank: int  # of the adapters on all seven linear layers of a block
    batch_size: int = 1
    num_microbatches: int = 1
    packing: str = "concat"
    warmup: int = 3  # untimed steps
    steps: int = 7


PRESETS = {
    "tiny": Preset(_TINY, "short_stays", 1024, rank=4, num_microbatches=2, warmup=1, steps=2),
    "cpu-60m": Preset(_60M, "short_stays", 2048, rank=16, steps=10),
    "moe-cpu": Preset(_60M_MOE, "short_stays", 2048, rank=16, steps=10),
    "A": Preset(_7B, "texts", 4096, rank=16, batch_size=2, num_microbatches=16, warmup=2, steps=4),
    "B": Preset(_7B, "chats", 32768, rank=64, steps=12),
    "C": Preset(_7B, "stays", 8192, rank=64, num_microbatches=8),
    "D": Preset(_7B, "texts", 2048, rank=64, num_microbatches=8),
    "E": Preset(_8X7B, "chats", 8192, rank=64, num_microbatches=4),
    "F": Preset(_7B, "stays", 8192, rank=16, num_microbatches=8, packing="best_fit"),
}
