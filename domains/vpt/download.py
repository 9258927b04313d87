"""
Downloads contractor recordings of Minecraft from OpenAI's public store: plain HTTP, no account.

    python -m domains.vpt.download --index=all_10xx_Jun_29.json --hours=20 --out=recordings

An index, {"basedir": url, "relpaths": [..]}, lists recordings: <stem>.mp4, <stem>.jsonl and, at
times, <stem>-options.json. A file is written as <name>.part and renamed when it is whole; the same
command goes on inside the file where it was stopped. The order is shuffled with a fixed seed, so
that a few hours are of many players, and more hours contain the fewer. Nothing is fetched from
another host than the one named, and a file must have the MD5 that the server tells, if it does.
"""

from configurator import check_range, configure, run
import base64
import errno
import hashlib
import http.client
import os
import random
import re
import string
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from urllib.parse import quote, urlsplit

from tqdm import tqdm

from runtime.files import parse_json, regular_file, replace

index = ""  # of recordings: a name in OpenAI's store (all_10xx_Jun_29.json), a URL or a file
hours = 0.0  # of video to have in the end; about 2 GB each
out = ""  # folder to write
connections = 8  # recordings at a time


class Missing(Exception):
    """There is no such file on the server."""


class SameHost(urllib.request.HTTPRedirectHandler):
    """Follows no redirect to another host."""

    def redirect_request(self, request, reply, code, message, headers, target):
        if urlsplit(target)[:2] != urlsplit(request.full_url)[:2]:
            raise Missing(f"sent on to another host, {target!r:.80}")
        return super().redirect_request(request, reply, code, message, headers, target)


INDEXES = "https://openaipublic.blob.core.windows.net/minecraft-rl/snapshots/"
NAME = r"\w[^\x00-\x1f\x7f-\x9f/\\]{0,149}"  # of a recording, and so of files
FPS = 20
PIECE = 1 << 16  # bytes read at a time
NO_USE = errno.ENOSPC, errno.EDQUOT, errno.EACCES  # trying again will not help

# -----------------------------------------------------------------------------
# one file


def fetch(url, path, tries=6, timeout=30.0, pause=1.0):
    """url -> path, resuming path.part. timeout, pause: seconds.

    Raises Missing if there is no such file, OSError after `tries` times without progress.
    """
    part = path.with_name(path.name + ".part")
    failures = 0
    while True:
        before = size(part)
        reason = receive(url, part, timeout)
        if not reason:
            return os.replace(part, path)
        if size(part) > before:
            failures = 0
            continue
        failures += 1
        if failures >= tries:
            raise OSError(f"{reason}, {tries} times")
        time.sleep(min(pause * 2**failures, 60))


