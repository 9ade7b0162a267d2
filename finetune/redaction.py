"""Redaction of secrets in everything that is printed, logged or written."""

import base64
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import unquote

_VARIABLES = (
    "WANDB_API_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_HUB_TOKEN",
    "MISTRAL_API_KEY",
    "SERVER_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
_URL_VARIABLES = ("MLFLOW_TRACKING_URI", "WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")  # in any case
# `user:password@` or `token@` after `://`. In a password `@`, `/` and `#` are mistakes, and libraries quote mistakes.
_USER_INFO = re.compile(r"(?<=://)(?:[^\s/?#@:]*:\S*|[^\s/?#]*)@")
_MIN_LENGTH = 8  # characters; redacting a shorter string would hide ordinary words, and no service issues such keys
_given: set[str] = set()


def add_secret(secret: str) -> None:
    """Add a secret from a configuration to `known_secrets`."""
    _given.add(secret)


def add_url_secrets(url: str) -> None:
    """Add the user info of a URL to `known_secrets`, in the forms in which libraries quote it."""
    _given.update(_url_secrets(url))


def _url_secrets(url: str) -> set[str]:
    match = _USER_INFO.search(url)
    if match is None:
        return set()
    info = match[0].removesuffix("@")
    password = info.partition(":")[2]
    header = base64.b64encode(unquote(info).encode()).decode()
    return {info, unquote(info), password, unquote(password), header}


def known_secrets() -> list[str]:
    """Return the secrets in the environment and in the configurations read by this process, longest first."""
    found = _given | {os.environ.get(name, "").strip() for name in _VARIABLES}
    for name in _URL_VARIABLES:
        found |= _url_secrets(os.environ.get(name, "")) | _url_secrets(os.environ.get(name.lower(), ""))
    return sorted((secret for secret in found if len(secret) >= _MIN_LENGTH), key=len, reverse=True)


def redacted(value: Any, secrets: Iterable[str] | None = None) -> Any:
    """Return a copy of nested dicts, lists and strings with every secret, and the user info of URLs, replaced by `***`.

    Args:
        value: what is to be written.
        secrets: what to replace; None: `known_secrets`.
    """
    secrets = known_secrets() if secrets is None else secrets
    if isinstance(value, str):
        value = _USER_INFO.sub("***@", value)
        for secret in secrets:
            value = value.replace(secret, "***")
        return value
    return _mapped(value, lambda item: redacted(item, secrets))


def without_user_info(value: Any) -> Any:
    """Return a copy of nested dicts, lists and strings in which URLs have no user info and remain valid."""
    if isinstance(value, str):
        return _USER_INFO.sub("", value)
    return _mapped(value, without_user_info)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to the items of a dict or list; return anything else as it is."""
    if isinstance(value, Mapping):
        return {key: change(item) for key, item in value.items()}
    return [change(item) for item in value] if isinstance(value, list | tuple) else value
