"""The settings of adapters, and the shapes of a Mistral model as its `params.json` gives them."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import BeforeValidator, Field
from simple_parsing.helpers import Serializable

from .errors import Problem, UserError, quoted
from .hf_config import CONFIG_NAME, key_in, params_from_config
from .settings import Bool, Number, PathStr, PositiveFloat, Settings, at_most

PARAMS_NAME = "params.json"
OPTIONAL = ("moe", "sliding_window")
# Keys of params.json that change what a model computes, from models newer or older than those supported here.
UNSUPPORTED = ("_sliding_window", "yarn", "llama_4_scaling", "q_lora_rank", "vision_encoder")

# Names that a YAML may give; they are implemented in model.attention, finetune.mixed_precision and
# model.frozen_weights, which load torch.
AttentionEngine = Literal["varlen", "xformers", "sdpa", "cudnn"]
ParamDtype = Literal["bf16", "fp16", "fp32"]
BaseDtype = Literal["same", "nf4", "nf4-dq", "fp8"]
ATTENTION_ENGINES: tuple[AttentionEngine, ...] = get_args(AttentionEngine)
PARAM_DTYPES: tuple[ParamDtype, ...] = get_args(ParamDtype)
BASE_DTYPES: tuple[BaseDtype, ...] = get_args(BaseDtype)

# Linear layers that can have an adapter, by the last part of their names: those of each block, and of the whole model.
BlockLinear = Literal["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
LoraTarget = Literal[BlockLinear, "gate", "output"]
BLOCK_LINEARS: tuple[BlockLinear, ...] = get_args(BlockLinear)
# The names of the same layers in Hugging Face's models.
HF_LINEARS: dict[str, LoraTarget] = {
    **{"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo"},
    **{"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3", "lm_head": "output"},
}
ALL_LINEARS = "all-linear"  # PEFT's name for every linear layer except the head

DEFAULT_SCALING = 2.0  # of B A, as in mistral-finetune

# The keys that determine each dimension of a weight, separated by spaces, by the next-to-last part of its name.
SHAPE_KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("tok_embeddings", "output"), ("vocab_size", "dim")),
    **dict.fromkeys(("attention_norm", "ffn_norm", "norm"), ("dim",)),
    "wq": ("n_heads head_dim", "dim"),
    **dict.fromkeys(("wk", "wv"), ("n_kv_heads head_dim", "dim")),
    "wo": ("dim", "n_heads head_dim"),
    **dict.fromkeys(("w1", "w3"), ("hidden_dim", "dim")),
    "w2": ("dim", "hidden_dim"),
    "gate": ("moe.num_experts", "dim"),
}

# Far larger than any model; building a larger one would take long before the mistake is noticed.
_LARGEST_WIDTH = 1 << 24
_MOST_BLOCKS = 2_000  # feed-forward networks of all layers
_MAX_PARAMS_BYTES = 1 << 20


@dataclasses.dataclass
class MoeArgs(Serializable):
    """Mixture of experts: each token is routed to `num_experts_per_tok` of `num_experts` feed-forward networks."""

    num_experts: int = 8
    num_experts_per_tok: int = 2


def _own_names(targets: object) -> object:
    """Replace Hugging Face's names of layers by ours; leave the rest for the check that follows."""
    if targets in (ALL_LINEARS, [ALL_LINEARS]):
        return list(BLOCK_LINEARS)
    if not isinstance(targets, list):
        return targets
    return [HF_LINEARS.get(name, name) if isinstance(name, str) else name for name in targets]


@dataclasses.dataclass
class LoraArgs(Settings):
    """Low-rank adapters (Hu et al., 2021): y = W x + scaling * B(A(dropout(x)))."""

    enable: Bool = True  # train an adapter; false: full fine-tuning
    # inner dimension R of A [R, in] and B [out, R], at least 1. 8 to 128 are usual
    rank: Annotated[int, Number, at_most(65_536)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1), Number] = 0.0  # probability of zeroing an input of A in training
    # factor of the adapter's output; null: `alpha` / `rank` if `alpha` is set, else 2.0
    scaling: PositiveFloat | None = None
    alpha: PositiveFloat | None = None  # PEFT's way to set `scaling`, which is what args.yaml and checkpoints record
    # layers with an adapter. `gate` is the router of a mixture of experts. mistral-inference ignores an adapter on
    # `output`, the head: export such a model merged. Hugging Face's names (`q_proj`, ..., `lm_head`, or `all-linear`
    # for the default) are accepted, and recorded as these
    targets: Annotated[list[LoraTarget], BeforeValidator(_own_names)] = dataclasses.field(
        default_factory=lambda: list(BLOCK_LINEARS)
    )
    # path of an adapter to start from, this project's or PEFT's; null: a new adapter, whose B is zero
    from_adapter: PathStr | None = None

    def __post_init__(self) -> None:
        if self.scaling is not None:
            return
        if self.alpha is None:
            self.scaling = DEFAULT_SCALING
        elif self.rank >= 1:
            self.scaling, self.alpha = self.alpha / self.rank, None

    def problems(self) -> list[Problem]:
        found = []
        if self.enable and self.rank < 1:
            expected = "expected a whole number of at least 1 (or set `lora.enable: false`)"
            found.append(Problem("lora.rank", f"`lora.rank` is {self.rank}; {expected}."))
        if self.alpha is not None and self.scaling is not None:
            message = (
                f"`lora.alpha` ({self.alpha}) and `lora.scaling` ({self.scaling}) are both given; "
                "scaling is alpha / rank, so give one of them."
            )
            found.append(Problem("lora.alpha", message))
        if self.enable and not self.targets:
            message = "`lora.targets` is empty; name a layer (or set `lora.enable: false`)."
            found.append(Problem("lora.targets", message))
        if self.from_adapter and not self.enable:
            message = "`lora.from_adapter` is set but `lora.enable` is false: there is no adapter to initialize."
            found.append(Problem("lora.from_adapter", message))
        return found


