import errno
import io
import json
import os
import shutil
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import program

from runtime.dataset import Episodes
from scripts import frames

av = pytest.importorskip("av")
transformers = pytest.importorskip("transformers")
TICK = Fraction(1, 12800)  # of seconds


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """A random DINOv2 of 28 x 28 pixels, as published ones lie in a folder."""
    folder = tmp_path_factory.mktemp("backbone")
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.Dinov2Config(image_size=28, patch_size=14, **sizes)
    transformers.Dinov2Model(config).save_pretrained(folder)
    crop = dict(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    transformers.BitImageProcessor(**crop).save_pretrained(folder)
    return folder


def grey(level):
    return np.full((36, 64, 3), level, np.uint8)


def make_video(path, shown, turned=0, stands=0):
    """A lossless video of [(seconds, frame (h, w, 3) uint8), ..], the last of which stands."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", options=dict(qp="0", bf="0"))
        stream.height, stream.width = shown[0][1].shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = "rgb24", TICK
        if turned:
            stream.set_display_rotation(turned)
        for seconds, image in shown:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(seconds / TICK), TICK
            container.mux(stream.encode(frame))
        for packet in stream.encode():
            packet.duration = round(stands / TICK) or packet.duration
            container.mux(packet)
    return path


def ten_a_second(path, levels, begin=0.0):
    return make_video(path, [(begin + i / 10, grey(level)) for i, level in enumerate(levels)])


def levels(path, fps):
    """The grey level that each step of a video sees."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "fps", fps)
        return [np.asarray(image)[0, 0, 0] for image, n in frames.sampled(path) for _ in range(n)]


def test_a_step_sees_what_is_on_the_screen_at_its_time(tmp_path):
    times = [0, 0.1, 0.15, 1.0, 1.05, 1.45]  # a frame lasts until the next, the last 0.4 s
    path = make_video(tmp_path / "a.mp4", [(t, grey(10 * i)) for i, t in enumerate(times)])
    # at 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75 seconds
    assert levels(path, 4.0) == [0, 20, 20, 20, 30, 40, 50, 50]
    assert levels(path, 1.0) == [0, 30]


def test_rounded_time_stamps_skip_and_double_nothing(tmp_path):
    shown = [(i / 30, grey(5 * i)) for i in range(40)]
    path = make_video(tmp_path / "a.mkv", shown)  # Matroska rounds to milliseconds
    assert levels(path, 30.0) == [5 * i for i in range(40)]


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_a_last_frame_that_stands_counts_as_long_as_it_says(tmp_path, ending):
    shown = [(i / 10, grey(10 * i)) for i in range(10)]
    path = make_video(tmp_path / f"a.{ending}", shown, stands=1.1)
    assert levels(path, 10.0) == [10 * min(i, 9) for i in range(20)]
    assert levels(path, 5.0) == [0, 20, 40, 60, 80] + [90] * 5
    path = make_video(path, [(3 * i, grey(10 * i)) for i in range(3)], stands=4)
    assert levels(path, 1.0) == [0] * 3 + [10] * 3 + [20] * 4
    path = make_video(path, [(3 * i, grey(10 * i)) for i in range(3)], stands=2)
    assert levels(path, 1.0) == [0] * 3 + [10] * 3 + [20] * 3  # as the one before


def test_a_name_with_a_colon_is_no_protocol(tmp_path, monkeypatch):
    ten_a_second(tmp_path / "a.mp4", range(6)).rename(tmp_path / "cam-1:front.mp4")
    monkeypatch.chdir(tmp_path)
    assert levels("cam-1:front.mp4", 5.0) == [0, 2, 4]


def encode(path, codec, frames, **options):
    """A video as the codec makes it, 25 frames a second; a sound where there are no frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25 if frames else 44100, options=options)
        if not frames:
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            sound.rate = 44100
            frames = [sound]
        else:
            stream.width, stream.height, stream.pix_fmt = 64, 36, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_what_is_no_video_is_told_with_what_makes_one_of_it(tmp_path):
    shown = [av.VideoFrame.from_ndarray(grey(9 * i), format="rgb24") for i in range(20)]
    remux = r"; remux it: ffmpeg -i '.*/a.{}' -c copy '.*/a.mp4', or without"
    raw = encode(tmp_path / "a.h264", "libx264", shown)
    with pytest.raises(ValueError, match="a frame without a time stamp" + remux.format("h264")):
        levels(raw, 5.0)
    disordered = encode(tmp_path / "a.avi", "libx264", shown, bf="3")
    with pytest.raises(ValueError, match="the time stamps jump .* s" + remux.format("avi")):
        levels(disordered, 5.0)
    with pytest.raises(ValueError, match="there is no video in it"):
        levels(encode(tmp_path / "a.m4a", "aac", []), 5.0)


def test_time_counts_from_the_first_frame(tmp_path):
    path = ten_a_second(tmp_path / "a.mkv", range(6), begin=7.3)
    assert levels(path, 5.0) == [0, 2, 4]
    assert levels(ten_a_second(tmp_path / "b.mkv", [70]), 5.0) == [70]


@pytest.mark.skipif("not hasattr(av.VideoStream, 'set_display_rotation')", reason="PyAV is old")
def test_a_frame_is_upright(tmp_path):
    image = grey(0)
    image[:, :32] = 255  # white on the left
    path = make_video(tmp_path / "a.mp4", [(0, image), (1, image)], turned=-90)  # clockwise
    shown = np.asarray(next(frames.sampled(path))[0])
    assert shown.shape == (64, 36, 3) and shown[:32].min() == 255  # white above


@pytest.fixture
def clips(tmp_path):
    """Three videos of two seconds of noise, ten frames a second."""
    rng = np.random.default_rng(0)
    (tmp_path / "clips").mkdir()
    for name in "abc":
        shown = [(i / 10, rng.integers(0, 256, (36, 64, 3), np.uint8)) for i in range(20)]
        make_video(tmp_path / f"clips/{name}.mkv", shown)
    return tmp_path / "clips"


def run(clips, backbone, **settings):
    """`python -m scripts.frames`: exit code, last line of stderr, {array: when it was written}."""
    folder = clips.parent / "episodes"
    given = dict(videos=f"{clips}/*", out=folder, backbone=backbone) | settings
    arguments = [f"--{name}={value}" for name, value in given.items()]
    code, _, error = program("scripts/frames.py", *arguments)
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    return code, error.strip().splitlines()[-2:], written


def frame_of(path, number):
    with av.open(str(path)) as video:
        return list(video.decode(video=0))[number].to_ndarray(format="rgb24")


def test_an_embedding_is_the_librarys_of_the_whole_frame(clips, backbone):
    run(clips, backbone)
    rows = np.load(clips.parent / "episodes/b.npy")  # 0.6 seconds are step 3, frame 6
    about = transformers.BitImageProcessor.from_pretrained(backbone)
    same = dict(image_mean=about.image_mean, image_std=about.image_std, resample=3)
    square = transformers.ViTImageProcessor(size=dict(height=28, width=28), **same)  # never crops
    model = transformers.Dinov2Model.from_pretrained(backbone)
    with torch.no_grad():
        pixels = square(images=frame_of(clips / "b.mkv", 6), return_tensors="pt")
        right = model(**pixels).pooler_output[0].numpy()
    assert rows.shape == (10, 16) and abs(rows[3] - right).max() < 1e-5
    assert abs(rows[2] - right).max() > 1e-2


def test_the_same_command_goes_on_and_reads_what_changed(clips, backbone):
    first = run(clips, backbone, videos=clips / "a.mkv")[2]
    second = run(clips, backbone)[2]
    assert len(second) == 6 and first.items() <= second.items()
    ten_a_second(clips / "b.mkv", range(6))
    (clips.parent / "episodes/c.npy").unlink()
    third = run(clips, backbone)[2]
    assert {name[0] for name in third if third[name] != second[name]} == {"b", "c"}
    assert len(np.load(clips.parent / "episodes/b.npy")) == 3
    code, error, fourth = run(clips, backbone, fps=4.0)
    assert code == 2 and "made otherwise (fps 5.0 not 4.0)" in error[-1] and fourth == third
    (clips / "b.mkv").unlink()
    code, error, fifth = run(clips, backbone)
    stale = "has 1 episodes of videos that are not named now, such as b: remove"
    assert code == 0 and stale in error[-1] and fifth == third


def test_joined_parts_are_the_files_of_one_call(clips, backbone):
    def contents():
        return {path.name: path.read_bytes() for path in (clips.parent / "episodes").iterdir()}

    run(clips, backbone)
    whole = contents()
    shutil.rmtree(clips.parent / "episodes")
    two = run(clips, backbone, part="2/2")[2]
    assert two.keys() == {"b.npy", "b-pictures.npy"}
    one = run(clips, backbone, part="1/2")[2]
    (clips.parent / "episodes/c.npy").unlink()  # as if it had died
    again = run(clips, backbone, part="1/2")[2]
    assert {name for name in one if again[name] != one[name]} == {"c.npy", "c-pictures.npy"}
    assert run(clips, backbone)[2] == again and contents() == whole  # to join them is to read none


@pytest.mark.parametrize("length", [0, 100, 40_000])  # of some 140,000 bytes
def test_a_broken_video_is_a_line_and_the_others_go_on(clips, backbone, length):
    path = clips / "b.mkv"
    path.write_bytes(path.read_bytes()[:length])
    code, error, written = run(clips, backbone)
    assert code == 2 and str(path) in error[0] and "1 of 3 videos were not read" in error[1]
    assert sorted(written) == ["a-pictures.npy", "a.npy", "c-pictures.npy", "c.npy"]


def test_weights_that_lack_a_layer_are_refused(clips, backbone):
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    folder = clips.parent / "vit"
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    transformers.ViTImageProcessor().save_pretrained(folder)
    code, error, _ = run(clips, folder)
    assert code == 2 and "its weights lack pooler" in error[-1]


def test_packed_pictures_are_those_of_the_steps(clips, backbone):
    run(clips, backbone)
    rows = "".join(f"{name},3,4,noise\n" for name in "abc")
    (clips / "captions.csv").write_text("episode,start,end,text\n" + rows)
    obs, out = f"--obs={clips.parent}/episodes/*.npy", clips / "mine"
    program("scripts/pack.py", obs, f"--out={out}", f"--captions={clips}/captions.csv")
    for episodes in (Episodes(out, split) for split in ("train", "val", "test")):
        frame = frame_of(clips / f"{episodes[0].id}.mkv", 6)
        assert len(episodes) == 1 and np.array_equal(episodes[0].pictures[3], frame)


def test_the_files_of_a_backbone_are_never_run(clips, backbone, monkeypatch):
    folder = clips.parent / "own"
    shutil.copytree(backbone, folder)
    (folder / "own.py").write_text(f"open({str(clips.parent / 'ran')!r}, 'w')\nclass Own: pass\n")
    for name, kinds in {
        "config.json": ("AutoConfig", "AutoModel"),
        "preprocessor_config.json": ("AutoImageProcessor",),
    }.items():
        about = json.loads((folder / name).read_text())
        about["auto_map"] = {kind: "own.Own" for kind in kinds}
        about["model_type"] = about["image_processor_type"] = "own"
        (folder / name).write_text(json.dumps(about))
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 9))
    code, said, _ = run(clips, folder)
    assert code == 2 and "--backbone=" in said[-1] and not (clips.parent / "ran").exists()


def test_a_video_that_cannot_be_opened_or_named_is_a_line_and_the_others_go_on(clips, backbone):
    (clips / "a.mkv").rename(clips / f"{'a' * 245}.mkv")
    (clips / "loop.mkv").symlink_to("loop.mkv")
    (clips / "folder.mkv").mkdir()
    code, said, written = run(clips, backbone)
    assert code == 2 and "2 of 4 videos were not read" in said[-1]
    assert {"b.npy", "c.npy"} <= written.keys()


def test_a_full_disk_is_no_fault_of_a_video(monkeypatch):
    monkeypatch.setattr(frames, "replace", lambda path, fill: fill(path))
    with pytest.raises(OSError) as error:  # for which the others are not tried
        frames.save(np.zeros((99, 999)), "/dev/full")
    assert error.value.errno == errno.ENOSPC


def test_another_video_of_the_same_size_and_time_is_read(clips, backbone):
    before = run(clips, backbone, videos=clips / "a.mkv")[2]
    path, times = clips / "a.mkv", (clips / "a.mkv").stat()
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = run(clips, backbone, videos=clips / "a.mkv")[2]
    assert after["a.npy"] > before["a.npy"]
