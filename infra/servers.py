"""The servers that a cluster needs beside Ray, started small and on loopback."""

from __future__ import annotations

import glob
import os
import pwd
import secrets
import shutil
import subprocess
import sysconfig
import urllib.request
import venv
from pathlib import Path

from processes import Failure, Processes, answers, free_port, say, wait_for

BUCKET = "lorat"


def dependencies_only(folder: Path) -> Path:
    """Make an environment that sees this one's packages but not the project.

    A folder named in a .pth file is searched, the .pth files inside it (an editable project) are
    not read.
    """
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def postgres_programs() -> Path:
    """Return the folder of PostgreSQL's programs, installing Debian's package if root may.

    Raises:
        Failure: if it is not there and cannot be installed.
    """

    def found() -> list[str]:
        return sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))

    if not found() and os.geteuid() == 0 and shutil.which("apt-get"):
        say("installing Debian's postgresql")
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in ("update -qq", "install -y -qq --no-install-recommends postgresql"):
            subprocess.run(
                ["apt-get", *command.split()], env=environment, stdout=subprocess.DEVNULL
            )
    if not found():
        raise Failure("PostgreSQL is not installed; run 'apt-get install postgresql' as root.")
    return Path(found()[-1]).parent


def start_postgres(processes: Processes, *, password: str) -> str:
    """Start PostgreSQL with an empty database ``mlflow``; return its URI."""
    programs, port = postgres_programs(), free_port()
    data = processes.folder / "postgres"
    data.mkdir()
    secret = processes.folder / "postgres.password"
    secret.write_text(password)
    user = None
    if os.geteuid() == 0:  # it refuses to run as root
        user = "postgres"
        account = pwd.getpwnam(user)
        for path in (data, secret):
            os.chown(path, account.pw_uid, account.pw_gid)
    options = ["--username=mlflow", "--auth=scram-sha-256", f"--pwfile={secret}", "--no-sync"]
    processes.run(programs / "initdb", f"--pgdata={data}", *options, user=user)
    secret.unlink()
    processes.start(
        "postgres", programs / "postgres", "-D", data, "-k", data, "-p", str(port), "-F",
        "-c", "listen_addresses=127.0.0.1", user=user,
    )  # fmt: skip
    processes.environment["PGPASSWORD"] = password
    address = ("--host=127.0.0.1", f"--port={port}", "--username=mlflow")
    check = [str(programs / "pg_isready"), "--quiet", *address]
    wait_for("PostgreSQL", lambda: subprocess.run(check).returncode == 0, seconds=60)
    processes.run(programs / "createdb", *address, "mlflow")
    return f"postgresql+psycopg2://mlflow:{password}@127.0.0.1:{port}/mlflow"


def start_storage(processes: Processes, python: Path) -> None:
    """Start the object store and make the bucket."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    processes.start("storage", python, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port))
    wait_for("the object store", lambda: answers(url), seconds=60)
    request = urllib.request.Request(f"{url}/{BUCKET}", method="PUT")
    urllib.request.urlopen(request, timeout=10).close()
    processes.environment |= {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "small",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def start_mlflow(processes: Processes, python: Path, database: str) -> None:
    """Start the MLflow server as infra/compose/compose.yaml does, but with one worker process."""
    port = free_port()
    (processes.folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {database}\n"
    )
    login = {"USERNAME": "small", "PASSWORD": secrets.token_hex(16)}
    processes.environment |= {f"MLFLOW_TRACKING_{name}": value for name, value in login.items()}
    processes.environment |= {f"MLFLOW_AUTH_ADMIN_{name}": value for name, value in login.items()}
    processes.environment |= {
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}",
        "MLFLOW_AUTH_CONFIG_PATH": str(processes.folder / "auth.ini"),
        "MLFLOW_BACKEND_STORE_URI": database,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
    }
    processes.start(
        "mlflow", python, "-m", "mlflow", "server", "--app-name=basic-auth", "--workers=1",
        "--host=127.0.0.1", f"--port={port}", f"--allowed-hosts=127.0.0.1:{port}",
        f"--artifacts-destination=s3://{BUCKET}/mlflow",
    )  # fmt: skip
