"""A headless Chromium that tests drive through a pipe, in its own protocol: no driver and no sockets needed."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LIMIT_S = 60


class Browser:
    """One page at a time. `errors` are exceptions and errors on its console; `requests` what it asked of anyone."""

    def __init__(self, profile: Path, width: int = 1280) -> None:
        assert PROGRAM is not None
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        options = (
            f"--headless --no-sandbox --disable-gpu --no-first-run --window-size={width},900 --remote-debugging-pipe"
        )
        command = f'exec "{PROGRAM}" {options} --user-data-dir="{profile}" 3<&{to_browser} 4>&{from_browser}'
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(["bash", "-c", command], pass_fds=(to_browser, from_browser), **quiet)
        os.close(to_browser)
        os.close(from_browser)
        self._unread, self._sent, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def open(self, file: Path) -> None:
        """Load a file, and wait until all of it is there."""
        self.events.clear()
        self.call("Page.navigate", url=file.resolve().as_uri())
        self._wait(lambda message: message.get("method") == "Page.loadEventFired")

    def run(self, script: str) -> Any:
        """The value of an expression on the page; what it throws fails the test."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    @property
    def errors(self) -> list[dict[str, Any]]:
        self.run("1")  # by its answer, what came before it has come
        entries = [event["params"] for event in self.events if event["method"] == "Log.entryAdded"]
        thrown = [event["params"] for event in self.events if event["method"] == "Runtime.exceptionThrown"]
        said = [event["params"] for event in self.events if event["method"] == "Runtime.consoleAPICalled"]
        return [*thrown, *said, *(each for each in entries if each["entry"]["level"] in ("error", "warning"))]

    @property
    def requests(self) -> list[str]:
        self.run("1")
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in sent]

    def call(self, method: str, **parameters: Any) -> Any:
        """The answer to one command."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        answer = self._wait(lambda message: message.get("id") == self._sent)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _wait(self, wanted: Any) -> dict[str, Any]:
        """The next message that is wanted; events on the way are kept."""
        until = time.monotonic() + LIMIT_S
        while True:
            message = self._read(until)
            if "method" in message:
                self.events.append(message)
            if wanted(message):
                return message

    def _read(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._in], [], [], max(until - time.monotonic(), 0))
            assert ready, f"the browser was silent for {LIMIT_S} s"
            part = os.read(self._in, 1 << 20)
            assert part, "the browser is gone"
            self._unread += part
        message, _, self._unread = self._unread.partition(b"\0")
        read: dict[str, Any] = json.loads(message)
        return read
