"""Every fixture file belongs to a group that a test module covers."""

from __future__ import annotations

import ast
from fnmatch import fnmatch
from pathlib import Path

from tests.golden.fixture_files import golden


def covered_patterns() -> dict[str, tuple[str, ...]]:
    """Read ``COVERS`` of every test module beside this one, without importing it."""
    patterns: dict[str, tuple[str, ...]] = {}
    for module in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(module.read_text()).body:
            if isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == "COVERS" for target in node.targets
            ):
                patterns[module.name] = tuple(ast.literal_eval(node.value))
    return patterns


def test_every_fixture_file_has_a_test() -> None:
    patterns = [pattern for group in covered_patterns().values() for pattern in group]
    orphans = [
        path.name
        for path in golden("*")
        if path.name != "README.md" and not any(fnmatch(path.name, p) for p in patterns)
    ]
    assert not orphans, f"no test covers {', '.join(orphans)}"


def test_the_folder_holds_fixtures() -> None:
    assert [path for path in golden("*") if path.name != "README.md"]
