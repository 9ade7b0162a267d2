"""Keeps secrets out of everything that is printed, logged or written."""

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
_SHORTEST = 8  # characters; hiding a shorter text would hide ordinary words, and no service gives such keys
_given: set[str] = set()


def add_secret(secret: str) -> None:
    """Makes `secret`, of a configuration, one of `known_secrets`."""
    _given.add(secret)


def known_secrets() -> list[str]:
    """The secrets this process knows: those of the environment and of the configurations read, the longest first."""
    found = _given | {os.environ.get(name, "").strip() for name in _VARIABLES}
    return sorted((secret for secret in found if len(secret) >= _SHORTEST), key=len, reverse=True)


def redacted(value: Any, secrets: Iterable[str] | None = None) -> Any:
    """Returns a copy of nested dicts, lists and texts in which no secret stands.

    Args:
        value: what is to be written.
        secrets: what must not stand in it; None: `known_secrets`.
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
