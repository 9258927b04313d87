"""Chromium without a driver: the DevTools protocol over a pipe (no port), text ended by NUL."""

import json
import os
import shutil
import subprocess

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
).split()


class Browser:
    """One page. `problems` collects errors, and requests that are not for a local file or data."""

    def __init__(self, profile):
        reads, self.write = os.pipe()
        self.read, writes = os.pipe()
        command = f'exec "$@" 3<&{reads} 4>&{writes}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, "bash", CHROMIUM, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        self.count, self.rest, self.session, self.problems = 0, b"", None, []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(domain + ".enable")

    def message(self):
        while b"\0" not in self.rest:
            data = os.read(self.read, 1 << 16)
            if not data:
                raise EOFError("Chromium has ended")
            self.rest += data
        text, _, self.rest = self.rest.partition(b"\0")
        event = json.loads(text)
        method, about = event.get("method"), event.get("params", {})
        if (
            method == "Runtime.exceptionThrown"
            or method == "Log.entryAdded"
            and about["entry"]["level"] == "error"
            or method == "Runtime.consoleAPICalled"
            and about["type"] == "error"
            or method == "Network.requestWillBeSent"
            and about["request"]["url"].split(":")[0] not in ("file", "data", "about")
        ):
            self.problems.append(about)
        return event

    def __call__(self, method, **parameters):
        self.count += 1
        call = dict(id=self.count, method=method, params=parameters) | (
            dict(sessionId=self.session) if self.session else {}
        )
        os.write(self.write, json.dumps(call).encode() + b"\0")
        while (answer := self.message()).get("id") != self.count:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, url):
        self("Page.navigate", url=url)
        while self.message().get("method") != "Page.loadEventFired":
            pass

    def js(self, expression):
        """The value of a JavaScript expression; a promise is awaited."""
        answer = self(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def key(self, name, **more):
        for kind in ("keyDown", "keyUp"):
            text = dict(text=name) if len(name) == 1 and kind == "keyDown" else {}
            self(
                "Input.dispatchKeyEvent",
                type=kind,
                key=name,
                code="Space" if name == " " else name,
                **text,
                **more,
            )

    def close(self):
        self.process.terminate()
        self.process.wait(10)
        os.close(self.read)
        os.close(self.write)