def address(url):
    """A URL as it is asked for. Raises ValueError for what is none of HTTP."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not re.fullmatch(r"[\w.\[\]:-]+", parts.netloc):
        raise ValueError(f"{url!r:.80}: no address http://..")
    if parts.port == 0:  # to ask for what is no port raises ValueError as well
        raise ValueError("Port 0 is none")
    return quote(url, safe=string.punctuation)


def ask(url, timeout, **headers):
    request = urllib.request.Request(address(url), headers=headers)
    return urllib.request.build_opener(SameHost).open(request, timeout=timeout)


def size(path):
    return path.stat().st_size if path.exists() else 0


def receive(url, part, timeout):
    """Appends to `part` what is missing. Returns why it could not, "" if the file is whole now."""
    try:
        append(url, part, timeout)
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise Missing(f"{error.code}") from None
        if error.code == 416:  # more bytes than the file has: not this file
            part.unlink(missing_ok=True)
        return f"HTTP {error.code}"
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "errno", None) in NO_USE:
            raise
        return str(error) or type(error).__name__
    return ""


def append(url, part, timeout):
    start = size(part)
    headers = {"Range": f"bytes={start}-"} if start else {}
    with ask(url, timeout, **headers) as reply:
        if not reply.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            start = 0  # the server sends all of it
        piece = reply.read(PIECE)
        if start == 0 and piece.lstrip(b"\xef\xbb\xbf \r\n").startswith(b"<"):
            raise Missing("a page instead of the file")
        with part.open("ab" if start else "wb") as file:
            while piece:
                file.write(piece)
                piece = reply.read(PIECE)
        length = int(reply.headers.get("Content-Length") or 0)
        of_all = None if start else reply.headers.get("Content-MD5")
        md5 = reply.headers.get("x-ms-blob-content-md5", of_all)
    if size(part) < start + length:
        raise OSError("the connection closed early")
    if md5 and base64.b64decode(md5) != md5_of(part):
        part.unlink()
        raise OSError("its MD5 is not the one that the server tells")


def md5_of(path):
    md5 = hashlib.md5()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            md5.update(piece)
    return md5.digest()


# -----------------------------------------------------------------------------
# recordings


def read_index(index):
    """[(url without ending, stem)] of a file, a URL or a name in OpenAI's store. ValueError."""
    try:
        text = regular_file(index).read_bytes() if Path(index).exists() else read_url(index)
    except (OSError, ValueError) as error:
        raise ValueError(f"--index={index}: neither a file nor on the server ({error})") from None
    try:
        content = parse_json(text)
        base = content["basedir"].rstrip("/")
        paths = [path.strip("/").removesuffix(".mp4") for path in content["relpaths"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        form = '{"basedir": url, "relpaths": [..]}'
        raise ValueError(f"--index={index}: not of the form {form}") from None
    try:
        address(base)
    except ValueError as error:
        raise ValueError(f"--index={index}: basedir {error}") from None
    jobs = [(f"{base}/{path}", path.rsplit("/", 1)[-1]) for path in paths]
    for _, stem in jobs:
        if not re.fullmatch(NAME, stem):
            raise ValueError(f"--index={index}: {stem!r:.80} is no name of a recording")
    return jobs


def read_url(index):
    url = index if "://" in index else INDEXES + index
    try:
        with ask(url, timeout=60) as reply:
            return reply.read()
    except (Missing, http.client.HTTPException) as error:
        raise OSError(error) from None


def fetch_recording(url, stem, out, **patience):
    """Fetches the files of a recording that are not there yet. Returns its seconds.

    Raises what fetch raises.
    """
    for ending in (".jsonl", ".mp4", "-options.json"):
        path = out / (stem + ending)
        if path.exists():
            continue
        try:
            fetch(url + ending, path, **patience)
        except Missing as why:
            if ending != "-options.json":  # the options are a luxury
                raise Missing(f"{path.name}: {why}") from None
    with open(out / f"{stem}.jsonl", "rb") as lines:
        return sum(1 for _ in lines) / FPS


def download(index, hours, out, connections=8, **patience):
    """Fetches recordings until `hours` of them are in `out`.

    Returns seconds, and {stem: why} of what could not be had, which missing.txt lists too.
    """
    jobs = read_index(index)
    random.Random(0).shuffle(jobs)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    queue, wanted = iter(jobs), hours * 3600
    seconds, missing, running = 0, {}, {}
    pool = ThreadPoolExecutor(connections)
    bar = tqdm(total=round(wanted), unit="s", unit_scale=True, desc="seconds of video")
    try:
        while True:
            while seconds < wanted and len(running) < connections and (job := next(queue, None)):
                running[pool.submit(fetch_recording, *job, out, **patience)] = job[1]
            if not running:
                return seconds, missing
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                seconds += seconds_of(done, running.pop(done), missing)
            bar.n = round(seconds)
            bar.set_postfix_str(f"{len(missing)} missing")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        bar.close()
        lines = "".join(f"{stem}\t{why}\n" for stem, why in sorted(missing.items()))
        path = out / "missing.txt"
        replace(path, lambda beside: beside.write_text(lines, encoding="utf-8"))


def seconds_of(done, stem, missing):
    """Of a recording that was fetched; 0, and noted as missing, if it could not be had."""
    error = done.exception()
    if not error:
        return done.result()
    if getattr(error, "errno", None):
        raise error  # a full disk, say: no other recording will fare better
    missing[stem] = str(error)
    return 0


def main():
    configure(globals())
    if not index or not out:
        raise ValueError("--index, --hours and --out are needed; --help explains them")
    check_range(globals(), 0.01, "hours", most=1e6)
    check_range(globals(), 1, "connections", most=100)
    try:
        seconds, missing = download(index, hours, out, connections)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for the connections
    print(f"{seconds / 3600:.2f} hours in {out}, {len(missing)} recordings in {out}/missing.txt")
    if not seconds:
        raise ValueError("nothing could be downloaded")


if __name__ == "__main__":
    run(main)
