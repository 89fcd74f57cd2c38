"""One process at a time has the right to drive a folder, of a file system or an object store."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorat.errors import UserError
from lorat.files import scratch
from lorat.files.scratch import Process
from lorat.files.storage import Location, locate
from lorat_platform.runs import claim as lease
from lorat_platform.runs.claim import Driven, Lease, announcements, check_held
from tests.object_store import KEYS, object_store
from tests.other_driver import FOREIGN, announce


def make(folder: Location) -> Lease:
    return Lease(folder, "The run mine", "give another --name")


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    return locate(tmp_path)


@pytest.fixture(params=["local", "s3"])
def anywhere(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Location]:
    if request.param == "local":
        yield locate(tmp_path)
        return
    monkeypatch.setenv("LORAT_HOME", str(tmp_path))
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with object_store() as store:
        yield locate(store.uri("run"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LOOK_S", 0.005)


def all_at_once(count: int, call: Callable[[], Lease]) -> list[Lease]:
    """Let threads claim at the same moment; return who got the right, the others being refused."""
    barrier = threading.Barrier(count)

    def claim() -> Lease | None:
        barrier.wait()
        try:
            return call()
        except Driven:
            return None

    with ThreadPoolExecutor(count) as pool:
        results = [future.result() for future in [pool.submit(claim) for _ in range(count)]]
    return [result for result in results if result is not None]


@pytest.mark.usefixtures("quick")
def test_of_those_that_claim_at_once_exactly_one_has_the_right(tmp_path: Path) -> None:
    for number in range(100):
        place = locate(tmp_path / str(number))
        place.make()
        (winner,) = all_at_once(2 + number % 2, lambda place=place: make(place).claim())
        check_held(place, winner.token)
        winner.release()
        assert not announcements(place)


def test_in_an_object_store_exactly_one_has_the_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAT_HOME", str(tmp_path))
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with object_store() as store:
        for number in range(3):
            place = locate(store.uri(f"run-{number}"))
            (winner,) = all_at_once(3, lambda place=place: make(place).claim())
            winner.release()


@pytest.mark.usefixtures("quick")
def test_of_those_that_take_over_at_once_exactly_one_has_the_right(tmp_path: Path) -> None:
    for number in range(100):
        place = locate(tmp_path / str(number))
        place.make()
        announce(place, FOREIGN, age_s=lease.LEASE_S + 1)
        announce(place, FOREIGN, age_s=lease.LEASE_S + 1, held=False)
        (winner,) = all_at_once(2, lambda place=place: make(place).claim())
        assert [each.token for each in announcements(place)] == [winner.token]
        winner.release()


def test_two_processes_never_have_the_right_at_once(folder: Location) -> None:
    """Each notes when it came and went; the intervals must not overlap."""
    code = (
        "import sys, time\n"
        "from lorat.files.storage import locate\n"
        "from lorat_platform.runs import claim\n"
        "from lorat_platform.runs.claim import Driven, Lease\n"
        "claim.LOOK_S = 0.005\n"
        "won = 0\n"
        "while won < 10:\n"
        "    try:\n"
        "        with Lease(locate(sys.argv[1]), 'The run', 'wait').claim():\n"
        "            came = time.monotonic_ns()\n"
        "            time.sleep(0.005)\n"
        "            print(came, time.monotonic_ns())\n"
        "            won += 1\n"
        "    except Driven:\n"
        "        time.sleep(0.001)\n"
    )
    command = [sys.executable, "-c", code, folder.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    times = [tuple(map(int, line.split())) for output in outputs for line in output.splitlines()]
    assert len(times) == 20
    times.sort()
    assert all(gone < came for (_, gone), (came, _) in itertools.pairwise(times))


def test_a_driver_elsewhere_is_named_and_followed_when_its_lease_has_run_out(
    folder: Location,
) -> None:
    token = announce(folder, FOREIGN, age_s=20)
    with pytest.raises(
        Driven,
        match=r"The run mine is driven by process 7 on elsewhere, since 20.* and with its last sign"
        r" of life 20 s ago; wait for it, stop it, or give another --name \(if it is dead, the same"
        r" command works in 40 s\)\.$",
    ):
        make(folder).claim()
    assert [each.token for each in announcements(folder)] == [token]
    then = time.time() - lease.LEASE_S - 1
    os.utime(folder.file(f"driver-{token}.json"), (then, then))
    with make(folder).claim() as mine:
        assert [each.token for each in announcements(folder)] == [mine.token]


def test_clocks_of_other_machines_do_not_count(folder: Location) -> None:
    """What a driver writes about the time is only shown; the storage's times decide."""
    token = announce(folder, FOREIGN)
    (found,) = announcements(folder)
    for began in (0.0, time.time() + 10**8):
        changed = dataclasses.replace(found, began=began)
        folder.write_bytes(f"driver-{token}.json", changed.to_bytes())
        with pytest.raises(Driven):
            make(folder).claim()


