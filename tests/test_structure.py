"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "lorat": {"ray", "mlflow", "lorat_platform", "bootstrap"},
    "platform/lorat_platform": {"bootstrap"},
}
ROOMS = {
    "lorat": (
        "errors", "image", "files", "config", "data.datasets", "data.shards", "data.pairs",
        "data.synthetic", "model", "checkpoint", "metrics", "learning", "tracking",
    ),
    "platform/lorat_platform": (
        "failures", "cluster", "recording", "runs", "data", "registry", "evaluation", "promotion",
        "serving", "training", "search", "scale",
    ),
}  # fmt: skip
"""The rooms of each package, from the ground up: none imports from one above it."""
TORCH_FREE = ("image", "files", "config", "data")
"""Rooms of ``lorat`` that decode workers use: torch would cost each of them seconds and 0.8 GB."""
INTERNALS = "platform/lorat_platform/cluster/ray_internals.py"
"""The one module that may import what Ray does not promise."""

DISTRIBUTIONS = {
    "PIL": "pillow", "cv2": "opencv-python", "typing_extensions": "typing-extensions",
    "yaml": "pyyaml",
}  # fmt: skip
"""Distributions whose module has another name."""


def _imports(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def _module_name(path: Path, top: Path) -> str:
    parts = path.relative_to(top).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("package", list(FORBIDDEN))
def test_imports_point_only_downwards(package: str) -> None:
    wrong = {
        f"{path.relative_to(ROOT)} imports {module}"
        for path in (ROOT / package).rglob("*.py")
        for module in _imports(path)
        if module.split(".")[0] in FORBIDDEN[package]
    }
    assert not wrong


def test_entry_points_stay_short() -> None:
    lengths = {
        path.name: len(path.read_text().splitlines()) for path in (ROOT / "jobs").glob("*.py")
    }
    assert {name for name, length in lengths.items() if length > 125} == set()


def test_jobs_import_what_must_come_first_first() -> None:
    for path in (ROOT / "jobs").glob("*.py"):
        if "__main__" in path.read_text():
            _, future, begin, *_ = ast.parse(path.read_text()).body
            assert isinstance(future, ast.ImportFrom) and future.module == "__future__", path
            assert isinstance(begin, ast.Import), path
            assert begin.names[0].name == "bootstrap", path


@pytest.mark.parametrize(
    ("package", "top"), [("lorat", "."), ("platform/lorat_platform", "platform")]
)
def test_no_import_circle(package: str, top: str) -> None:
    files = {_module_name(path, ROOT / top): path for path in (ROOT / package).rglob("*.py")}
    graph = {}
    for module, path in files.items():
        targets = {target for target in _imports(path) if target in files}
        # What is imported from a room is one of its modules, or what the room itself hands on.
        rooms = {target.rpartition(".")[0] for target in targets}
        graph[module] = {t for t in targets - {module} if t not in rooms or t == package}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import circle: {' -> '.join([*trail, module])}"
        if module not in done:
            for target in graph[module]:
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def _needed(path: Path) -> set[str]:
    """Return the top-level modules that a file imports, but for those it can do without."""
    tree = ast.parse(path.read_text())
    optional = {
        id(node)
        for attempt in ast.walk(tree)
        if isinstance(attempt, ast.Try)
        and any(isinstance(h.type, ast.Name) and "Import" in h.type.id for h in attempt.handlers)
        for node in ast.walk(attempt)
    }
    modules = set()
    for node in ast.walk(tree):
        if id(node) in optional:
            continue
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules.add(node.module.split(".")[0])
    return modules


def test_every_imported_package_is_declared() -> None:
    """A package that comes along with another one today may not do so tomorrow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"]]
    groups += [lines for name, lines in project["optional-dependencies"].items() if name != "dev"]
    declared = {re.split(r"[^\w-]", line)[0].lower() for group in groups for line in group}
    own = {"lorat", "lorat_platform", *(path.stem for path in (ROOT / "jobs").glob("*.py"))}
    missing = {
        f"{path.relative_to(ROOT)} imports {module}"
        for folder in ("lorat", "platform", "jobs")
        for path in (ROOT / folder).rglob("*.py")
        for module in _needed(path) - own - sys.stdlib_module_names
        if DISTRIBUTIONS.get(module, module).lower() not in declared
    }
    assert not missing


def _room(module: str, package: str) -> str | None:
    """Return the room of a module, given by its dotted name below the package."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in ROOMS[package]), None)


@pytest.mark.parametrize("package", list(ROOMS))
def test_every_module_has_a_room_and_rooms_import_only_downwards(package: str) -> None:
    rooms, name = ROOMS[package], package.rpartition("/")[2]
    wrong = []
    for path in (ROOT / package).rglob("*.py"):
        own = _module_name(path, ROOT / package)
        if own in ("", "data"):
            continue
        room = _room(own, package)
        if room is None:
            wrong.append(f"{own} is in no room")
            continue
        for target in _imports(path):
            above = _room(target.removeprefix(f"{name}."), package)
            inside = target.startswith(f"{name}.")
            if inside and above and rooms.index(above) > rooms.index(room):
                wrong.append(f"{own} imports {target}")
    assert not wrong


def test_what_ray_does_not_promise_is_imported_in_one_module() -> None:
    private = re.compile(r"^ray\.(.*\.)?_")
    wrong = {
        f"{path.relative_to(ROOT)} imports {module}"
        for folder in ("platform", "jobs")
        for path in (ROOT / folder).rglob("*.py")
        for module in _imports(path)
        if private.match(module) and str(path.relative_to(ROOT)) != INTERNALS
    }
    assert not wrong


def test_rooms_of_decode_workers_do_not_import_torch() -> None:
    import subprocess

    files = [file for room in TORCH_FREE for file in (ROOT / "lorat" / room).rglob("*.py")]
    modules = sorted(_module_name(file, ROOT) for file in files)
    code = "import sys\n" + "".join(f"import {module}\n" for module in modules)
    code += "print(sorted({'torch', 'timm', 'peft'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"


def test_platform_folder_never_shadows_the_standard_library() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_pinned_torch_and_torchvision_are_a_pair() -> None:
    lock = (ROOT / "infra" / "requirements.lock").read_text().splitlines()
    assert "torch==2.15.0" in lock
    assert "torchvision==0.29.2" in lock


def test_packages_are_the_two_named_in_the_build() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = build["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["lorat", "platform/lorat_platform"]
