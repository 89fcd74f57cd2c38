"""Whether a search may be gone on with: Ray Tune runs code that it finds in the search's folder.

``Tuner.restore`` unpickles ``tuner.pkl`` and, inside of JSON or under a name that ends in
``.json``, ``experiment_state-*`` and the states of random search, wrappers and callbacks; the
``fit`` after it unpickles ``error.pkl`` of failed trials.  Ray Tune writes and reads all of these
by itself, so whoever could write there would run code with the rights of who goes on.  Only what
Optuna has learnt is ours, and JSON (:mod:`lorat_platform.search.searcher_state`).
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from lorat.errors import UserError
from lorat.files import storage
from lorat.files.home import home

ORIGIN_FILE = "storage"
"""File of a search's folder on this machine: the address where this user began it."""


def note_origin(name: str, location: storage.Location) -> None:
    """Remember that this user began a search there.

    Raises:
        UserError: if a search of that name in another storage has its results on this machine.
    """
    file = home() / "runs" / name / ORIGIN_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(file, "x") as new:
            new.write(location.uri)
    except FileExistsError:
        if file.read_text() != location.uri:
            raise UserError(
                f"{file.parent} has the results of the search {name} in {file.read_text()}; give "
                "another --name."
            ) from None


def check_trusted(name: str, location: storage.Location) -> None:
    """Refuse a search whose folder others may have written.

    A local folder must belong to this user, as must what is unpickled, and nobody else may be able
    to write there, nor to replace it in the storage.  An object store has no such owner: it is
    trusted where ``LORAT_STORAGE`` names it, or this user began the search from this home folder.

    Args:
        name: of the search.
        location: its folder.

    Raises:
        UserError: with the reason.
    """
    if location.is_local:
        problem = _local_problem(Path(location.path))
    elif location.uri in (_in_environment(name), _begun_here(name)):
        problem = None
    else:
        problem = (
            f"{location.uri} is neither in the storage that LORAT_STORAGE names nor where you "
            "began it from this machine"
        )
    if problem:
        raise UserError(
            f"The search {name} is not gone on with: {problem}, and Ray Tune runs code that it "
            "finds there; mend that, or give --trust-search-folder if you know who wrote it."
        )


def _in_environment(name: str) -> str | None:
    address = os.environ.get("LORAT_STORAGE")
    return storage.join(address, name) if address else None


def _begun_here(name: str) -> str | None:
    file = home() / "runs" / name / ORIGIN_FILE
    if not file.exists() or _local_problem(file.parent):
        return None
    return file.read_text()


def _local_problem(folder: Path) -> str | None:
    # The storage itself may be reached over a link, and be in a sticky folder as /tmp is.
    parent = Path(os.path.realpath(folder.parent))
    about = parent.stat()
    if about.st_uid not in (os.geteuid(), 0):
        return f"{parent} belongs to {_user(about.st_uid)}"
    others = stat.S_IWOTH | (0 if _is_private(about.st_gid) else stat.S_IWGRP)
    if about.st_mode & others and not about.st_mode & stat.S_ISVTX:
        return f"others can write to {parent} (chmod go-w {parent})"
    for path in _believed(parent / folder.name):
        about = path.lstat()
        if stat.S_ISLNK(about.st_mode):
            return f"{path} is a link"
        if about.st_uid != os.geteuid():
            return f"{path} belongs to {_user(about.st_uid)}"
        if about.st_mode & (stat.S_IWOTH | stat.S_IWGRP):
            return f"others can write to {path} (chmod -R go-w {folder})"
    return None


def _believed(folder: Path) -> Iterator[Path]:
    """List the folder, what is directly in it, and every pickle below with its folder."""
    yield folder
    for root, folders, files in os.walk(folder):
        here = Path(root)
        if here == folder:
            yield from (here / name for name in (*folders, *files))
        elif pickles := [here / name for name in files if name.endswith(".pkl")]:
            yield from (here, *pickles)


def _is_private(gid: int) -> bool:
    """Tell whether a group is this user's alone, as most systems make one for every user."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    is_own = gid == user.pw_gid != 0 and group.gr_name == user.pw_name
    return is_own and set(group.gr_mem) <= {user.pw_name}


def _user(uid: int) -> str:
    try:
        return f"the user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"the user {uid}"
