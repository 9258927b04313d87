"""
Downloads contractor recordings from OpenAI's public store: plain HTTP, no account. Called by `python domains/vpt.py download`.

An index, {"basedir": url, "relpaths": [..]}, lists recordings; each is <stem>.mp4, <stem>.jsonl and, at times, <stem>-options.json. A file
is written as <name>.part and renamed when it is whole; a run that was stopped goes on inside the file. The recordings come in an
order shuffled with a fixed seed, so that a few hours are of many players, and a larger number of hours contains the smaller one.
"""
import errno
import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from tqdm import tqdm

INDEXES = "https://openaipublic.blob.core.windows.net/minecraft-rl/snapshots/"
FPS = 20


class Missing(Exception):
    """The server says that there is no such file."""


def fetch(url, path, tries=6, timeout=30, pause=1.0):
    """url -> path, resuming path.part. Missing if the server has no such file; OSError if it fails `tries` times without any progress."""
    part, failures = path.with_name(path.name + ".part"), 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        try:
            if receive(url, part, have, timeout): return os.replace(part, path)
        except urllib.error.HTTPError as error:
            if error.code in (404, 410): raise Missing(f"{error.code}") from None
            if error.code == 416: part.unlink(missing_ok=True)                 # more bytes than the file has: not this file
            reason = f"HTTP {error.code}"
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES): raise
            reason = str(error) or type(error).__name__
        progress = part.exists() and part.stat().st_size > have
        failures = 0 if progress else failures + 1
        if failures >= tries: raise OSError(f"{reason}, {tries} times")
        time.sleep(0 if progress else min(pause * 2 ** failures, 60))


def receive(url, part, have, timeout):
    """Appends what is missing to `part`; whether the file is whole now. Raises if the connection breaks, Missing for an error page."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=timeout) as reply:
        if have and not (reply.status == 206 and reply.headers.get("Content-Range", "").startswith(f"bytes {have}-")): have = 0
        length = reply.headers.get("Content-Length")
        start = reply.read(1 << 16)
        if have == 0 and start.lstrip(b"\xef\xbb\xbf \r\n").startswith(b"<"): raise Missing("a page instead of the file")
        with part.open("ab" if have else "wb") as out:
            while start:
                out.write(start)
                start = reply.read(1 << 16)
    if length is not None and part.stat().st_size < have + int(length): raise OSError("the connection closed early")
    return True


def read_index(index):
    """A file, a URL, or a name in OpenAI's store -> [(url without extension, stem)]. ValueError if it is no index."""
    try:
        if Path(index).exists(): text = Path(index).read_bytes()
        else:
            url = index if "://" in index else INDEXES + index
            with urllib.request.urlopen(url, timeout=60) as reply: text = reply.read()
    except OSError as error:
        raise ValueError(f"index {index}: neither a file nor to be had from the server ({error})") from None
    try:
        found = json.loads(text)
        base, paths = found["basedir"].rstrip("/"), [path.strip("/").removesuffix(".mp4") for path in found["relpaths"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f'index {index}: not of the form {{"basedir": url, "relpaths": [..]}}') from None
    return [(f"{base}/{path}", path.rsplit("/", 1)[-1]) for path in paths]


def fetch_recording(url, stem, out, tries=6, timeout=30, pause=1.0):
    """All files of one recording that are not there yet -> its seconds, from the lines of the jsonl. Raises as fetch does."""
    lines, video, options = (out / (stem + ending) for ending in (".jsonl", ".mp4", "-options.json"))
    for path in (lines, video, options):
        if path.exists(): continue
        try:
            fetch(url + path.name.removeprefix(stem), path, tries, timeout, pause)
        except Missing as why:
            if path != options: raise Missing(f"{path.name}: {why}") from None  # the options are a luxury
    with lines.open("rb") as text:
        return sum(1 for _ in text) / FPS


def download(index, hours, out, connections=8, tries=6, timeout=30, pause=1.0):
    """Fetches recordings until there are `hours` of them in `out`. Returns seconds and {stem: why} of those that could not be had."""
    todo = read_index(index)
    random.Random(0).shuffle(todo)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    seconds, failed, running, queue = 0, {}, {}, iter(todo)
    bar = tqdm(total=round(hours * 3600), unit="s", unit_scale=True, desc="seconds of video", mininterval=1)
    pool = ThreadPoolExecutor(connections)
    try:
        while True:
            while seconds < hours * 3600 and len(running) < connections and (job := next(queue, None)):
                running[pool.submit(fetch_recording, *job, out, tries, timeout, pause)] = job[1]
            if not running: return seconds, failed
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                stem, error = running.pop(done), done.exception()
                if isinstance(error, OSError) and error.errno: raise error     # a full disk, say: no other recording will fare better
                if error: failed[stem] = str(error)
                else:
                    seconds += done.result()
                    bar.update(round(done.result()))
                bar.set_postfix_str(f"{len(failed)} not to be had")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        bar.close()
        (out / "missing.txt").write_text("".join(f"{stem}\t{why}\n" for stem, why in sorted(failed.items())))
