"""Shapes of a Mistral model, as its `params.json` states them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from simple_parsing.helpers import Serializable

from .errors import UserError

# Names a YAML may give; what they stand for is in model.attention and finetune.mixed_precision, which load torch.
ATTENTION_ENGINES = ("xformers", "varlen", "sdpa")
PARAM_DTYPES = ("bf16", "fp16", "fp32")


@dataclasses.dataclass
class MoeArgs(Serializable):
    """Mixture of experts: each token goes through `num_experts_per_tok` of `num_experts` feed-forward networks."""

    num_experts: int = 8
    num_experts_per_tok: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UserError(
                f"`moe.num_experts_per_tok` is {self.num_experts_per_tok} but must lie between 1 and "
                f"`moe.num_experts` ({self.num_experts})."
            )


@dataclasses.dataclass
class LoraArgs(Serializable):
    """Low-rank adapters (Hu et al., 2021): y = W x + scaling * B(A(dropout(x)))."""

    enable: bool = True
    rank: int = 16  # inner width R of A [R, in] and B [out, R]; 8 to 128 are usual
    dropout: float = 0.0  # share of A's input that is zeroed while training, 0 <= dropout < 1
    scaling: float = 2.0  # PEFT and others write it alpha / rank
    from_adapter: str | None = None  # path of a lora.safetensors to start from; null: B starts at zero

    def problems(self) -> list[str]:
        """Says everything that is wrong, one sentence each; empty where the settings are sound."""
        found = []
        if self.enable and self.rank < 1:
            found.append(f"`lora.rank` is {self.rank}; it must be at least 1 (or set `lora.enable: false`).")
        if not 0.0 <= self.dropout < 1.0:
            found.append(f"`lora.dropout` is {self.dropout}; it must lie in [0, 1).")
        if not self.scaling > 0:
            found.append(f"`lora.scaling` is {self.scaling}; it must be positive.")
        if self.from_adapter and not self.enable:
            found.append("`lora.from_adapter` is set but `lora.enable` is false: there is no adapter to start.")
        return found


@dataclasses.dataclass
class ModelArgs(Serializable):
    dim: int  # D, width of the residual stream
    n_layers: int
    head_dim: int  # Dh, width of one attention head (not always dim / n_heads)
    hidden_dim: int  # inner width of the feed-forward network
    n_heads: int  # H, query heads
    n_kv_heads: int  # K, key and value heads; H is a multiple of K
    norm_eps: float
    vocab_size: int  # V
    rope_theta: float = 10000.0  # base of the rotary frequencies
    moe: MoeArgs | None = None

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"`n_heads` ({self.n_heads}) is not a multiple of `n_kv_heads` ({self.n_kv_heads}).")


def load_model_args(folder: Path) -> ModelArgs:
    """Reads `folder/params.json`; keys this code does not use are ignored, as the original does.

    Raises:
        UserError: no such folder or file, no JSON object, or keys that are missing or of the wrong kind.
    """
    path = folder / "params.json"
    params = read_params(folder)
    fields = {field.name: field for field in dataclasses.fields(ModelArgs) if field.name != "moe"}
    missing = [
        name for name, field in fields.items() if field.default is dataclasses.MISSING and params.get(name) is None
    ]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: it must state the shapes of a Mistral model.")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        value = params.get(name, field.default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{path}: `{name}` is {value!r}; expected a positive number.")
        values[name] = float(value) if field.type is float else int(value)
    if (window := params.get("sliding_window")) is not None:
        raise UserError(
            f"{path}: `sliding_window` is {window!r}, which this code does not support; "
            "training without the window would quietly change the model."
        )
    return ModelArgs(moe=_moe_args(path, params.get("moe")), **values)


def _moe_args(path: Path, moe: Any) -> MoeArgs | None:
    if moe is None:
        return None
    known = {field.name for field in dataclasses.fields(MoeArgs)}
    if not isinstance(moe, dict) or set(moe) - known:
        raise UserError(f"{path}: `moe` is {moe!r}; expected an object with {' and '.join(sorted(known))}.")
    return MoeArgs(**moe)


def read_params(folder: Path) -> dict[str, Any]:
    """Returns `folder/params.json` as it stands.

    Raises:
        UserError: the folder or the file does not exist, or it holds no JSON object.
    """
    path = folder / "params.json"
    if not folder.is_dir():
        raise UserError(f"The model folder {folder} does not exist (or is no folder).")
    if not path.is_file():
        raise UserError(f"{path} does not exist: a model folder holds params.json beside its consolidated weights.")
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(params, dict):
        raise UserError(f"{path} must hold a JSON object, found {type(params).__name__}.")
    return params
