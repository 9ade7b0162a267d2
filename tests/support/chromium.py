"""Pages in headless Chromium, driven over the DevTools protocol through two pipes; no library is needed."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "about:blank")


def find_chromium() -> str | None:
    """Return the path of an installed Chromium or Chrome, or None."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Browser:
    """A tab of a headless Chromium; use it in a `with` statement.

    Attributes:
        requests: addresses that the tab has requested since the last `open`.
    """

    def __init__(self, program: str, profile: Path) -> None:
        self.requests: list[str] = []
        self._number = 0
        self._loaded = False
        self._unread = b""
        commands_out, self._commands = os.pipe()
        self._replies, replies_in = os.pipe()
        # Chromium reads commands from descriptor 3 and writes replies to descriptor 4.
        line = f'exec "$0" "$@" 3<&{commands_out} 4>&{replies_in}'
        self._process = subprocess.Popen(
            ["bash", "-c", line, program, "--remote-debugging-pipe", f"--user-data-dir={profile}", *_FLAGS],
            pass_fds=(commands_out, replies_in),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands_out)
        os.close(replies_in)
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network"):
            self._call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._commands)  # Chromium ends when it can read no more commands
        self._process.wait()
        os.close(self._replies)

    def open(self, page: Path, width: int, dark: bool) -> None:
        """Load a file as on a screen of this width in CSS pixels, in the light or dark color scheme."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self.requests.clear()
        self._loaded = False
        self._call("Page.navigate", url=page.absolute().as_uri())
        while not self._loaded:
            self._read()

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def download_into(self, folder: Path) -> None:
        """Save what pages download into a folder from now on."""
        self._call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page."""
        size = self._call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        picture = self._call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(picture))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        session = {"sessionId": self._session} if hasattr(self, "_session") else {}
        message = {"id": self._number, "method": method, "params": params} | session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                assert "error" not in found, (method, found["error"])
                return found["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            block = os.read(self._replies, 1 << 20)
            assert block, "Chromium has ended"
            self._unread += block
        line, _, self._unread = self._unread.partition(b"\0")
        message = json.loads(line)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        self._loaded |= message.get("method") == "Page.loadEventFired"
        return message
