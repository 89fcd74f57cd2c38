"""What a person does in MLflow's pages, done by a real browser on a real server."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import pytest

from lorat.config.training import TrainConfig
from lorat.data import synthetic
from lorat.data.shards.frame_index import FrameIndex
from lorat_platform import cluster
from lorat_platform.evaluation.report import record, write_report
from lorat_platform.evaluation.sets import EvaluationConfig, evaluate
from lorat_platform.evaluation.subject import load_subject
from lorat_platform.recording.inputs import dataset_inputs
from lorat_platform.recording.pages import version_page
from lorat_platform.recording.run import open_run
from lorat_platform.registry import versions as registry
from lorat_platform.search.driver import run_search
from lorat_platform.search.plan import SearchOptions, make_plan
from lorat_platform.search.results.outcome import SearchOutcome
from tests.constant_trackers import shrinking_tracker, staying_tracker
from tests.mlflow_server import running_server
from tests.small_shards import make_shards
from tests.waiting import wait_until

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
WAIT_S = 60.0

pytestmark = [
    pytest.mark.processes(minutes=2),
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="Debian's chromium and chromium-driver are not installed",
    ),
]


PICTURE = (
    "[...document.images].some(i => i.naturalWidth > 600 && i.complete) || "
    "[...document.querySelectorAll('image')].some(i => i.getBBox().width > 100)"
)
"""Whether the page shows a picture; the viewer of artefacts draws them as SVG images."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A server with two registered versions, a training run, an evaluation run and a search."""

    uri: str
    experiment_id: str
    training_run: str
    evaluation_experiment_id: str
    evaluation_run: str
    search_experiment_id: str
    search_run: str
    worse: str
    better: str
    training_page: str
    trials_page: str


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("ui")
    with running_server(folder / "server") as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAT_HOME", str(folder / "home"))
        patch.setenv("MLFLOW_TRACKING_URI", server.uri)
        data = make_shards(folder / "val")
        versions = []
        for model in (shrinking_tracker(), staying_tracker()):
            with open_run("lorat", "training") as run:
                run.set_description("# A training")
                run.log_inputs(
                    dataset_inputs([(FrameIndex.open(data), "validation", "got10k-val")])
                )
                for step in range(40):
                    run.log_metrics({"train/loss": 1 / (step + 1), "val/ao": step / 80}, step)
                    run.log_metrics({"lr": 0.001, "system/cpu_utilization_percentage": 50}, step)
                run.log_params({"lora": {"rank": 8}})
                scores = {"val/ao": 0.1}
                version = registry.register(
                    model, run_id=run.wait_for_id(), scores=scores, reference_set=[data]
                )
                versions.append(version)
        with cluster.connected("local", num_cpus=2):
            subject = load_subject("models:/lorat@candidate")
            datasets = [evaluate(subject, data, EvaluationConfig(), progress=False)]
            outcome = search(data, make_shards(folder / "train", split="train"))
            searched = outcome.run_id
        with open_run("evaluation", "candidate on synthetic") as evaluation:
            write_report(subject, datasets, folder / "report")
            record(evaluation, subject, datasets, folder / "report")
        yield Stage(
            uri=server.uri,
            experiment_id=run.journal.header()["experiment_id"],
            training_run=run.wait_for_id(),
            evaluation_experiment_id=evaluation.journal.header()["experiment_id"],
            evaluation_run=evaluation.wait_for_id(),
            search_experiment_id=registry.connect().get_run(searched).info.experiment_id,
            search_run=searched,
            worse=versions[0],
            better=versions[1],
            training_page=str(run.page),
            trials_page=str(outcome.table),
        )


def search(val_data: str, data: str) -> SearchOutcome:
    """Search with trials of a few steps."""
    config = TrainConfig(
        variant="N-112", backbone="none", data=data, val_data=val_data, epochs=1,
        pairs_per_epoch=32, batch_size=8,
    )  # fmt: skip
    options = SearchOptions(
        trials=3, rungs=2, val_sequences=1, searcher="random", crop_cache_gb=0.0, name="rank-and-lr"
    )
    return run_search(make_plan(config, options))


