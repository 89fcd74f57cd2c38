"""`jobs/track.py` as a person uses it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from lorat.checkpoint.folder import save_merged
from lorat.data import synthetic
from lorat.tracking.clips import ClipWriter
from lorat.tracking.video_source import VideoSource
from tests.constant_trackers import staying_tracker
from tests.jobs.in_process import run_in_process
from tests.mlflow_home import make_home
from tests.waiting import wait_until

pytestmark = pytest.mark.processes(minutes=0.5)

ROOT = Path(__file__).resolve().parents[2]


def track(*arguments: object, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    return subprocess.run(
        [sys.executable, ROOT / "jobs" / "track.py", *map(str, arguments)],
        env=environment | {"LORAT_HOME": str(home), "DISPLAY": ""},
        capture_output=True,
        text=True,
        cwd=home,
    )


@pytest.fixture(scope="module")
def video() -> synthetic.Video:
    return synthetic.render("val", 0, num_frames=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "bundle"
    save_merged(staying_tracker(), folder)
    return folder


@pytest.fixture
def folder(video: synthetic.Video, tmp_path: Path) -> Path:
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, image in enumerate(video.images):
        cv2.imwrite(str(folder / f"{number + 1}.png"), image[..., ::-1])
    return folder


@pytest.fixture
def box(video: synthetic.Video) -> str:
    x1, y1, x2, y2 = video.box[0]
    return f"{x1:.1f},{y1:.1f},{x2 - x1:.1f},{y2 - y1:.1f}"


def test_folder_of_frames_gives_video_csv_and_json(
    folder: Path, box: str, model: Path, tmp_path: Path
) -> None:
    result = track(folder, "--box", box, "--model", model, "--output", "out/a.mp4", home=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "12/12" in result.stderr, "a progress bar"
    assert "12 frames at" in result.stdout
    with av.open(str(tmp_path / "out" / "a.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 12
    with open(tmp_path / "out" / "a.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    first = [float(rows[0][key]) for key in ("x", "y", "w", "h")]
    np.testing.assert_allclose(first, [float(v) for v in box.split(",")], atol=1e-3)
    content = json.loads((tmp_path / "out" / "a.json").read_text())
    assert len(content["boxes_xywh"]) == len(content["scores"]) == 12
    assert content["variant"] == "N-112"


def test_video_file_and_baseline(video: synthetic.Video, box: str, tmp_path: Path) -> None:
    with ClipWriter(tmp_path / "in.mp4", fps=10) as clip:
        for image in video.images:
            clip.write(image)
    result = track(
        "in.mp4", "--box", box, "--model", "static", "--output", "out.webm", "--max-frames", 5,
        home=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "out.csv") as file:
        rows = list(csv.reader(file))[1:]
    assert len(rows) == 5
    assert len({tuple(row[1:5]) for row in rows}) == 1
    with av.open(str(tmp_path / "out.webm")) as clip:
        assert float(clip.streams.video[0].average_rate) == pytest.approx(10)


def test_several_objects_have_columns_and_colours_of_their_own(
    folder: Path, box: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [folder, "--model", model]
    assert run_in_process("track", *arguments, "--box", box, "--output", "one.mp4") == 0
    two = ["--box", box, "--box", "20,30,40,50"]
    assert run_in_process("track", *arguments, *two, "--output", "two.mp4") == 0
    Path("objects.txt").write_text(f"left,top,width,height,frame\n{box}\n\n20 30 40 50 7\n")
    late = ["--boxes", "objects.txt", "--output", "late.mp4"]
    assert run_in_process("track", *arguments, *late) == 0
    one = json.loads(Path("one.json").read_text())
    for name, begins in (("two", [0, 0]), ("late", [0, 7])):
        content = json.loads(Path(f"{name}.json").read_text())
        assert [each["first_frame"] for each in content["objects"]] == begins
        assert content["objects"][0]["boxes_xywh"] == pytest.approx(
            np.array(one["boxes_xywh"]), abs=0.01
        )
        assert content["objects"][1]["boxes_xywh"][0] == [20, 30, 40, 50]
        with open(f"{name}.csv") as file:
            rows = list(csv.DictReader(file))
        assert [*rows[0]][:7] == ["frame", "x_1", "y_1", "w_1", "h_1", "score_1", "x_2"]
        assert [row["x_2"] == "" for row in rows] == [t < begins[1] for t in range(12)]
    assert (Path("two.mp4").stat().st_size, Path("late.mp4").stat().st_size) > (0, 0)


def test_a_damaged_frame_is_passed_over_and_told_by_the_exit_code(
    folder: Path,
    box: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Names are as strange as the file system takes them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAT_HOME", str(tmp_path / "home"))
    cover = np.zeros((240, 320, 3), np.uint8)
    cv2.imwrite(str(folder / "cover.png"), cover)
    data = (folder / "12.png").read_bytes()
    (folder / "12.png").write_bytes(data[: len(data) // 2])
    odd = os.fsdecode(b"12:30 M\xfcnchen%20#")
    folder.rename(odd)
    output = f"{odd}/clip 12:30?.mp4"
    arguments = ["--box", box, "--model", "static", "--output", output]
    assert run_in_process("track", odd, *arguments) == 1
    assert "12:30 M\\xfcnchen%20#/12.png cannot be read" in caplog.text
    assert "cover.png" in caplog.text
    assert "grfmt_png" not in capfd.readouterr().err, "OpenCV's own words"
    content = json.loads(Path(output).with_suffix(".json").read_text())
    assert content["scores"] == [1.0] * 11 + [0.0]
    assert content["boxes_xywh"][11] == content["boxes_xywh"][10]
    assert content["times_s"] == pytest.approx([t / 25 for t in range(12)], abs=1e-3)
    assert len(list(VideoSource(output))) == 12


@pytest.fixture
def screen() -> Iterator[str]:
    """Run an X server without a monitor; yield its name.

    It must not reset itself when its last client goes: it turns away who comes meanwhile.
    """
    if not (shutil.which("Xvfb") and shutil.which("xdotool")):
        pytest.skip("Debian's xvfb and xdotool are not installed")
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", "1", "-noreset", "-screen", "0", "1280x960x24"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        yield f":{server.stdout.readline().strip()}"
    finally:
        server.kill()
        server.communicate(timeout=30)


def test_object_selected_with_the_mouse_is_tracked_and_shown(
    folder: Path, model: Path, screen: str, tmp_path: Path
) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    environment |= {"LORAT_HOME": str(tmp_path), "DISPLAY": screen}
    job = subprocess.Popen(
        [
            sys.executable,
            ROOT / "jobs" / "track.py",
            folder,
            "--select",
            "--show",
            "--model",
            model,
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
    )

    def xdotool(*words: object) -> str:
        return subprocess.run(
            ["xdotool", *map(str, words)], env=environment, capture_output=True, text=True
        ).stdout

    try:
        window = wait_until(
            "window",
            lambda: xdotool("search", "--onlyvisible", "--name", "draw the object"),
            process=job,
        )
        time.sleep(1)
        at = ["mousemove", "--window", window.split()[0]]
        xdotool(*at, 90, 110)
        xdotool("mousedown", 1)
        for x, y in ((100, 115), (120, 130), (150, 150)):
            xdotool(*at, x, y)
            time.sleep(0.1)
        xdotool("mouseup", 1)
        time.sleep(0.3)
        xdotool("windowfocus", window.split()[0])
        xdotool("key", "Return")
        output, _ = job.communicate(timeout=300)
    finally:
        job.kill()
        job.communicate(timeout=30)
    assert job.returncode == 0, output
    content = json.loads((tmp_path / "tracked.json").read_text())
    assert len(content["boxes_xywh"]) == 12
    x, y, w, h = content["boxes_xywh"][0]
    assert 10 < w <= 62 and 10 < h <= 42, "drawn over 60 x 40 pixels, toolbars are around"
    assert x >= 0 and y >= 0 and x + w <= 320 and y + h <= 240


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}", "--box", "5000,10,20,20"], "does not lie inside the first frame of"),
        (["{folder}", "--box", "-5,10,20,20"], "does not lie inside the first frame of"),
        (["{folder}", "--box", "10,10,0,20"], "give left,top,width,height in pixels"),
        (["{folder}", "--box", "10,10"], "give left,top,width,height in pixels"),
        (["{folder}"], "Give the object by one of --box"),
        (["{folder}", "--box", "1,1,5,5", "--select"], "one of --box L,T,W,H, --boxes FILE and"),
        (["{folder}", "--box", "1,1,5,5", "--box", "5000,10,20,20"], "does not lie inside"),
        (["{folder}", "--boxes", "text.mp4"], "text.mp4 holds no object; give left,top"),
        (["{folder}", "--boxes", "late.txt"], "No object of late.txt is there from the beginning"),
        (["{folder}", "--boxes", "odd.txt"], "Line 2 of odd.txt is 9 9 5; give left,top,width"),
        (["{folder}", "--boxes", "gone.txt"], "gone.txt cannot be read"),
        (["tracked.mp4", "--box", "1,1,5,5"], "output is tracked.mp4, the video itself"),
        (["./a.mp4", "--box", "1,1,5,5", "--output", "{folder}/../a.mp4"], "the video itself"),
        (["{folder}", "--box", "1,1,5,5", "--device", "gpu"], "this machine has none"),
        (["{folder}", "--box", "1,1,5,5", "--device", "tpu"], "tpu"),
        (["nowhere.mp4", "--box", "1,1,5,5"], "There is no nowhere.mp4"),
        (["empty", "--box", "1,1,5,5"], "holds no image"),
        (["text.mp4", "--box", "1,1,5,5"], "cannot be read as a video"),
        (["camera:97", "--box", "1,1,5,5"], "camera cannot be opened"),
        (["{folder}", "--box", "1,1,5,5", "--output", "a.avi"], "give a name in .mp4 or .webm"),
        (["{folder}", "--box", "1,1,5,5"], "There is no lorat@champion and no lorat@candidate"),
        (["{folder}", "--box", "1,1,5,5", "--model", "gone"], "There is no model gone"),
        (["{folder}", "--select", "--model", "static"], "--select needs a screen"),
        (["{folder}", "--box", "1,1,5,5", "--output", "text.mp4/o.mp4"], "text.mp4 is none"),
        (["{folder}", "--box", "1,1,5,5", "--output", "frames.mp4"], "frames.mp4 is a folder"),
        (["{folder}", "--box", "1,1,5,5", "--output", "frames.webm"], "frames.json is a folder"),
    ],
)
def test_mistake_is_one_sentence(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "late.txt").write_text("1,1,5,5,3\n")
    (tmp_path / "odd.txt").write_text("1,1,5,5\n9 9 5\n")
    for suffix in (".mp4", ".json"):
        folder.with_suffix(suffix).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAT_HOME", str(make_home(tmp_path / "home")))
    monkeypatch.setenv("DISPLAY", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    capfd.readouterr()  # what making the store printed
    assert run_in_process("track", *(a.format(folder=folder) for a in arguments)) == 2
    printed = capfd.readouterr().err.splitlines()
    assert len(printed) == 1, printed
    assert printed[0].startswith("error: ")
    assert message in printed[0]
    assert not list(tmp_path.glob("tracked*"))
