"""Chromium without a driver: the DevTools protocol over a pipe (no port), text ended by NUL.

And a page to open in it, with every kind of caption.
"""

import json
import os
import select
import shutil
import subprocess
import tempfile
from contextlib import contextmanager

import numpy as np
import torch

from data import SILENCE, Tokenizer, write_stream
from runtime.dataset import Caption
from scripts import page

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
).split()
ABOUT = dict(id="<b>one</b>", split="test", source="data/toy", run="out/toy/step-000001")
RATE = 5  # steps per second
PATIENCE = 120  # seconds
TEXTS = ["open door", "walk", '</script> quote " and ünïcode']


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
            if not select.select([self.read], [], [], PATIENCE)[0]:
                raise TimeoutError(f"Chromium has not answered for {PATIENCE} seconds")
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


@contextmanager
def started():
    """A Browser with a profile of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        yield browser
        browser.close()


def episode(path, steps=60, pictures=True, K=6, also=(), **more):
    """Writes a page with every kind of caption, two at one step; returns what went into it."""
    rng, tokenizer = np.random.default_rng(0), Tokenizer.from_captions(TEXTS)
    rows = [
        dict(kind="hit", text="open door", true=[5, 9], written=[6, 7], sure=0.9, expected=""),
        dict(kind="missed", text=TEXTS[2], true=[20, 30], written=None, sure=None, expected=""),
        dict(kind="false", text="open door", true=None, written=[40, 41], sure=0.6, expected=""),
        dict(kind="false", text="walk", true=None, written=[40, 41], sure=0.51, expected=""),
        dict(kind="unknown", text="walk", true=None, written=[50, 51], sure=0.7, expected=""),
    ]
    for a in range(60, steps - 8, 6):
        rows.append(dict(kind="hit", text="walk", true=[a, a + 1], written=[a, a + 1], sure=0.8))
    rows = sorted([*rows, *also], key=lambda row: (row["written"] or row["true"])[0])
    written = [Caption(*r["written"], r["text"]) for r in rows if r["written"]]
    tok, step = map(torch.from_numpy, write_stream(written, steps, tokenizer))
    stream = tok, step, torch.from_numpy(rng.random(len(tok)))
    ids = rng.integers(0, tokenizer.vocab_size, (steps, K))
    ids[rng.random((steps, K)) < 0.5] = SILENCE
    ahead = torch.from_numpy(ids), torch.from_numpy(rng.random((steps, K)))
    frames = rng.integers(0, 256, (steps, 64, 64, 3), dtype=np.uint8) if pictures else None
    size = page.write_page(
        path,
        ABOUT,
        rows,
        stream,
        ahead,
        tokenizer,
        frames,
        **dict(rate=RATE, texts=TEXTS, silences=[]) | more,
    )
    return rows, stream, ahead, tokenizer, frames, size


@contextmanager
def showing(browser, path):
    """Opens a page of `episode`, and checks at the end that nothing went wrong or was fetched."""

    def show(at="", **about):
        told = episode(path, **about)
        browser.open("about:blank")
        browser.problems.clear()
        browser.open(f"file://{path}{at}")
        return browser, told

    yield show
    browser.js("localStorage.clear()")  # one for all local files
    assert not browser.problems


def where(browser):
    return browser.js("+document.getElementById('at').value")


def wait(browser, condition):
    again = "n++ > 500 ? done(false) : setTimeout(look, 10)"
    look = f"(function look() {{ ({condition}) ? done(true) : {again} }})()"
    assert browser.js(f"new Promise(done => {{ let n = 0; {look} }})"), condition
