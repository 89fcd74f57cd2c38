"""Jobs answer wrong input with one sentence and the right exit code."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ray.exceptions import OutOfMemoryError, RayTaskError
from ray.train.v2.api.exceptions import WorkerGroupError

from lorat.config import TrainConfig
from lorat.errors import UserError
from lorat_platform.command import parse, surroundings_message, user_message

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Do something."""

    train: TrainConfig = field(default_factory=TrainConfig)
    steps: int = 3
    """How many."""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--stpes", "3"], "There is no option --stpes; did you mean --steps?"),
        (["--steps"], "Missing value for argument '--steps'"),
        (["--steps", "many"], "--steps"),
        (["--train.lora.rank", "0"], "lora.rank is 0; give 1 or more."),
        (["--train.precision", "fp64"], "fp64"),
        (["steps"], "steps is no option"),
    ],
)
def test_a_wrong_command_line_gives_one_sentence(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(Options, arguments)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert "│" not in str(caught.value)


def test_a_right_command_line_is_read() -> None:
    options = parse(Options, ["--steps", "5", "--train.lora.rank", "8"])
    assert (options.steps, options.train.lora.rank) == (5, 8)


def test_a_user_error_is_found_inside_what_ray_wraps_around_it() -> None:
    error = UserError("one sentence.\nand more")
    wrapped = RayTaskError("task", "a traceback", error)
    group = WorkerGroupError("failed", {1: wrapped})
    assert user_message(group) == "one sentence."
    assert user_message(WorkerGroupError("failed", {0: ValueError("x")})) is None


def test_running_out_of_memory_is_said_in_a_sentence_but_may_be_tried_again() -> None:
    error = OutOfMemoryError("Task was killed due to the node running low on memory.\nmore")
    group = WorkerGroupError(str(error), {0: error})
    assert user_message(group) is None  # so that the worker is replaced
    for either in (error, group):
        assert "ran out of memory" in (surroundings_message(either) or "")
    assert surroundings_message(ValueError("x")) is None


def run_script(body: str) -> subprocess.CompletedProcess[str]:
    script = (
        "import sys; sys.path[:0] = [{root!r}, {platform!r}]\n"
        "from lorat.errors import UserError\nfrom lorat_platform import command\n"
        "def main():\n    {body}\ncommand.run(main)\n"
    ).format(root=str(ROOT), platform=str(ROOT / "platform"), body=body)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_exit_codes_tell_user_errors_interrupts_and_faults_apart() -> None:
    wrong = run_script("raise UserError('give another.')")
    assert (wrong.returncode, wrong.stderr) == (2, "error: give another.\n")
    stopped = run_script("raise KeyboardInterrupt")
    assert stopped.returncode == 130
    assert "Traceback" not in stopped.stderr
    fault = run_script("raise RuntimeError('a bug')")
    assert fault.returncode == 1
    assert "Traceback" in fault.stderr
    assert run_script("return 0").returncode == 0