@dataclasses.dataclass
class ModelArgs(Serializable):
    """Shapes of a Mistral model."""

    dim: int  # D, width of the residual stream
    n_layers: int
    head_dim: int  # Dh, width of one attention head (not always dim / n_heads)
    hidden_dim: int  # inner width of the feed-forward network
    n_heads: int  # H, query heads
    n_kv_heads: int  # K, key and value heads; H is a multiple of K
    norm_eps: float
    vocab_size: int  # V
    rope_theta: float = 10000.0  # base of the rotary frequencies
    sliding_window: int | None = None  # tokens that a token attends to; longer documents are refused
    moe: MoeArgs | None = None


def load_model_args(folder: Path) -> ModelArgs:
    """Read `folder/params.json`, or Hugging Face's config.json. Other keys are ignored.

    Raises:
        UserError: the file cannot be read, a key is missing or has an invalid value, or the architecture is not
            supported.
    """
    path = params_path(folder)
    params = read_params(folder)
    fields = {field.name: field for field in dataclasses.fields(ModelArgs) if field.name not in OPTIONAL}
    missing = [
        name for name, field in fields.items() if field.default is dataclasses.MISSING and params.get(name) is None
    ]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; expected the shapes of a Mistral model.")
    values: dict[str, Any] = {}
    kinds = get_type_hints(ModelArgs)
    for name, field in fields.items():
        values[name] = _positive(path, name, params.get(name, field.default), kinds[name])
    for key in UNSUPPORTED:
        if params.get(key) is not None:
            raise UserError(
                f"{path}: `{key}` is {quoted(params[key])}, which is not supported; "
                "training without it would silently change the model."
            )
    window = params.get("sliding_window")
    if isinstance(window, list):
        raise UserError(f"{path}: `sliding_window` is {quoted(window)}; alternating windows are not supported.")
    window = None if window is None else int(_positive(path, "sliding_window", window, int))
    args = ModelArgs(moe=_moe_args(path, params), sliding_window=window, **values)
    if args.n_heads % args.n_kv_heads:
        heads, kv_heads = key_in(path, "n_heads"), key_in(path, "n_kv_heads")
        raise UserError(f"{path}: `{heads}` ({args.n_heads}) is not a multiple of `{kv_heads}` ({args.n_kv_heads}).")
    if args.head_dim % 2:
        raise UserError(f"{path}: `head_dim` is {args.head_dim}; rotary embeddings need an even number.")
    if (blocks := args.n_layers * (args.moe.num_experts if args.moe else 1)) > _MOST_BLOCKS:
        raise UserError(f"{path} describes {blocks:,} feed-forward networks; expected at most {_MOST_BLOCKS:,}.")
    return args


def _positive(path: Path, name: str, value: Any, kind: type) -> int | float:
    name = key_in(path, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < sys.float_info.max:
        raise UserError(f"{path}: `{name}` is {quoted(value)}; expected a positive number.")
    if kind is float:
        return float(value)
    if value > _LARGEST_WIDTH or value != int(value):
        raise UserError(f"{path}: `{name}` is {quoted(value)}; expected a whole number up to {_LARGEST_WIDTH:,}.")
    return int(value)


def _moe_args(path: Path, params: dict[str, Any]) -> MoeArgs | None:
    """Read the shapes of a mixture of experts: in an object `moe` or, in some models, at the top level."""
    known = {field.name for field in dataclasses.fields(MoeArgs)}
    moe = params.get("moe")
    if moe is None:
        moe = {name: params[name] for name in known if params.get(name) is not None} or None
    if moe is None:
        return None
    if not isinstance(moe, dict) or set(moe) - known:
        raise UserError(f"{path}: `moe` is {quoted(moe)}; expected an object with {' and '.join(sorted(known))}.")
    args = MoeArgs(**{name: int(_positive(path, f"moe.{name}", value, int)) for name, value in moe.items()})
    if args.num_experts_per_tok > args.num_experts:
        chosen, all_experts = key_in(path, "moe.num_experts_per_tok"), key_in(path, "moe.num_experts")
        raise UserError(
            f"{path}: `{chosen}` is {args.num_experts_per_tok}; expected between 1 and `{all_experts}` "
            f"({args.num_experts})."
        )
    return args


def read_params(folder: Path) -> dict[str, Any]:
    """Return the contents of `folder/params.json`, or the equivalent of Hugging Face's config.json.

    Raises:
        UserError: the folder or the file does not exist, the file is not a JSON object, or config.json describes
            another architecture.
    """
    path = params_path(folder)
    if not folder.is_dir():
        raise UserError(f"The model folder {folder} does not exist (or is not a folder).")
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: a model folder contains params.json and consolidated weights, or config.json and "
            "model*.safetensors."
        )
    if (size := path.stat().st_size) > _MAX_PARAMS_BYTES:
        raise UserError(f"{path} has {size:,} bytes: it does not describe a model.")
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise UserError(f"{path} is not valid JSON: it is nested too deeply.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(params, dict):
        raise UserError(f"{path} must contain a JSON object, found {type(params).__name__}.")
    return params_from_config(path, params) if path.name == CONFIG_NAME else params


def params_path(folder: Path) -> Path:
    """Return the file that describes the model in a folder: params.json, or config.json if there is only that."""
    config = folder / CONFIG_NAME
    return config if config.is_file() and not (folder / PARAMS_NAME).is_file() else folder / PARAMS_NAME
