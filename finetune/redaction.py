"""Redaction of secrets in everything that is printed, logged or written."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

_VARIABLES = (
    "WANDB_API_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_HUB_TOKEN",
    "MISTRAL_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
_MIN_LENGTH = 8  # characters; redacting a shorter string would hide ordinary words, and no service issues such keys
_given: set[str] = set()


def add_secret(secret: str) -> None:
    """Add a secret from a configuration to `known_secrets`."""
    _given.add(secret)


def known_secrets() -> list[str]:
    """Return the secrets in the environment and in the configurations read by this process, longest first."""
    found = _given | {os.environ.get(name, "").strip() for name in _VARIABLES}
    return sorted((secret for secret in found if len(secret) >= _MIN_LENGTH), key=len, reverse=True)


def redacted(value: Any, secrets: Iterable[str] | None = None) -> Any:
    """Return a copy of nested dicts, lists and strings with every secret replaced by `***`.

    Args:
        value: what is to be written.
        secrets: what to replace; None: `known_secrets`.
    """
    secrets = known_secrets() if secrets is None else secrets
    if isinstance(value, Mapping):
        return {key: redacted(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, secrets) for item in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "***")
    return value
