"""What an attacker could use: secrets in files, open ports, pickles, archives."""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import subprocess
import tarfile
import types
from pathlib import Path

import pytest
import torch

from lorat.errors import UserError
from lorat.files.tensors import read_tensors

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("lorat", "platform", "jobs", "infra")

SECRETS = [
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    r"\bAKIA[0-9A-Z]{16}\b",
    r"\b(gh[pousr]_|glpat-|hf_|xox[bp]-)[A-Za-z0-9_-]{20,}",
    r"\beyJ[A-Za-z0-9_-]{20,}\.eyJ",
]
IN_ADDRESS = r"://[^\s/:@$'\"{}]+:[^\s/:@$'\"{}]+@"
"""A literal user:password@, which tests of addresses may have."""
ASSIGNED = r"(?im)^[^#\n]*(password|secret|token|api_key)\w*\s*[:=]\s*['\"]?([\w+/-]{8,})['\"]?\s*$"
"""A literal secret in a settings file; ${VARIABLES} and references do not match."""
SETTINGS = {".yaml", ".yml", ".env", ".ini", ".toml", ".json", ".example"}
LOADERS = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads",
    "dill.load", "dill.loads", "joblib.load", "shelve.open", "marshal.loads", "eval", "exec",
    "yaml.load", "yaml.unsafe_load", "os.system", "shutil.unpack_archive",
}  # fmt: skip
"""Calls that run code from what they read."""
ALLOWED = {("platform/lorat_platform/failures.py", "pickle.loads")}
"""Ray Tune keeps a trial's exception only as a pickle, in the search's own folder."""


def _tracked() -> list[Path]:
    """Return the project's own text files; a copy without git is searched whole."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        names = subprocess.run(
            ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"],
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        return [ROOT / name for name in names if (ROOT / name).is_file()]
    return [path for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts]


def _calls() -> list[tuple[str, str, ast.Call]]:
    """Return every call of the project: file, dotted name, node."""
    found = []
    for folder in PACKAGES:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    found.append((str(path.relative_to(ROOT)), ast.unparse(node.func), node))
    return found


def test_no_file_holds_a_secret() -> None:
    hits = []
    for path in _tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        patterns = SECRETS if "tests" in path.parts else [*SECRETS, IN_ADDRESS]
        hits += [f"{path}: {m.group()}" for p in patterns for m in re.finditer(p, text)]
        if path.suffix in SETTINGS:
            hits += [f"{path}: {m.group(1)}" for m in re.finditer(ASSIGNED, text)]
    assert not hits


def test_the_search_for_secrets_finds_one() -> None:
    assert re.search(ASSIGNED, "  POSTGRES_PASSWORD: hunter2hunter2\n")
    assert re.search(IN_ADDRESS, "postgresql://mlflow:hunter2@db/mlflow")
    assert not re.search(ASSIGNED, "POSTGRES_PASSWORD: ${POSTGRES_PASSWORD:?set it}\n")
    assert not re.search(IN_ADDRESS, "postgresql://mlflow:${POSTGRES_PASSWORD}@db/mlflow")


def test_nothing_reads_pickles_or_runs_what_it_reads() -> None:
    found = {(file, name) for file, name, _ in _calls() if name in LOADERS}
    assert found <= ALLOWED


def test_torch_and_numpy_load_data_only() -> None:
    for file, name, call in _calls():
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", file
        assert keywords.get("allow_pickle") in (None, "False"), file


def test_archives_are_unpacked_only_with_members_checked() -> None:
    """Python's data filter refuses absolute paths, parents, links outside, and devices.

    Zips need none: their members are no links, and are unpacked without roots and parents.
    """
    for file, name, call in _calls():
        if "import tarfile" in (ROOT / file).read_text() and name.endswith(
            (".extractall", ".extract")
        ):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert keywords.get("filter") == "'data'", file


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", ["model.pth", "model.pt", "model.safetensors", "model.bin"])
def test_a_model_file_with_code_in_it_is_refused_and_does_not_run(
    tmp_path: Path, name: str
) -> None:
    target = tmp_path / "it-ran"
    torch.save({"state_dict": {"weight": _Bomb(target)}}, tmp_path / name)
    with pytest.raises(UserError):
        read_tensors(tmp_path / name)
    assert not target.exists()


@pytest.mark.parametrize("name", ["../outside", "folder/../../outside", "link"])
def test_an_archive_from_another_node_cannot_write_elsewhere(tmp_path: Path, name: str) -> None:
    from lorat_platform.recording.remote import MetricSink

    member = tarfile.TarInfo(name)
    if name == "link":
        member.type, member.linkname = tarfile.SYMTYPE, "../../outside"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(member)
    sink = object.__new__(MetricSink)  # no MLflow run is needed to refuse
    folder = types.SimpleNamespace(folder=tmp_path / "run")
    sink._run = types.SimpleNamespace(journal=folder)  # type: ignore[assignment]
    with pytest.raises(tarfile.FilterError):
        sink.store(buffer.getvalue(), "folder", "", True)
    assert not (tmp_path / "outside").exists()


def test_mlflow_on_this_machine_reports_nothing_about_its_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorat_platform.recording import store

    assert re.search(
        r"^export MLFLOW_DISABLE_TELEMETRY \?= true$", (ROOT / "Makefile").read_text(), re.M
    )
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    store.connect(f"sqlite:///{tmp_path}/mlflow.db")
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_servers_that_we_start_listen_on_loopback() -> None:
    """Every --host of the Makefile and of the scripts; the compose stack has its own test."""
    scripts = [ROOT / "Makefile", *(ROOT / "infra").glob("*.sh"), *(ROOT / "infra").glob("*.py")]
    hosts = [
        (path.name, host)
        for path in scripts
        for host in re.findall(
            r"--(?:dashboard-)?host[= ]\"?([\w.]+)|(?:listen_addresses=|\"-H\", \")([\w.]+)",
            path.read_text(),
        )
    ]
    assert len(hosts) >= 5
    assert all("".join(host).startswith("127.0.0.") for _, host in hosts), hosts
