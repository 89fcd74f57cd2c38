#!/usr/bin/env bash
# Submit jobs/train.py to the Ray of this machine, starting one if none answers.
#   infra/local_run.sh [arguments of jobs/train.py]
#   infra/local_run.sh --stop      stop the Ray that this script started
set -euo pipefail
cd "$(dirname "$0")/.."
state="${LORAT_HOME:-$HOME/.lorat}"
pid_file="$state/ray.pid"
port="${LORAT_RAY_PORT:-8265}"
address="http://127.0.0.1:$port"
mkdir -p "$state"

if [ "${1:-}" = --stop ]; then
  if [ -f "$pid_file" ] && kill "$(cat "$pid_file")" 2>/dev/null; then
    while kill -0 "$(cat "$pid_file")" 2>/dev/null; do sleep 0.2; done
    echo "Stopped the local Ray."
  else
    echo "No local Ray was started by 'make run'."
  fi
  rm -f "$pid_file"
  exit 0
fi

command -v ray >/dev/null || {
  echo "error: ray is not on PATH; use 'make run', or activate your environment first." >&2
  exit 2
}

# Whoever reaches Ray runs code as this user, and other users reach the loopback address, too: Ray
# answers only who has the token.  This is the file in which Ray's own commands look for it.
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
token_file="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
if [ "$RAY_AUTH_MODE" = token ] && [ -z "${RAY_AUTH_TOKEN:-}" ]; then
  if [ ! -e "$token_file" ]; then
    (umask 077 && mkdir -p "$(dirname "$token_file")" &&
      python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$token_file")
  fi
  chmod 600 "$token_file"
fi

# Says whose Ray listens on a port: nobody's, another user's, one with another token, one of this
# user that asks for no token, or one that took the token.
look() { python - "$port" "$token_file" <<'PY'
import os, sys, urllib.error, urllib.request
import psutil

port, token_file = int(sys.argv[1]), sys.argv[2]
owners = set()
try:
    for socket in psutil.net_connections("tcp"):
        if socket.status == psutil.CONN_LISTEN and socket.laddr.port == port:
            owners.add(socket.pid and psutil.Process(socket.pid).uids().real)
except (psutil.AccessDenied, psutil.NoSuchProcess):
    pass  # only root may ask on some systems
if owners - {os.getuid()}:
    sys.exit(print("foreign"))


def status(headers):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/version", headers=headers)
    try:
        return urllib.request.urlopen(request, timeout=5).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


open_to_all = status({})
if open_to_all in (401, 403):
    token = os.environ.get("RAY_AUTH_TOKEN") or ""
    if not token and os.path.exists(token_file):
        token = open(token_file).read().strip()
    print("ready" if status({"Authorization": f"Bearer {token}"}) == 200 else "refused")
else:
    print("nobody" if open_to_all is None else "open")
PY
}

# What is given here would stand in the list of processes and in Ray's logs.
python -c 'import sys
sys.path[:0] = [".", "platform", "jobs"]
import command, flags
command.run(lambda: flags.refuse_secrets_in(sys.argv[1:]))' "$@"

found="$(look)"
case "$found" in
  foreign)
    echo "error: Another user's server has port $port; set LORAT_RAY_PORT to a free one." >&2
    exit 2 ;;
  refused)
    echo "error: The Ray on port $port asks for another token; end it, give its token in" \
      "RAY_AUTH_TOKEN, or set LORAT_RAY_PORT to a free port." >&2
    exit 2 ;;
  open)
    [ "$RAY_AUTH_MODE" != token ] || echo "The Ray on port $port asks for no token: every user of" \
      "this machine can run code in it. Once it is ended, this command starts one that does." ;;
esac

if [ "$found" = nobody ]; then
  # Ray replaces 127.0.0.1 by an address that others reach, except where it may form no cluster.
  export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
  # There is no other node that could take over, so a stop need not wait for one.
  export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
  echo "Starting a local Ray ('make stop' ends it; its dashboard, $address, asks for the token" \
    "in $token_file)."
  # The default ports of these two servers may belong to another Ray of this machine.
  read -r client_port agent_port < <(python -c 'import socket
sockets = [socket.socket() for _ in range(2)]
for s in sockets:
    s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in sockets))')
  setsid nohup ray start --head --block --disable-usage-stats --include-dashboard=true \
    --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 --dashboard-port="$port" \
    --port=0 --ray-client-server-port="$client_port" \
    --dashboard-agent-listen-port="$agent_port" >"$state/ray.log" 2>&1 </dev/null &
  echo $! >"$pid_file"
  healthy() { python - "http://127.0.0.1:$agent_port/api/local_raylet_healthz" <<'PY'
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1], timeout=2).read()
except OSError:
    sys.exit(1)
PY
}
  for _ in $(seq 120); do
    healthy && case "$(look)" in ready | open) break ;; esac
    kill -0 "$(cat "$pid_file")" 2>/dev/null || { tail -n 20 "$state/ray.log" >&2; exit 1; }
    sleep 1
  done
  healthy || { echo "error: Ray did not start; see $state/ray.log." >&2; exit 1; }
elif [ -n "${MLFLOW_TRACKING_PASSWORD:-}${MLFLOW_TRACKING_TOKEN:-}${AWS_SECRET_ACCESS_KEY:-}" ]; then
  echo "The local Ray keeps the passwords it was started with; for other ones 'make stop' first."
fi

# The job's driver inherits the head's environment, so ours goes along, as the platform hands it on
# to its workers.  Not keys and passwords: Ray writes the environment of a job into its logs and
# shows it to everybody on this machine.  A Ray that is started here has them from this shell.
environment="$(python -c 'import json, os, sys
sys.path[:0] = [".", "platform"]
from lorat_platform.cluster.connection import FORWARDED
print(json.dumps({"env_vars": {n: os.environ[n] for n in FORWARDED if n in os.environ}}))')"
exec ray job submit --address "$address" --working-dir . --runtime-env-json "$environment" \
  -- python jobs/train.py "$@"
