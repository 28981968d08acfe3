"""Control a headless Chromium through the DevTools protocol over a pipe, without a driver or library.

https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium-headless-shell", "chromium", "google-chrome", "chromium-browser")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio", "--no-first-run")
PATIENCE = 20  # seconds that anything may take


class Page:
    """One open page. `errors` lists errors of its console, `requests` the requested addresses."""

    def __init__(self, pipe_in, pipe_out):
        self._in, self._out = pipe_in, pipe_out
        self._numbers, self._session = itertools.count(1), None
        self.errors, self.requests, self.dialogs = [], [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Send a command and return its result. Events that arrive before are recorded."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._in.write(json.dumps(message).encode() + b"\0")
        self._in.flush()
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _next(self):
        text = bytearray()
        while (byte := self._out.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        message = json.loads(text)
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"].get("exception", {}).get("description", "exception"))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])
        return message

    def open(self, url, width=1366, height=860, dark=False):
        """Load an address in a window of this size."""
        media = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=media)
        self.resize(width, height)
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def resize(self, width, height):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def evaluate(self, expression):
        """The value of a JavaScript expression."""
        how = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        result = self.call("Runtime.evaluate", expression=expression, **how)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, expression):
        """Wait until an expression is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"never: {expression}"
            time.sleep(0.02)

    def point(self, selector):
        """Move the pointer to the center of the element. Returns the coordinates."""
        found = f"document.querySelector({json.dumps(selector)})"
        box = self.evaluate(
            f"{found}.scrollIntoView({{block: 'center'}}), (b => [b.x + b.width / 2, b.y + b.height / 2])"
            f"({found}.getBoundingClientRect())"
        )
        center = {"x": box[0], "y": box[1]}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **center)
        return center

    def click(self, selector):
        """Click with mouse events."""
        center = self.point(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **center)

    def write(self, selector, text):
        """Replace the text of a field."""
        self.click(selector)
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)

    def choose(self, selector, value):
        """Select an option by its value: native option lists take no clicks in headless mode."""
        self.evaluate(
            f"(node => {{ node.value = {json.dumps(value)}; node.dispatchEvent(new Event('change')); }})"
            f"(document.querySelector({json.dumps(selector)}))"
        )

    def texts(self, selector):
        """Text content of all elements that match a selector."""
        return self.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map(node => node.textContent)")

    def picture(self, path, whole=False):
        """Save the viewport, or the full page, as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser():
    """A page of a new browser, which ends with the block."""
    program = next((path for name in NAMES if (path := shutil.which(name))), None)
    assert program, f"none of {', '.join(NAMES)} is installed; launch/test.sh installs one"
    there, to_write = os.pipe()
    to_read, back = os.pipe()
    with tempfile.TemporaryDirectory() as profile:
        # The browser reads commands at descriptor 3 and answers at 4.
        moved = ["bash", "-c", 'exec "${@:3}" 3<&"$1" 4>&"$2"', "-", str(there), str(back)]
        command = [*moved, program, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        process = subprocess.Popen(command, pass_fds=(there, back), stderr=subprocess.DEVNULL)
        os.close(there)
        os.close(back)
        try:
            with os.fdopen(to_write, "wb") as pipe_in, os.fdopen(to_read, "rb") as pipe_out:
                page = Page(pipe_in, pipe_out)
                yield page
                page._session = None
                page.call("Browser.close")
                process.wait(PATIENCE)
        finally:
            process.kill()
            process.wait()
