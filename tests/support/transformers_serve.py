"""A real `transformers serve` on the loopback address."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.support.patience import wait_until


@contextlib.contextmanager
def transformers_serve(folder: Path, log: Path, *options: str) -> Iterator[str]:
    """Serve the model of a folder on the CPU, and yield the address of the API once it answers.

    Args:
        folder: of the model.
        log: what the server writes.
        options: more options of `transformers serve`.

    Raises:
        AssertionError: the server ends, with what it wrote to `log`.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", folder, "--device", "cpu", *options]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, *address], env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=file, stderr=file
        )

    def is_healthy() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health").read())
        except OSError:
            return False

    try:
        wait_until(is_healthy, f"no answer of the server: {log}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