class Page:
    """A headless browser that waits for what it looks for and keeps screenshots."""

    def __init__(self, driver: Chrome, base: str, pictures: Path) -> None:
        self.driver = driver
        self._base = base
        self._pictures = pictures

    def open(self, place: str) -> None:
        """Go to ``#PLACE`` of the server."""
        self.driver.get("about:blank")  # only the part behind # differs: make it a real load
        self.driver.get(f"{self._base}/#{place}")

    def find(self, xpath: str) -> Any:
        """Return the first displayed element, waiting for it."""
        from selenium.common.exceptions import StaleElementReferenceException

        def displayed() -> Any:
            for element in self.driver.find_elements("xpath", xpath):
                with contextlib.suppress(StaleElementReferenceException):
                    if element.is_displayed():
                        return element
            return None

        return wait_until(
            f"{xpath} on {self.driver.current_url}",
            displayed,
            output=lambda: self.picture("missing"),
            seconds=WAIT_S,
        )

    def text(self, words: str) -> Any:
        """Return the innermost element that shows these words."""
        return self.find(f"//body//*[text()[contains(., '{words}')]]")

    def until(self, script: str) -> Any:
        """Run JavaScript until it returns something true."""
        return wait_until(
            script,
            lambda: self.driver.execute_script(script),
            output=lambda: self.picture("missing"),
            seconds=WAIT_S,
        )

    def picture(self, name: str) -> str:
        """Keep a screenshot and return its file."""
        time.sleep(1.0)  # fades and charts
        file = str(self._pictures / f"{name}.png")
        self.driver.save_screenshot(file)
        return file