def test_a_driver_that_died_here_is_followed_at_once(folder: Location) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        start = scratch.start_time(other.pid)
        assert start is not None
        announce(folder, Process(scratch.machine(), other.pid, start), age_s=10**6)
        with pytest.raises(Driven, match=rf"by process {other.pid} on this machine \(.+\), since"):
            make(folder).claim()
        other.kill()
    announce(folder, Process(scratch.machine(), os.getpid(), "1"))  # its number is used again
    with make(folder).claim():
        pass


def test_the_same_process_has_the_right_once(anywhere: Location) -> None:
    with make(anywhere).claim():
        with pytest.raises(Driven, match=f"by process {os.getpid()} on this machine"):
            make(anywhere).claim()
        (only,) = announcements(anywhere)
        assert only.held
    with make(anywhere).claim():
        pass
    assert not announcements(anywhere)


def test_a_patient_claim_waits_for_a_sign_of_life_or_the_end_of_the_lease(
    folder: Location, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(lease, "PATIENT_LOOK_S", 0.05)
    token = announce(folder, FOREIGN, age_s=lease.LEASE_S - 0.3)
    with make(folder).claim(patient=True) as mine:
        assert token not in [each.token for each in announcements(folder)]
    assert caplog.text.count("waiting for up to 0 s") == 1
    mine.release()
    announce(folder, FOREIGN, age_s=5)
    (other,) = announcements(folder)

    def renew() -> None:
        folder.write_bytes(f"driver-{other.token}.json", other.to_bytes())

    timer = threading.Timer(0.2, renew)
    timer.start()
    with pytest.raises(Driven, match="on elsewhere"):
        make(folder).claim(patient=True)
    timer.join()


def test_a_lease_is_renewed_while_its_owner_lives(
    folder: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.02)
    with make(folder).claim():
        (before,) = announcements(folder)
        time.sleep(0.3)
        (after,) = announcements(folder)
    assert after.written_s - before.written_s > 0.1
    assert after == dataclasses.replace(before, written_s=after.written_s)


def sleeping_owner(folder: Location) -> Lease:
    """Make an owner that was suspended for longer than its lease, on another machine."""
    sleeper = make(folder)
    sleeper._own = dataclasses.replace(sleeper._own, process=FOREIGN, host="elsewhere")
    sleeper.claim()
    then = time.time() - lease.LEASE_S - 1
    os.utime(folder.file(f"driver-{sleeper.token}.json"), (then, then))
    return sleeper


def test_an_owner_whose_lease_was_taken_finds_out_and_touches_nothing(folder: Location) -> None:
    sleeper = sleeping_owner(folder)
    with make(folder).claim() as mine:
        said = f"was taken over by process {os.getpid()} on .* ends without touching it"
        sleeper._write()  # it looked before, and was suspended again until now
        sleeper._renewed_at = 0.0
        with pytest.raises(UserError, match=said):
            sleeper.check(within_s=1)
        with pytest.raises(UserError, match=r"has taken .* over from the driver"):
            check_held(folder, sleeper.token)
        mine.confirm()
        check_held(folder, mine.token)
        with pytest.raises(UserError, match=said):
            sleeper.check()
        sleeper.release()
        assert [each.token for each in announcements(folder)] == [mine.token]


def test_an_owner_that_wakes_up_before_anybody_took_over_goes_on(folder: Location) -> None:
    sleeper = sleeping_owner(folder)
    sleeper.confirm()
    with pytest.raises(Driven):
        make(folder).claim()
    sleeper.release()
    assert not announcements(folder)


def test_an_owner_waits_for_the_decision_of_one_that_may_have_found_it_asleep(
    folder: Location,
) -> None:
    sleeper = sleeping_owner(folder)
    token = announce(folder, Process.here(), held=False)
    decided = threading.Timer(0.3, folder.delete, [f"driver-{token}.json"])
    decided.start()
    began = time.monotonic()
    sleeper.confirm()
    assert time.monotonic() - began > 0.2
    sleeper.release()


def test_a_file_that_says_nothing_counts_until_it_is_old(folder: Location) -> None:
    name = "driver-0123456789abcdef.json"
    for content in (b"", b"[" * 10**5, b'{"host": 1}', b"\xff", b"[]"):
        folder.write_bytes(name, content)
        with pytest.raises(Driven, match="on an unknown host"):
            make(folder).claim()
    then = time.time() - lease.LEASE_S - 1
    os.utime(folder.file(name), (then, then))
    make(folder).claim().release()


def test_a_folder_that_cannot_be_marked_is_said(tmp_path: Path) -> None:
    gone = locate(tmp_path / "file" / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=re.escape(gone.uri)):
        make(gone).claim()
