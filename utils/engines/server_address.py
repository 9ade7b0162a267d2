"""The address of a server that runs the model, on this machine unless another is explicitly allowed."""

import ipaddress
from typing import NamedTuple
from urllib.parse import urlsplit

from model.errors import UserError

DEFAULT_CONCURRENCY = 8


class ServerAddress(NamedTuple):
    """A server.

    Attributes:
        url: base address of the API, such as http://127.0.0.1:8000/v1.
        model: name of the model, as the server lists it; None if it serves only one.
        concurrency: number of prompts that are answered at once.
        allow_remote: whether the server may be another machine.
        log_probabilities: whether to ask for them, which not every server supports.
    """

    url: str
    model: str | None = None
    concurrency: int = DEFAULT_CONCURRENCY
    allow_remote: bool = False
    log_probabilities: bool = False

    def require_allowed(self) -> None:
        """Raise UserError unless the address is valid, and on this machine or explicitly allowed."""
        host = self._host()
        if not host:
            shown = self.url.partition("?")[0]  # without a key
            raise UserError(f"--server is {shown!r}; expected an address such as http://127.0.0.1:8000/v1.")
        if not (self.allow_remote or _is_this_machine(host)):
            raise UserError(
                f"--server {self.url} is another machine, and notes would be sent there. Give --allow_remote if they "
                "may leave this machine."
            )

    def _host(self) -> str | None:
        """Return the host's name; None if the address is not valid."""
        try:
            parts = urlsplit(self.url)
            valid = parts.scheme in ("http", "https") and parts.port != 0 and not (parts.query or parts.fragment)
        except ValueError:  # of brackets or the port
            return None
        return parts.hostname if valid and " " not in self.url else None


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
