"""Convert between Hugging Face's config.json and Mistral's params.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import UserError

CONFIG_NAME = "config.json"

# params.json -> config.json
_SHAPES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
_MOE = {"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"}
_ARCHITECTURES = {"mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM"}
_DEFAULT_THETAS = {"mistral": 1e4, "mixtral": 1e6}
# params.json rarely states a maximum sequence length. Our rotary embeddings need none, but inference engines do.
DEFAULT_MAX_POSITIONS = 32768
_TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2}  # in all of Mistral's tokenizers


def key_in(file: Path, name: str) -> str:
    """Return the name that a key of params.json has in a model's file: config.json has other names."""
    if file.name != CONFIG_NAME:
        return name
    return (_SHAPES | {f"moe.{ours}": theirs for ours, theirs in _MOE.items()}).get(name, name)


def params_from_config(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a config.json to the keys of params.json.

    Args:
        path: of the config.json, for error messages.
        config: its content.

    Raises:
        UserError: another architecture, an unsupported variant, or missing keys.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        raise UserError(f"{path}: `model_type` is {kind!r}; expected {' or '.join(_ARCHITECTURES)}.")
    _refuse_variants(path, config)
    keys = _SHAPES | (_MOE if kind == "mixtral" else {})
    if missing := [theirs for theirs in keys.values() if config.get(theirs) is None]:
        raise UserError(f"{path} lacks {', '.join(missing)}: it must state the shapes of a {kind} model.")
    params: dict[str, Any] = {ours: config[theirs] for ours, theirs in _SHAPES.items()}
    params["head_dim"] = config.get("head_dim") or _default_head_dim(path, config)
    params["rope_theta"] = _rope_theta(config) or _DEFAULT_THETAS[kind]
    if kind == "mixtral":
        params["moe"] = {ours: config[theirs] for ours, theirs in _MOE.items()}
    if config.get("tie_word_embeddings"):
        params["tied_embeddings"] = True
    for key in ("sliding_window", "max_position_embeddings"):
        if config.get(key) is not None:
            params[key] = config[key]
    return params


def _refuse_variants(path: Path, config: Mapping[str, Any]) -> None:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    layer_types = config.get("layer_types") or []
    kinds = sorted(set(map(str, layer_types))) if isinstance(layer_types, list) else layer_types
    for key, value, expected in (
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("quantization_config", config.get("quantization_config"), None),
        ("rope_parameters", rope_type, "default"),
        ("layer_types", kinds or ["full_attention"], ["full_attention"]),
    ):
        if value != expected:
            raise UserError(
                f"{path}: `{key}` is {value!r}; only {expected!r} is supported. This code would silently "
                "compute a different model."
            )


def _default_head_dim(path: Path, config: Mapping[str, Any]) -> int:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(f"{path}: `hidden_size` {width!r} is not a multiple of `num_attention_heads` {heads!r}.")
    return width // heads


def _rope_theta(config: Mapping[str, Any]) -> Any:
    """Return `rope_theta`, which transformers 5 moved into `rope_parameters`."""
    return (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta")


def config_from_params(params: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the config.json of a model with untied output weights.

    Args:
        params: as returned by `model.args.read_params`.
        dtype: of the stored weights, in PyTorch's spelling ("bfloat16").
    """
    kind = "mixtral" if params.get("moe") else "mistral"
    config = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        **{theirs: params[ours] for ours, theirs in _SHAPES.items()},
        "head_dim": params["head_dim"],
        "hidden_act": "silu",
        "rope_theta": params.get("rope_theta", _DEFAULT_THETAS["mistral"]),
        "max_position_embeddings": params.get("max_position_embeddings", DEFAULT_MAX_POSITIONS),
        "sliding_window": params.get("sliding_window"),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        **_TOKEN_IDS,
    }
    if kind == "mixtral":
        config |= {theirs: params["moe"][ours] for ours, theirs in _MOE.items()}
    return config


def generation_config() -> dict[str, Any]:
    """Return the generation_config.json, which tells inference engines where an answer ends, and to answer greedily."""
    return {**_TOKEN_IDS, "do_sample": False}
