"""A headless Chromium, driven through its DevTools protocol: as little of it as the tests of the page need."""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NO_CHROMIUM = "no Chromium is installed (Debian: apt-get install chromium)"
_OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"]
_OPTIONS += ["--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"]
_PATIENCE = 60.0  # seconds that a page may take on a busy machine
_KEYS = {"Enter": ("Enter", 13, "\r"), " ": ("Space", 32, " "), "Tab": ("Tab", 9, ""), "Delete": ("Delete", 46, "")}
_KEYS |= {name: (name, code, "") for code, name in enumerate(("ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown"), 37)}
_KEYS |= {"Escape": ("Escape", 27, ""), "Backspace": ("Backspace", 8, "")}
_MODIFIERS = {"Alt": 1, "Control": 2, "Shift": 8}


class Page:
    """One tab. Coordinates are CSS pixels of the window."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.count = 0
        self.complaints: list[str] = []  # uncaught errors, and what the content security policy refused
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        deadline = time.monotonic() + _PATIENCE
        while True:
            message = json.loads(self.socket.recv(timeout=max(deadline - time.monotonic(), 0.01)))
            if message.get("id") == self.count:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            details = message["params"]["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description") or details["text"])
        if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.complaints.append(f"{message['params']['entry']['text']} {message['params']['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def run(self, code: str) -> Any:
        """Evaluate JavaScript, a promise waited for, and return its value."""
        answer = self.send("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> Any:
        """Wait until JavaScript gives something true, and return it."""
        deadline = time.monotonic() + _PATIENCE
        while not (value := self.run(condition)):
            assert time.monotonic() < deadline, f"waited in vain for {condition}; complaints: {self.complaints}"
            time.sleep(0.03)
        return value

    def see(self, selector: str) -> None:
        """Wait until there is such an element."""
        self.wait(f"document.querySelector({json.dumps(selector)}) !== null")

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def drag(self, *way: tuple[float, float]) -> None:
        """Press the mouse at the first point, lead it over the others and let it go at the last."""
        self._mouse("mouseMoved", way[0], 0)
        self._mouse("mousePressed", way[0], 1)
        for point in way[1:]:
            self._mouse("mouseMoved", point, 1)
        self._mouse("mouseReleased", way[-1], 0)

    def _mouse(self, kind: str, point: tuple[float, float], buttons: int) -> None:
        button = "none" if kind == "mouseMoved" else "left"
        self.send(
            "Input.dispatchMouseEvent", type=kind, x=point[0], y=point[1], button=button, buttons=buttons, clickCount=1
        )

    def click(self, selector: str) -> None:
        """Click into the middle of an element, which has to be in sight and on top."""
        found = self.wait(f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element?.scrollIntoView({{ block: "nearest" }});
            const frame = element?.getBoundingClientRect();
            const [x, y] = frame ? [frame.x + frame.width / 2, frame.y + frame.height / 2] : [0, 0];
            return frame && element.contains(document.elementFromPoint(x, y)) && [x, y];
        }})()""")
        self.drag(tuple(found))

    def touch(self, *way: tuple[float, float]) -> None:
        """As `drag`, with a finger."""
        for kind, points in [("touchStart", way[:1]), *[("touchMove", [point]) for point in way[1:]], ("touchEnd", [])]:
            self.send("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y} for x, y in points])

    def press(self, key: str, *modifiers: str, times: int = 1) -> None:
        code, number, text = _KEYS.get(key) or (f"Key{key.upper()}", ord(key.upper()), key)
        held = sum(_MODIFIERS[name] for name in modifiers)
        text = "" if held & 3 else text
        common = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": held}
        for _ in range(times):
            self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **common)
            self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Put a text where the caret is, as an input method does."""
        self.send("Input.insertText", text=text)

    def choose_file(self, selector: str, path: Path) -> None:
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def window(
        self, width: int, height: int, *, mobile: bool = False, density: float = 1.0, dark: bool = False
    ) -> None:
        """Set the window's size and kind, and what the system prefers."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=density, mobile=mobile
        )
        self.send("Emulation.setTouchEmulationEnabled", enabled=mobile)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path) -> None:
        kind = {"format": "png"} if path.suffix == ".png" else {"format": "jpeg", "quality": 88}
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", **kind)["data"]))


@contextmanager
def browsing(folder: Path) -> Iterator[Page]:
    """Start a browser with its profile in a folder, and give its tab."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *_OPTIONS, f"--user-data-dir={folder}", "about:blank"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with connect(_address(folder, process), max_size=None, compression=None, proxy=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _address(folder: Path, process: subprocess.Popen[bytes]) -> str:
    """Return the address of the first tab, once the browser has written where it listens."""
    from urllib.request import ProxyHandler, build_opener

    deadline, place = time.monotonic() + _PATIENCE, folder / "DevToolsActivePort"
    plain = build_opener(ProxyHandler({}))
    while time.monotonic() < deadline:
        assert process.poll() is None, (folder / "log").read_text(errors="replace")[-2000:]
        if place.exists() and "\n" in (written := place.read_text()):
            with plain.open(f"http://127.0.0.1:{written.splitlines()[0]}/json/list", timeout=10) as answer:
                pages = [tab for tab in json.load(answer) if tab["type"] == "page"]
            if pages:
                return str(pages[0]["webSocketDebuggerUrl"])
        time.sleep(0.05)
    raise AssertionError("Chromium did not start: " + (folder / "log").read_text(errors="replace")[-2000:])
