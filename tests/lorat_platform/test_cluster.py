"""Workers import both packages, and the platform folder never hides the standard library's."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import ray

from lorat.errors import UserError
from lorat_platform import cluster

pytestmark = pytest.mark.processes(minutes=0.5)

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, cwd: Path) -> str:
    """Run code in a fresh process that finds the packages only where it is told to."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_workers_of_an_embedded_ray_import_both_packages(tmp_path: Path) -> None:
    code = """
import ray
from lorat_platform import cluster
with cluster.connected("local", num_cpus=1) as found:
    assert found.embedded and found.cpus == 1, found
    @ray.remote(num_cpus=0)
    def look():
        import os, platform
        import lorat, lorat_platform
        return platform.system(), os.environ["OMP_WAIT_POLICY"]
    print(*ray.get(look.remote()))
"""
    assert run(code, tmp_path) == "Linux PASSIVE"


def test_a_task_under_working_dir_has_the_standard_librarys_platform(tmp_path: Path) -> None:
    code = f"""
import ray
ray.init(address="local", num_cpus=1, log_to_driver=False, include_dashboard=False,
         runtime_env={{"working_dir": {str(ROOT)!r},
                       "excludes": [".git", ".venv", "tests/golden", "*.safetensors"]}})
@ray.remote(num_cpus=0)
def look():
    import os, platform, sys
    shipped = os.path.isdir("platform") and os.path.isdir("lorat")
    return shipped, platform.system(), platform.__file__ == {sysconfig.get_path("stdlib")!r} + "/platform.py"
print(*ray.get(look.remote()))
"""  # noqa: E501
    assert run(code, tmp_path) == "True Linux True"


def test_other_nodes_are_sent_both_packages() -> None:
    shipped = cluster.runtime_env(embedded=False)["py_modules"]
    assert sorted(Path(folder).name for folder in shipped) == ["lorat", "lorat_platform"]
    assert all((Path(folder) / "__init__.py").exists() for folder in shipped)


def test_an_address_where_nobody_answers_is_said_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: (_ for _ in ()).throw(ConnectionError("nobody")))
    with pytest.raises(UserError, match=r"No Ray cluster answers at 10\.0\.0\.9:6379"):
        cluster.connect("10.0.0.9:6379")


@pytest.mark.parametrize("job", ["train", "benchmark", "ingest", "evaluate"])
def test_a_job_finds_the_packages_beside_it_from_any_folder(job: str, tmp_path: Path) -> None:
    # -S leaves out the installed project, PYTHONPATH brings the dependencies back
    environment = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / "jobs" / f"{job}.py"), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout


def test_an_embedded_ray_listens_on_loopback() -> None:
    program = f"""
import os, sys, types
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "platform")!r}, {str(ROOT / "infra")!r}]
from lorat_platform import cluster
cluster.connect("local", num_cpus=1)
import ray, processes
ray.get(ray.remote(lambda: 1).remote())
started = processes.Processes(processes.Path("."), {{}})
started.running["this"] = types.SimpleNamespace(pid=os.getpid())
print(sorted({{address for address, _ in started.listening()["this"]}}))
cluster.disconnect()
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert printed.stdout.strip().endswith("['127.0.0.1', '::ffff:127.0.0.1']"), printed.stderr
