"""Mistral's published models: their shapes, from params.json, to plan a run, and where to download which files."""

import dataclasses

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

APACHE = "Apache-2.0"
# Both forbid production use; the second allows research and, within it, publishing what was trained.
NON_PRODUCTION, RESEARCH = "MNPL-0.1", "MRL-0.1"

_MISTRAL_V3 = "params.json consolidated.safetensors tokenizer.model.v3"
_MISTRAL_TEKKEN = "params.json consolidated.safetensors tekken.json"
_HUGGING_FACE = "config.json model-*.safetensors tokenizer.model"
_CDN = "https://models.mistralcdn.com"


@dataclasses.dataclass(frozen=True)
class Archive:
    """A tar file with Mistral's layout, and its checksum."""

    url: str
    md5: str


@dataclasses.dataclass(frozen=True)
class Release:
    """A published model."""

    shapes: str  # key of KNOWN_MODELS
    license: str
    repository: str | None  # on the Hugging Face Hub, which states the SHA-256 of each file; None: only the archive
    files: str = _MISTRAL_V3  # what is read of the repository
    archive: Archive | None = None

    @property
    def gigabytes(self) -> float:
        """The size of the weights, which are published in bf16."""
        return 2 * _count_parameters(KNOWN_MODELS[self.shapes]) / 1e9


def _count_parameters(model: ModelArgs) -> int:
    experts = model.moe.num_experts if model.moe else 1
    attention = 2 * model.dim * model.head_dim * (model.n_heads + model.n_kv_heads)
    feed_forward = experts * 3 * model.dim * model.hidden_dim + (experts * model.dim if model.moe else 0)
    norms = 2 * model.dim
    return model.n_layers * (attention + feed_forward + norms) + 2 * model.vocab_size * model.dim + model.dim


RELEASES = {
    "mistral-7b-v0.1": Release(
        *("mistral-7b-v0.1", APACHE, "mistralai/Mistral-7B-v0.1", _HUGGING_FACE),
        Archive(f"{_CDN}/mistral-7b-v0-1/mistral-7B-v0.1.tar", "37dab53973db2d56b2da0a033a15307f"),
    ),
    "mistral-7b-instruct-v0.1": Release("mistral-7b-v0.1", APACHE, "mistralai/Mistral-7B-Instruct-v0.1", _HUGGING_FACE),
    "mistral-7b-instruct-v0.2": Release(
        *("mistral-7b-v0.2", APACHE, "mistralai/Mistral-7B-Instruct-v0.2", _HUGGING_FACE),
        Archive(f"{_CDN}/mistral-7b-v0-2/Mistral-7B-v0.2-Instruct.tar", "fbae55bc038f12f010b4251326e73d39"),
    ),
    "mistral-7b-v0.3": Release(
        *("mistral-7b", APACHE, "mistralai/Mistral-7B-v0.3", _MISTRAL_V3),
        Archive(f"{_CDN}/mistral-7b-v0-3/mistral-7B-v0.3.tar", "0663b293810d7571dad25dae2f2a5806"),
    ),
    "mistral-7b-instruct-v0.3": Release(
        *("mistral-7b", APACHE, "mistralai/Mistral-7B-Instruct-v0.3", _MISTRAL_V3),
        Archive(f"{_CDN}/mistral-7b-v0-3/mistral-7B-Instruct-v0.3.tar", "80b71fcb6416085bcb4efad86dfb4d52"),
    ),
    "mathstral-7b-v0.1": Release(
        *("mistral-7b", APACHE, "mistralai/mathstral-7B-v0.1", _MISTRAL_V3),
        Archive(f"{_CDN}/mathstral-7b-v0-1/mathstral-7B-v0.1.tar", "5f05443e94489c261462794b1016f10b"),
    ),
    "ministral-8b-instruct-2410": Release(
        "ministral-8b", RESEARCH, "mistralai/Ministral-8B-Instruct-2410", _MISTRAL_TEKKEN
    ),
    "nemo-12b-base-2407": Release(
        *("nemo-12b", APACHE, "mistralai/Mistral-Nemo-Base-2407", _MISTRAL_TEKKEN),
        Archive(f"{_CDN}/mistral-nemo-2407/mistral-nemo-base-2407.tar", "c5d079ac4b55fc1ae35f51f0a3c0eb83"),
    ),
    "nemo-12b-instruct-2407": Release(
        *("nemo-12b", APACHE, "mistralai/Mistral-Nemo-Instruct-2407", _MISTRAL_TEKKEN),
        Archive(f"{_CDN}/mistral-nemo-2407/mistral-nemo-instruct-2407.tar", "296fbdf911cb88e6f0be74cd04827fe7"),
    ),
    "small-22b-instruct-2409": Release("small-22b", RESEARCH, "mistralai/Mistral-Small-Instruct-2409"),
    "codestral-22b-v0.1": Release(
        *("codestral-22b", NON_PRODUCTION, "mistralai/Codestral-22B-v0.1", _MISTRAL_V3),
        Archive(f"{_CDN}/codestral-22b-v0-1/codestral-22B-v0.1.tar", "1ea95d474a1d374b1d1b20a8e0159de3"),
    ),
    "small-24b-base-2501": Release("small-24b", APACHE, "mistralai/Mistral-Small-24B-Base-2501", _MISTRAL_TEKKEN),
    "small-24b-instruct-2501": Release(
        "small-24b", APACHE, "mistralai/Mistral-Small-24B-Instruct-2501", _MISTRAL_TEKKEN
    ),
    "large-123b-instruct-2407": Release(
        *("large-123b", RESEARCH, "mistralai/Mistral-Large-Instruct-2407"),
        "params.json consolidated-*.safetensors tokenizer.model.v3",
        Archive(f"{_CDN}/mistral-large-2407/mistral-large-instruct-2407.tar", "fc602155f9e39151fba81fcaab2fa7c4"),
    ),
    "mixtral-8x7b-v0.1": Release("mixtral-8x7b", APACHE, "mistralai/Mixtral-8x7B-v0.1", _HUGGING_FACE),
    "mixtral-8x7b-instruct-v0.1": Release(
        *("mixtral-8x7b", APACHE, "mistralai/Mixtral-8x7B-Instruct-v0.1", _HUGGING_FACE),
        Archive(f"{_CDN}/mixtral-8x7b-v0-1/Mixtral-8x7B-v0.1-Instruct.tar", "8e2d3930145dc43d3084396f49d38a3f"),
    ),
    "mixtral-8x22b-v0.3": Release(
        *("mixtral-8x22b", APACHE, None, _MISTRAL_V3),
        Archive(f"{_CDN}/mixtral-8x22b-v0-3/mixtral-8x22B-v0.3.tar", "a2fa75117174f87d1197e3a4eb50371a"),
    ),
    "mixtral-8x22b-instruct-v0.3": Release(  # the repository's v0.1 has the same weights
        *("mixtral-8x22b", APACHE, "mistralai/Mixtral-8x22B-Instruct-v0.1"),
        "config.json model-*.safetensors tokenizer.model*",
        Archive(f"{_CDN}/mixtral-8x22b-v0-3/mixtral-8x22B-Instruct-v0.3.tar", "471a02a6902706a2f1e44a693813855b"),
    ),
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
    name = _API_NAMES.get(name.lower(), name.lower())
    return KNOWN_MODELS.get(RELEASES[name].shapes if name in RELEASES else name)
