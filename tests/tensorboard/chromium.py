"""Headless Chromium, driven over the DevTools protocol through two pipes: nothing to install but the browser."""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
EXECUTABLE = next((found for name in NAMES if (found := shutil.which(name))), None)

LAUNCHER = "import os, sys; a = sys.argv; os.dup2(int(a[1]), 3); os.dup2(int(a[2]), 4); os.execv(a[3], a[3:])"


class Browser:
    """One page. A failing script raises RuntimeError; so does a page that does not get where it is awaited."""

    def __init__(self, profile: Path, downloads: Path, size=(1440, 900), dark=False):
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # Chromium reads from 3 and writes to 4; copies above 10 cannot be in the way of that.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser, from_browser)]
        command = [
            EXECUTABLE, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-gpu",
            "--no-first-run", "--hide-scrollbars", "--disable-dev-shm-usage", f"--window-size={size[0]},{size[1]}",
            *(["--no-sandbox"] if os.geteuid() == 0 else []), "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, *map(str, ends), *command],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (to_browser, from_browser, *ends):
            os.close(end)
        self._rest, self._number, self._session = b"", 0, None
        self.console: list[str] = []
        (target,) = [t for t in self._send("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self._send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._send(f"{domain}.enable")
        self.resize(*size)
        if dark:
            self.darken()
        self._send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads), browser=True)

    def resize(self, width, height):
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def darken(self):
        feature = {"name": "prefers-color-scheme", "value": "dark"}
        self._send("Emulation.setEmulatedMedia", features=[feature])

    def _send(self, method, browser=False, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session and not browser:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._note(answer)

    def _receive(self):
        while b"\0" not in self._rest:
            chunk = os.read(self._read, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser has ended")
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def _note(self, event):
        """Keep uncaught errors and what the browser itself complains of, such as blocked scripts."""
        content = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            details = content["exceptionDetails"]
            self.console.append(details.get("exception", {}).get("description") or details["text"])
        if event.get("method") == "Log.entryAdded" and content["entry"]["level"] == "error":
            self.console.append(f"{content['entry']['text']} {content['entry'].get('url', '')}")

    def go(self, url):
        self._send("Page.navigate", url=url)

    def run(self, script):
        """The value of an expression, awaited."""
        answer = self._send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails'].get('exception', {}).get('description')}")
        return answer["result"].get("value")

    def until(self, script, seconds=60.0):
        """The value of an expression, as soon as it is true; scripts may fail until then."""
        end = time.monotonic() + seconds
        problem = ""
        while time.monotonic() < end:
            try:
                if value := self.run(script):
                    return value
            except RuntimeError as error:
                problem = str(error)
            time.sleep(0.1)
        raise RuntimeError(f"not within {seconds} s: {script} {problem} {self.console}")

    def mouse(self, x, y, kind="mouseMoved", **more):
        self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, x, y):
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(x, y, kind, button="left", clickCount=1)

    def key(self, name):
        for kind in ("keyDown", "keyUp"):
            self._send("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def screenshot(self, file):
        Path(file).write_bytes(base64.b64decode(self._send("Page.captureScreenshot")["data"]))

    def close(self):
        with contextlib.suppress(RuntimeError, OSError):  # it may go before it has answered
            self._send("Browser.close", browser=True)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)
