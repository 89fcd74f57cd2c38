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

answers() { python - "$1" <<'PY'
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1], timeout=2).read()
except OSError:
    sys.exit(1)
PY
}

# What is given here would stand in the list of processes and in Ray's logs.
python -c 'import sys
sys.path[:0] = [".", "platform"]
from lorat_platform import command
command.run(lambda: command.refuse_secrets_in(sys.argv[1:]))' "$@"

if ! answers "$address/api/version"; then
  # Ray replaces 127.0.0.1 by an address that others reach, except where it may form no cluster.
  export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
  # There is no other node that could take over, so a stop need not wait for one.
  export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
  echo "Starting a local Ray (dashboard $address; 'make stop' ends it)."
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
  ready="http://127.0.0.1:$agent_port/api/local_raylet_healthz"
  for _ in $(seq 120); do
    answers "$address/api/version" && answers "$ready" && break
    kill -0 "$(cat "$pid_file")" 2>/dev/null || { tail -n 20 "$state/ray.log" >&2; exit 1; }
    sleep 1
  done
  answers "$ready" || { echo "error: Ray did not start; see $state/ray.log." >&2; exit 1; }
elif [ -n "${MLFLOW_TRACKING_PASSWORD:-}${MLFLOW_TRACKING_TOKEN:-}${AWS_SECRET_ACCESS_KEY:-}" ]; then
  echo "The local Ray keeps the passwords it was started with; for other ones 'make stop' first."
fi

# The job's driver inherits the head's environment, so ours goes along, as the platform hands it on
# to its workers.  Not keys and passwords: Ray writes the environment of a job into its logs and
# shows it to everybody on this machine.  A Ray that is started here has them from this shell.
environment="$(python -c 'import json, os, sys
sys.path[:0] = [".", "platform"]
from lorat_platform.cluster import FORWARDED
print(json.dumps({"env_vars": {n: os.environ[n] for n in FORWARDED if n in os.environ}}))')"
exec ray job submit --address "$address" --working-dir . --runtime-env-json "$environment" \
  -- python jobs/train.py "$@"
