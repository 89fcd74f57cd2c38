"""Jobs answer wrong input with one sentence and the right exit code."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import command
import pytest
from flags import parse
from output import CleanStream
from ray.exceptions import OutOfDiskError, OutOfMemoryError, RayTaskError
from ray.train.v2.api.exceptions import WorkerGroupError

from lorat.config.training import TrainConfig
from lorat.errors import UserError
from lorat_platform.failures import surroundings_message, user_message

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
        (["--train.lora.rank", "0"], "lora.rank is 0; give 1 to 1024."),
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


def test_names_that_are_no_text_are_printed_escaped() -> None:
    raw = io.BytesIO()
    stream = CleanStream(io.TextIOWrapper(raw, encoding="utf-8", errors="strict"))
    stream.write(f"{os.fsdecode(bytes([77, 252]))} Münch \ud800 s3://key@bucket")
    stream.flush()
    assert raw.getvalue().decode() == "M\\xfc Münch \\ud800 s3://bucket"


def test_what_ray_says_of_a_tasks_error_is_not_told() -> None:
    inner = RayTaskError("write_shard", "a traceback", UserError("one sentence."))
    error = inner.as_instanceof_cause()
    assert str(error) != "one sentence." and isinstance(error, UserError)
    for _ in range(20):
        assert user_message(error) == "one sentence."
        error = RayTaskError("outer", "a traceback", error).as_instanceof_cause()


def test_an_error_of_the_machine_is_a_sentence_from_a_task_as_well() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/a")
    for error in (full, RayTaskError("task", "a traceback", full).as_instanceof_cause()):
        assert user_message(error) is None  # so that a worker is replaced
        assert surroundings_message(error) == (
            "/data/a: No space left on device; make room there, then run the same command again."
        )
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data/a")
    assert "accessible to this user" in (surroundings_message(denied) or "")
    assert "is full" in (surroundings_message(OutOfDiskError("Local disk is full")) or "")


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
        "import sys; sys.path[:0] = [{root!r}, {platform!r}, {jobs!r}]\n"
        "from lorat.errors import UserError\nimport command\n"
        "def main():\n    {body}\ncommand.run(main)\n"
    ).format(root=str(ROOT), platform=str(ROOT / "platform"), jobs=str(ROOT / "jobs"), body=body)
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


STOP = "__import__('os').kill(__import__('os').getpid(), __import__('signal').SIGTERM)"


def test_a_request_to_end_is_an_interrupt_and_a_second_one_does_not_wait() -> None:
    stopped = run_script(f"{STOP}; raise RuntimeError('not reached')")
    assert (stopped.returncode, stopped.stderr) == (130, "\nInterrupted.\n")
    caused = run_script(f"try: {STOP}\n    finally: raise RuntimeError('Ray was stopped as well')")
    assert (caused.returncode, caused.stderr) == (130, "\nInterrupted.\n")
    twice = run_script(f"try: {STOP}\n    finally: {STOP}; print('not reached')")
    assert (twice.returncode, twice.stdout) == (130, "")


def test_a_job_that_is_stopped_while_it_imports_leaves_no_traceback() -> None:
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'jobs')!r})\nimport bootstrap\n{STOP}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "\nInterrupted.\n")


def test_no_secret_of_an_address_is_printed() -> None:
    said = run_script("print('at http://me:PLANTED@host'); raise KeyError('s3://K:PLANTED@b/x')")
    assert said.stdout == "at http://host\n"
    assert "KeyError: 's3://b/x'" in said.stderr
    assert "PLANTED" not in said.stderr


def test_an_address_with_a_secret_is_refused_wherever_it_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for arguments in (["--train.data", "s3://K:PLANTED@b"], ["--train.data=s3://K:PLANTED@b"]):
        with pytest.raises(UserError, match=r"^--train\.data s3://b was given with a password"):
            parse(Options, arguments)
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "AWS_ENDPOINT_URL"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "http://me:PLANTED@127.0.0.1:1")
            refused = run_script("return 0")
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"error: {name} http://127.0.0.1:1 was given with")


@pytest.mark.parametrize(
    ("given", "again"),
    [
        (["--resume", "never", "--name", "never"], "--resume auto --name never"),
        (["--resume=never", "--data", "a b"], "--resume=auto --data 'a b'"),
    ],
)
def test_the_command_that_goes_on_is_the_one_given_but_for_beginning_anew(
    given: list[str], again: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs/train.py", *given])
    assert command._same_command() == f"python jobs/train.py {again}"