@pytest.fixture(scope="module")
def page(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", "--autoplay-policy=no-user-gesture-required",
        "--window-size=1500,1100", f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(flag)
    driver = Chrome(options=options, service=ChromeService(str(DRIVER)))
    try:
        yield Page(driver, stage.uri, tmp_path_factory.mktemp("pictures"))
    finally:
        driver.quit()


def test_search_page_lists_the_runs(page: Page, stage: Stage) -> None:
    page.open(f"/experiments/{stage.experiment_id}/runs")
    page.find(f"//a[contains(@href, '/runs/{stage.training_run}')]")
    page.picture("search")


def test_run_page_shows_description_parameters_and_curves(page: Page, stage: Stage) -> None:
    page.open(f"/experiments/{stage.experiment_id}/runs/{stage.training_run}")
    page.text("A training")
    page.text("lora.rank")
    page.text("got10k-val")
    page.picture("run")


def test_charts_begin_with_losses_and_scores(page: Page, stage: Stage) -> None:
    page.open(f"/experiments/{stage.experiment_id}/runs/{stage.training_run}/model-metrics")
    page.text("train/loss")
    page.until(
        "return /train\\s*\\(1\\)[^]*val\\s*\\(1\\)[^]*Model metrics\\s*\\(1\\)/"
        ".test(document.body.innerText)"
    )
    page.picture("curves")
    assert "cpu_utilization" not in page.driver.find_element("xpath", "//body").text
    page.open(f"/experiments/{stage.experiment_id}/runs/{stage.training_run}/system-metrics")
    page.text("cpu_utilization_percentage")


def test_the_address_alone_opens_the_view_of_trained_models(page: Page, stage: Stage) -> None:
    for place in (stage.training_page, version_page("lorat", stage.better)):
        page.open(place.removeprefix("#"))
        page.find("//a[contains(., 'Model registry')]")  # the other view has none


def test_evaluation_run_starts_with_the_headline_table(page: Page, stage: Stage) -> None:
    page.open(f"/experiments/{stage.evaluation_experiment_id}/runs/{stage.evaluation_run}")
    page.find("//table//*[contains(text(), 'synthetic-val')]")
    page.picture("evaluation")


def test_search_run_has_its_summary_table_and_plots(page: Page, stage: Stage) -> None:
    run = f"/experiments/{stage.search_experiment_id}/runs/{stage.search_run}"
    page.open(run)
    page.text("Best is trial")
    page.picture("search-run")
    page.open(f"{run}/artifacts/trials.csv")
    page.text("trial_id")
    page.open(f"{run}/artifacts/plots/history.png")
    page.until(f"return {PICTURE}")
    page.picture("search-history")


def test_a_searchs_table_has_its_fields_as_columns(page: Page, stage: Stage) -> None:
    page.open(stage.trials_page.removeprefix("#"))
    for number in range(3):
        page.find(f"//a[starts-with(normalize-space(), 't0{number} r')]")
    page.picture("trials")
    for column in ("lora.rank", "lr", "head.depth", "val/ao"):
        assert page.driver.find_elements("xpath", f"//*[normalize-space()='{column}']"), column
    assert not page.driver.find_elements("xpath", "//a[normalize-space()='rank-and-lr']")


def artifact(page: Page, stage: Stage, path: str) -> None:
    page.open(
        f"/experiments/{stage.evaluation_experiment_id}/runs/{stage.evaluation_run}"
        f"/artifacts/evaluation/synthetic-val/{path}"
    )


def test_plots_and_tables_are_shown_inline(page: Page, stage: Stage) -> None:
    artifact(page, stage, "success.png")
    page.until(f"return {PICTURE}")
    page.picture("success")
    artifact(page, stage, "sequences.csv")
    page.text("val-0001")
    page.picture("sequences")


def test_clips_play_in_the_run_page(page: Page, stage: Stage) -> None:
    client_clips = sorted(
        entry.path.rsplit("/", 1)[1]
        for entry in registry.connect(stage.uri).list_artifacts(
            stage.evaluation_run, "evaluation/synthetic-val/clips"
        )
    )
    assert len(client_clips) == 4
    artifact(page, stage, f"clips/{client_clips[-1]}")
    page.find("//video")
    page.until("return document.querySelector('video').readyState >= 2")
    video = "document.querySelector('video')"
    assert page.driver.execute_script(f"return {video}.videoWidth") == synthetic.WIDTH
    page.driver.execute_script(f"{video}.muted = true; {video}.play()")
    page.until(f"return {video}.currentTime > 0.5")
    page.picture("clip")
    page.until(f"return {video}.ended || {video}.currentTime > 2")
    assert page.driver.execute_script(f"return {video}.error") is None


def test_model_page_lists_versions_and_tags(page: Page, stage: Stage) -> None:
    page.open("/models")
    page.find("//button[contains(., 'Try it now')]").click()  # a greeting at the first visit
    page.find("//a[normalize-space()='lorat']")
    page.picture("models")
    page.open("/models/lorat")
    page.text(f"Version {stage.better}")
    page.picture("model")


def test_champion_chosen_in_the_page_is_what_the_next_job_uses(
    page: Page, stage: Stage, tmp_path: Path
) -> None:
    for version, label in ((stage.worse, "first"), (stage.better, "second")):
        set_alias(page, version, "champion")
        page.picture(f"promoted-{label}")
        boxes = track(tmp_path / f"{label}.mp4", tmp_path)
        first, last = (float(boxes[i]["w"]) for i in (0, -1))
        assert (last < 0.5 * first) == (version == stage.worse)


def set_alias(page: Page, version: str, alias: str) -> None:
    """Edit the aliases of a version with mouse and keyboard."""
    from selenium.webdriver.common.keys import Keys

    page.open(f"/models/lorat/versions/{version}")
    page.text(f"Version {version}")
    page.find(EDIT_ALIASES).click()
    field = page.find("//div[@role='dialog']//input")
    field.send_keys(alias)
    field.send_keys(Keys.ENTER)
    page.picture(f"aliases-{version}")
    page.find("//div[@role='dialog']//button[contains(., 'Save')]").click()
    client = registry.connect(page._base)
    wait_until(
        f"alias {alias} set by the page",
        lambda: str(client.get_registered_model("lorat").aliases.get(alias)) == version,
        seconds=WAIT_S,
    )


EDIT_ALIASES = "//button[contains(@data-component-id, 'modelversionviewaliaseditor')]"
"""The pencil behind the aliases of a version, or ``Add`` where there are none."""


def track(output: Path, folder: Path) -> list[dict[str, str]]:
    """Track with ``models:/lorat@champion`` as a person would, and return the boxes."""
    video = synthetic.render("val", 1, num_frames=20)
    frames = folder / "frames"
    frames.mkdir(exist_ok=True)
    for number, image in enumerate(video.images):
        cv2.imwrite(str(frames / f"{number:04d}.png"), image[..., ::-1])
    x1, y1, x2, y2 = video.box[0]
    command = [sys.executable, ROOT / "jobs" / "track.py", frames]
    command += ["--box", f"{x1},{y1},{x2 - x1},{y2 - y1}", "--output", output]
    command += ["--model", "models:/lorat@champion"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(output.with_suffix(".csv")) as file:
        return list(csv.DictReader(file))
