"""Shapes of Mistral's published models, from their params.json: to plan a run before downloading one."""

from model.args import ModelArgs, MoeArgs


def _shapes(dim: int, n_layers: int, hidden_dim: int, n_heads: int, vocab_size: int, theta: float) -> ModelArgs:
    return ModelArgs(
        dim=dim,
        n_layers=n_layers,
        head_dim=128,
        hidden_dim=hidden_dim,
        n_heads=n_heads,
        n_kv_heads=8,
        norm_eps=1e-5,
        vocab_size=vocab_size,
        rope_theta=theta,
    )


def _mixture(shapes: ModelArgs) -> ModelArgs:
    return ModelArgs(**vars(shapes) | {"moe": MoeArgs(num_experts=8, num_experts_per_tok=2)})


def _windowed(shapes: ModelArgs, tokens: int) -> ModelArgs:
    return ModelArgs(**vars(shapes) | {"sliding_window": tokens})


KNOWN_MODELS = {
    "mistral-7b-v0.1": _windowed(_shapes(4096, 32, 14336, 32, 32000, 1e4), 4096),
    "mistral-7b-v0.2": _shapes(4096, 32, 14336, 32, 32000, 1e6),
    "mistral-7b": _shapes(4096, 32, 14336, 32, 32768, 1e6),  # v0.3, and Mathstral
    "ministral-8b": _shapes(4096, 36, 12288, 32, 131072, 1e8),  # alternates windows: can be planned, not trained
    "nemo-12b": _shapes(5120, 40, 14336, 32, 131072, 1e6),
    "small-22b": _shapes(6144, 56, 16384, 48, 32768, 1e6),
    "codestral-22b": _shapes(6144, 56, 16384, 48, 32768, 1e6),
    "small-24b": _shapes(5120, 40, 32768, 32, 131072, 1e8),
    "large-123b": _shapes(12288, 88, 28672, 96, 32768, 1e6),
    "mixtral-8x7b": _mixture(_shapes(4096, 32, 14336, 32, 32000, 1e6)),
    "mixtral-8x22b": _mixture(_shapes(6144, 56, 16384, 48, 32768, 1e6)),
}
# The same models by the names of Mistral's API, which mistral-finetune's validator accepts.
_API_NAMES = {
    "open-mistral-7b": "mistral-7b",
    "open-mistral-nemo": "nemo-12b",
    "open-mixtral-8x7b": "mixtral-8x7b",
    "open-mixtral-8x22b": "mixtral-8x22b",
    "mistral-large-latest": "large-123b",
}


def known_shapes(name: str) -> ModelArgs | None:
    """Return the shapes of a model by its name here or in Mistral's API; None if it is not listed."""
    return KNOWN_MODELS.get(_API_NAMES.get(name.lower(), name.lower()))
