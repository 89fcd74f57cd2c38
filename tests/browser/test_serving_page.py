"""The page of a server, used by a real browser: draw, follow, change the model, take the boxes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest

from lorat.config.training import TrainConfig
from lorat.model.network import build_model
from lorat.tracking.clips import ClipWriter
from lorat.tracking.video_source import VideoSource
from lorat_platform.serving.engine import Engine
from lorat_platform.serving.settings import ServingSettings
from tests.served_models import served
from tests.served_web import TOKEN, web
from tests.waiting import wait_until

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
WIDTH, HEIGHT, SIDE = 320, 240, 60

pytestmark = [
    pytest.mark.processes(minutes=1),
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="Debian's chromium and chromium-driver are not installed",
    ),
]


def place(number: int) -> tuple[int, int]:
    """Return left and top of the moving picture in a frame of the video."""
    return 40 + number // 2, 60 + number // 4


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A textured square that moves over a smooth ground, 300 frames."""
    rng = np.random.default_rng(3)
    ground = np.full((HEIGHT, WIDTH, 3), 120, np.uint8)
    ground += np.linspace(0, 60, WIDTH, dtype=np.uint8)[None, :, None]
    square = np.kron(rng.integers(0, 256, (6, 6, 3)), np.ones((SIDE // 6,) * 2 + (1,)))
    file = tmp_path_factory.mktemp("video") / "moving.webm"
    with ClipWriter(file, fps=25) as clip:
        for number in range(300):
            frame = ground.copy()
            left, top = place(number)
            frame[top : top + SIDE, left : left + SIDE] = square
            clip.write(frame, number / 25)
    return file


@pytest.fixture
def engine_and_place() -> Iterator[tuple[Engine, str]]:
    with web(
        ServingSettings(), model=served(1, build_model(TrainConfig(variant="T-168")))
    ) as found:
        yield found


@pytest.fixture(scope="module")
def camera(video: Path) -> Path:
    """What the browser's camera sees: the frames of the video, again and again."""
    file = video.with_suffix(".y4m")
    with file.open("wb") as stream:
        stream.write(f"YUV4MPEG2 W{WIDTH} H{HEIGHT} F25:1 Ip A1:1 C420jpeg\n".encode())
        for frame in VideoSource(str(video)):
            stream.write(b"FRAME\n" + cv2.cvtColor(frame.image, cv2.COLOR_RGB2YUV_I420).tobytes())
    return file


@pytest.fixture
def browser(tmp_path: Path, camera: Path) -> Iterator[Chrome]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1300,900",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-video-capture={camera}",
    ):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def test_draw_follow_change_the_model_and_take_the_boxes(
    browser: Chrome, engine_and_place: tuple[Engine, str], video: Path, tmp_path: Path
) -> None:
    from selenium.webdriver import ActionChains, Keys

    engine, address = engine_and_place
    browser.get(f"http://{address}/#ticket={TOKEN}")
    assert "ticket" not in browser.current_url  # it stays in no history

    def by_id(name: str) -> Any:
        return browser.find_element("id", name)

    def state(script: str) -> Any:
        return browser.execute_script(f"return {script}")

    by_id("file").send_keys(str(video))
    wait_until("video", lambda: "Drag a box" in by_id("state").text, seconds=60)
    view = by_id("view")
    shown = view.size["width"] / WIDTH
    left, top = place(0)
    ActionChains(browser).move_to_element_with_offset(
        view,
        round(left * shown - view.size["width"] / 2),
        round(top * shown - view.size["height"] / 2),
    ).click_and_hold().move_by_offset(round(SIDE * shown), round(SIDE * shown)).release().perform()
    wait_until("answers", lambda: state("state.rows.length") >= 20, seconds=120)
    assert by_id("model").text == "lorat/1"

    engine.use(served(2, build_model(TrainConfig(variant="T-168"))))
    wait_until("change", lambda: by_id("model").text == "lorat/2", seconds=60)
    rows = state("state.rows.length")
    wait_until("answers", lambda: state("state.rows.length") >= rows + 20, seconds=120)

    view.send_keys("b", Keys.ENTER)  # a second target, with the keyboard
    wait_until("second target", lambda: state("[...state.targets.keys()].join()") == "1,2")
    rows = state("state.rows.length")
    wait_until("answers", lambda: state("state.rows.length") >= rows + 4, seconds=120)
    view.send_keys(Keys.SPACE)
    assert "Go on" in by_id("pause").text
    browser.find_element("css selector", "[aria-label='Drop 2']").click()
    assert len(browser.find_elements("css selector", "#targets li")) == 1

    for session in list(engine._sessions.values()):  # the server loses the session
        engine.close(session)
    view.send_keys(Keys.SPACE)
    rows = state("state.rows.length")
    wait_until("answers", lambda: state("state.rows.length") >= rows + 5, seconds=120)

    by_id("csv").click()
    file = tmp_path / "boxes.csv"
    wait_until("boxes", file.exists)
    head, *lines = file.read_text().splitlines()
    assert head == "frame,time_s,target,left,top,width,height,score"
    own = [line.split(",") for line in lines if line.split(",")[2] == "1"]
    assert len(own) >= 45
    for _, time_s, _, x, y, width, height, _ in own:
        left, top = place(round(float(time_s) * 25))
        assert abs(float(x) + float(width) / 2 - left - SIDE / 2) < SIDE / 2
        assert abs(float(y) + float(height) / 2 - top - SIDE / 2) < SIDE / 2
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe


def test_a_camera_is_seen_and_followed_also_after_a_pause_that_ended_the_session(
    browser: Chrome,
) -> None:
    from selenium.webdriver import Keys

    settings = ServingSettings(idle_s=1.0)
    model = served(1, build_model(TrainConfig(variant="T-168")))
    with web(settings, model=model) as (engine, address):
        browser.get(f"http://{address}/#ticket={TOKEN}")

        def state(script: str) -> Any:
            return browser.execute_script(f"return {script}")

        def picture() -> Any:
            return state("view.toDataURL('image/jpeg')")

        browser.find_element("id", "camera").click()
        view = browser.find_element("id", "view")
        text = browser.find_element("id", "state")
        wait_until("camera", lambda: "Drag a box" in text.text, seconds=60)
        first = picture()
        wait_until("another picture", lambda: picture() != first, seconds=30)
        wait_until("the end of the idle session", lambda: not engine._sessions, seconds=30)
        assert "Drag a box" in text.text

        view.send_keys("b", Keys.ENTER)
        wait_until("answers", lambda: state("state.rows.length") >= 5, seconds=60)
        view.send_keys(Keys.SPACE)
        wait_until("the end of the idle session", lambda: not engine._sessions, seconds=30)
        assert "Following one target" in text.text
        rows = state("state.rows.length")
        view.send_keys(Keys.SPACE)
        wait_until("answers", lambda: state("state.rows.length") >= rows + 5, seconds=60)

        browser.find_element("css selector", "[aria-label='Drop 1']").click()
        last = picture()
        wait_until("another picture", lambda: picture() != last, seconds=30)


def test_without_the_token_the_page_says_what_to_do(
    browser: Chrome, engine_and_place: tuple[Engine, str], video: Path
) -> None:
    _, address = engine_and_place
    browser.get(f"http://{address}/")
    browser.find_element("id", "file").send_keys(str(video))
    wait_until(
        "a sentence",
        lambda: "open the address that it printed" in browser.find_element("id", "state").text,
        seconds=60,
    )
    browser.find_element("id", "given").send_keys(TOKEN)
    browser.find_element("css selector", "#ask button").click()
    browser.find_element("id", "file").send_keys(str(video))
    wait_until(
        "video", lambda: "Drag a box" in browser.find_element("id", "state").text, seconds=60
    )
