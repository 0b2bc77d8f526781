"""A page in headless Chromium, driven through its DevTools protocol on two pipes: no driver, no port, no network."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
#: Events by which a page complains.
COMPLAINTS = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")


@dataclass
class Page:
    """A tab. `complaints` is all that came to its console, `requests` every address that it asked for."""

    process: subprocess.Popen[bytes]
    to: int
    back: int
    session: str | None = None
    number: int = 0
    rest: bytes = b""
    events: list[dict[str, Any]] = field(default_factory=list)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call the protocol, and wait for its answer; events on the way are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        os.write(self.to, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while (found := self._next()).get("id") != self.number:
            self.events.append(found)
        assert "error" not in found, found
        result: dict[str, Any] = found["result"]
        return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            read = os.read(self.back, 1 << 20)
            assert read, f"Chromium has ended with code {self.process.wait(10)}"
            self.rest += read
        message, _, self.rest = self.rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def show(self, file: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Open a file in a window of that size, and wait until it is loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=file.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def ask(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page, which is plain data or a promise of that."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """A key pressed and let go."""
        code = {"Tab": 9, "Enter": 13, " ": 32, "ArrowDown": 40}[key]
        text = {"text": {"Enter": "\r", " ": " "}[key]} if key in ("Enter", " ") else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)

    def until(self, expression: str) -> Any:
        """The value of an expression as soon as it is true."""
        look = (
            f"const look = () => {{ const found = {expression}; found ? done(found) : setTimeout(look, 20); }}; look();"
        )
        return self.ask(f"new Promise((done) => {{ {look} }})")

    def hover(self, selector: str, place: str) -> None:
        """The mouse to a point of an element's first match; `place` gives it as `[x, y]` from a corner, of `box`, in JavaScript."""
        x, y = self.ask(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)}), [x, y] = {place}; "
            "box.scrollIntoView({ block: 'center', behavior: 'instant' }); "
            "const at = box.getBoundingClientRect(); return [at.left + x, at.top + y]; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, file: Path) -> None:
        """All of the page as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    @property
    def complaints(self) -> list[str]:
        self.ask("0")  # what happened before has been told by then
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in COMPLAINTS]

    @property
    def requests(self) -> list[str]:
        self.ask("0")
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]


def look(tab: Page, file: Path, *, width: int, dark: bool, modules: int) -> None:
    """Open a run's report in a window of that width, and check that it is whole, quiet, and that no table of it is cut."""
    tab.show(file, width=width, dark=dark)
    assert tab.complaints == []
    assert tab.requests == [file.resolve().as_uri()]
    assert tab.ask("innerWidth") == width
    assert tab.ask("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert tab.ask("document.querySelectorAll('.chart svg').length") == 5
    assert tab.ask("document.querySelectorAll('#losses tbody tr').length") == modules
    assert tab.ask("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    shown = "[...document.querySelectorAll('.scroll')].filter((box) => !box.closest('details'))"
    assert tab.ask(f"{shown}.filter((box) => box.scrollWidth > box.clientWidth).map((box) => box.innerText)") == []


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A new Chromium with one empty tab, and a profile of its own."""
    assert CHROMIUM is not None
    down, up = os.pipe(), os.pipe()

    moved = f'exec "$@" 3<&{down[0]} 4>&{up[1]}'  # Chromium reads commands from 3 and writes to 4
    process = subprocess.Popen(
        ["bash", "-c", moved, "bash", CHROMIUM, *FLAGS, f"--user-data-dir={profile}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(down[0], up[1]),
        start_new_session=True,
        env={**os.environ, "HOME": str(profile)},
    )
    os.close(down[0])
    os.close(up[1])
    page = Page(process, down[1], up[0])
    try:
        target = page.call("Target.createTarget", url="about:blank")["targetId"]
        page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        yield page
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(down[1])
        os.close(up[0])
