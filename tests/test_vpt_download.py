"""Downloads end with whole files or with a reason, whatever the server does."""

import base64
import hashlib
import http.server
import json
import re
import threading
import time

import pytest

from domains.vpt.download import Missing, download, fetch, read_index

VIDEO = bytes(range(256)) * 4000  # 1 MB
QUICK = dict(tries=3, timeout=1, pause=0.01)


class Server(http.server.ThreadingHTTPServer):
    """files: {path: bytes}; moods: {path: [what to do at a request, ..]}; asked: (path, Range)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.moods, self.asked, self.md5 = {}, {}, [], {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        moods = self.server.moods.get(self.path, ["well"])
        mood = moods.pop(0) if len(moods) > 1 else moods[0]
        self.server.asked.append((self.path, self.headers.get("Range")))
        body = self.server.files.get(self.path)
        if body is None:
            return self.answer(
                404, b"<?xml version='1.0'?><Error><Code>BlobNotFound</Code></Error>"
            )
        if mood == "page":
            return self.answer(200, b"\xef\xbb\xbf<?xml version='1.0'?><Error/>")
        if mood == "busy":
            return self.answer(503, b"<html>")
        if mood.startswith("to "):
            self.send_response(302)
            self.send_header("Location", mood[3:])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start = (
            int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1])
            if self.headers.get("Range") and mood != "no resume"
            else 0
        )
        if start and start >= len(body):
            return self.answer(416, b"")
        self.answer(206 if start else 200, body[start:], start, mood)

    def answer(self, status, body, start=0, mood="well"):
        self.send_response(status)
        if status == 206:
            self.send_header(
                "Content-Range", f"bytes {start}-{start + len(body) - 1}/{start + len(body)}"
            )
        self.send_header("Content-Length", str(len(body)))
        if self.path in self.server.md5:
            kind = "x-ms-blob-content-md5" if status == 206 else "Content-MD5"
            self.send_header(kind, self.server.md5[self.path])
        self.end_headers()
        if mood == "cut":
            body = body[:300_000]
        if mood == "stall":
            self.wfile.write(body[:100_000])
            time.sleep(1.5)  # longer than the client waits
            return
        self.wfile.write(body)


@pytest.fixture
def server():
    server = Server()
    threading.Thread(
        target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True
    ).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "moods",
    [
        ["well"],
        ["cut", "well"],
        ["cut"],
        ["busy", "busy", "well"],
        ["stall", "well"],
        ["cut", "no resume"],
    ],
)
def test_a_file_is_whole_in_the_end(server, tmp_path, moods):
    server.files["/a"], server.moods["/a"] = VIDEO, moods
    fetch(server.url + "/a", tmp_path / "a", **QUICK)
    assert (tmp_path / "a").read_bytes() == VIDEO and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_cut_connection_goes_on_where_it_was_cut(server, tmp_path):
    server.files["/a"], server.moods["/a"] = VIDEO, ["cut", "well"]
    fetch(server.url + "/a", tmp_path / "a", **QUICK)
    assert server.asked == [("/a", None), ("/a", "bytes=300000-")]


def test_a_stopped_run_goes_on_inside_the_file(server, tmp_path):
    server.files["/a"] = VIDEO
    (tmp_path / "a.part").write_bytes(VIDEO[:700_000])
    fetch(server.url + "/a", tmp_path / "a", **QUICK)
    assert server.asked == [("/a", "bytes=700000-")] and (tmp_path / "a").read_bytes() == VIDEO


@pytest.mark.parametrize("left", [VIDEO, VIDEO + b"more"])
def test_a_part_that_cannot_be_continued_is_fetched_anew(server, tmp_path, left):
    server.files["/a"] = VIDEO
    (tmp_path / "a.part").write_bytes(left)
    fetch(server.url + "/a", tmp_path / "a", **QUICK)
    assert (tmp_path / "a").read_bytes() == VIDEO


def md5(content):
    return base64.b64encode(hashlib.md5(content).digest()).decode()


@pytest.mark.parametrize("begun", [b"", VIDEO[:500_000], b"another file" + VIDEO[12:500_000]])
def test_a_file_has_the_md5_that_the_server_tells(server, tmp_path, begun):
    server.files["/a"], server.md5["/a"] = VIDEO, md5(VIDEO)
    (tmp_path / "a.part").write_bytes(begun)
    fetch(server.url + "/a", tmp_path / "a", **QUICK)
    assert (tmp_path / "a").read_bytes() == VIDEO


def test_a_file_that_never_has_it_is_none(server, tmp_path):
    server.files["/a"], server.md5["/a"] = VIDEO, md5(b"another")
    with pytest.raises(OSError, match="its MD5 is not the one that the server tells, 3 times"):
        fetch(server.url + "/a", tmp_path / "a", **QUICK)
    assert not list(tmp_path.iterdir())


def test_a_redirect_is_followed_on_the_same_host_alone(server, tmp_path):
    server.files |= {"/a": VIDEO, "/b": VIDEO, "/c": VIDEO}
    other = Server()
    threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
    server.moods["/a"], server.moods["/b"] = [f"to {other.url}/a"], [f"to {server.url}/c"]
    with pytest.raises(Missing, match="sent on to another host"):
        fetch(server.url + "/a", tmp_path / "a", **QUICK)
    with pytest.raises(ValueError, match="neither a file .*sent on to another host"):
        read_index(server.url + "/a")
    assert not other.asked
    fetch(server.url + "/b", tmp_path / "b", **QUICK)
    assert (tmp_path / "b").read_bytes() == VIDEO
    other.shutdown()
    other.server_close()


BAD_BASES = ["http://host:80x/y", "http://host:99999/y", "file:///etc", "ftp://host/y", "/etc", ""]
BAD_BASES += ["http://ho st/y", "http:///y", "http://user@host/y", "http://h\x1b/y"]


@pytest.mark.parametrize("base", BAD_BASES)
def test_an_address_that_is_none_is_one_line(tmp_path, base):
    (tmp_path / "index.json").write_text(json.dumps(dict(basedir=base, relpaths=["a.mp4"])))
    with pytest.raises(ValueError, match="index.json: basedir .*no address|[Pp]ort") as error:
        read_index(tmp_path / "index.json")
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
    with pytest.raises(ValueError, match="^--index="):
        read_index(base + "://i.json" if "://" not in base else base)


@pytest.mark.parametrize("name", ["..", ".hidden", "", "a\nb", "x" * 300, "a\\b"])
def test_a_name_that_no_file_may_have_is_one_line(tmp_path, name):
    index = dict(basedir="http://x/y", relpaths=[f"z/{name}.mp4"])
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index.json: .* is no name of a recording"):
        read_index(tmp_path / "index.json")


def test_names_with_spaces_and_other_letters_are_asked_for(server, tmp_path):
    server.files["/a%20%C3%A9+1"] = VIDEO
    fetch(server.url + "/a é+1", tmp_path / "a", **QUICK)
    assert (tmp_path / "a").read_bytes() == VIDEO


@pytest.mark.parametrize("mood", ["page", "absent"])
def test_an_error_page_never_becomes_a_file(server, tmp_path, mood):
    server.files.update({} if mood == "absent" else {"/a": VIDEO})
    server.moods["/a"] = [mood]
    with pytest.raises(Missing):
        fetch(server.url + "/a", tmp_path / "a", **QUICK)
    assert not list(tmp_path.iterdir()) and len(server.asked) == 1


def test_a_server_that_never_answers_well_is_given_up(server, tmp_path):
    server.files["/a"], server.moods["/a"] = VIDEO, ["busy"]
    with pytest.raises(OSError, match="HTTP 503, 3 times"):
        fetch(server.url + "/a", tmp_path / "a", **QUICK)
    with pytest.raises(OSError, match="3 times"):
        fetch("http://127.0.0.1:1/a", tmp_path / "a", **QUICK)
    assert not (tmp_path / "a").exists()


# ---- an index ----


def minutes(n):
    return b'{"tick": 0}\n' * (n * 60 * 20)


def make_index(server, tmp_path, n, **lacking):
    """n recordings of one minute; the index lists them with and without .mp4."""
    stems = [f"player-{i}-f153ac423f61-20220101-00000{i}" for i in range(n)]
    for stem in stems:
        server.files |= {f"/data/10.0/{stem}.mp4": VIDEO, f"/data/10.0/{stem}.jsonl": minutes(1)}
    paths = [f"data/10.0/{stem}" + (".mp4" if i % 2 else "") for i, stem in enumerate(stems)]
    (tmp_path / "index.json").write_text(json.dumps(dict(basedir=server.url + "/", relpaths=paths)))
    return tmp_path / "index.json", stems


def test_recordings_come_with_all_their_files_and_the_absent_ones_are_listed(server, tmp_path):
    index, stems = make_index(server, tmp_path, 6)
    server.files[f"/data/10.0/{stems[0]}-options.json"] = b"{}"
    del server.files[f"/data/10.0/{stems[1]}.mp4"]
    server.moods[f"/data/10.0/{stems[2]}.jsonl"] = ["page"]
    server.moods[f"/data/10.0/{stems[3]}.mp4"] = ["busy"]
    seconds, failed = download(index, 1, tmp_path / "out", connections=3, **QUICK)
    assert seconds == 180 and failed.keys() == {stems[1], stems[2], stems[3]}
    assert "404" in failed[stems[1]] and "a page" in failed[stems[2]] and "503" in failed[stems[3]]
    assert {
        line.split("\t")[0] for line in (tmp_path / "out/missing.txt").read_text().splitlines()
    } == failed.keys()
    there = {p.name for p in (tmp_path / "out").iterdir()}
    assert there == {
        "missing.txt",
        f"{stems[0]}-options.json",
        f"{stems[1]}.jsonl",
        f"{stems[3]}.jsonl",
    } | {stem + ending for stem in (stems[0], stems[4], stems[5]) for ending in (".mp4", ".jsonl")}


def test_it_stops_at_the_hours_asked_for_and_more_hours_keep_what_is_there(server, tmp_path):
    index, _ = make_index(server, tmp_path, 8)
    seconds, _ = download(index, 2.5 / 60, tmp_path / "out", connections=1, **QUICK)
    first = {p.name for p in (tmp_path / "out").glob("*.mp4")}
    server.asked.clear()
    download(index, 5 / 60, tmp_path / "out", connections=1, **QUICK)
    asked = {path.rsplit("/", 1)[-1] for path, _ in server.asked}
    download(index, 2.5 / 60, tmp_path / "again", connections=1, **QUICK)
    assert (
        seconds == 180
        and len(first) == 3
        and first == {p.name for p in (tmp_path / "again").glob("*.mp4")}
    )
    assert first < {p.name for p in (tmp_path / "out").glob("*.mp4")}
    assert not asked & first


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "<?xml?>",
        '{"relpaths": ["a"]}',
        '{"basedir": "x", "relpaths": [3]}',
        '{"basedir": null}',
    ],
)
def test_an_index_of_another_form_is_one_clear_error(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json: not of the form"):
        read_index(tmp_path / "index.json")


def test_an_index_from_a_server_is_read_and_an_absent_one_is_one_clear_error(server):
    server.files["/i.json"] = json.dumps(
        dict(basedir="http://x/y", relpaths=["data/10.0/a-b.mp4", "/c"])
    ).encode()
    assert read_index(server.url + "/i.json") == [
        ("http://x/y/data/10.0/a-b", "a-b"),
        ("http://x/y/c", "c"),
    ]
    with pytest.raises(ValueError, match="neither a file nor"):
        read_index(server.url + "/j.json")
