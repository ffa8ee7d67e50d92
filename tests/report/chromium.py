"""Chromium without a window, driven through its own protocol (https://chromedevtools.github.io/devtools-protocol/).

Two pipes and JSON: nothing to install but the browser. selenium would add a driver of the very version of the browser,
playwright a Node.js and, mostly, a browser of its own.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find() -> str | None:
    """The path of a Chromium, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A page in a browser of its own; use it as a context.

    Attributes:
        errors: what the console, the network or a script complained of since the last `open`.
    """

    def __init__(self, binary: str, profile: Path):
        """Start the browser, with its profile in the folder `profile`."""
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()

        def as_3_and_4() -> None:  # the numbers that --remote-debugging-pipe reads from and writes to
            low, high = os.dup(to_browser), os.dup(from_browser)
            os.dup2(low, 3)
            os.dup2(high, 4)

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions",
                 "--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe", f"--user-data-dir={profile}"]  # fmt: skip
        command = [binary, *flags, "about:blank"]
        self._process = subprocess.Popen(
            command, preexec_fn=as_3_and_4, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        self.errors: list[str] = []
        (target,) = [one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive(30.0)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self, seconds: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], seconds)
            piece = os.read(self._read, 1 << 16) if ready else b""
            if not piece:
                raise TimeoutError("Chromium does not answer")
            self._buffer += piece
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(raw)
        if "method" in message:
            self.events.append(message)
            self.errors += _complaints(message)
        return message

    def open(self, path: Path, width: int, dark: bool) -> None:
        """Show a file as a screen of `width` CSS pixels does, and wait until it is there."""
        self.errors.clear()
        self.events.clear()
        phone = width < 600
        scale = 2 if phone else 1
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=scale, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.absolute().as_uri())
        end = time.monotonic() + 300
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive(end - time.monotonic())

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives; the page itself may be forbidden to run any."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 8000), "scale": 1}
        image = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(image["data"]))


def _complaints(event: dict[str, Any]) -> list[str]:
    method, told = event["method"], event["params"]
    if method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
        return [told["entry"]["text"]]
    if method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
        return [str(told["args"])]
    if method == "Runtime.exceptionThrown":
        return [told["exceptionDetails"]["text"]]
    if method == "Network.requestWillBeSent" and not told["request"]["url"].startswith(("file:", "data:")):
        return [f"asks for {told['request']['url']}"]
    return []
