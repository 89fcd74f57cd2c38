"""What Ray does not promise: all that is imported of its private modules.

``infra/UPGRADING.md`` says of each what breaks when Ray changes it, and which test tells.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

KEPT = "lorat"
"""Namespace of what we keep in Ray's head."""
SLOW_START = "timed out during startup"
"""In the message of ``ray.init`` on a very busy machine."""


def keep_to_loopback() -> None:
    """Keep Ray from replacing the loopback address by one that others reach.

    It does so except where it may form no cluster of several machines.  What it starts reads that
    from the environment, and this process has read it when Ray was imported, maybe before.
    """
    from ray._private import ray_constants

    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def read_token_again() -> None:
    """Let Ray see what changed of mode and token in the environment since it was imported."""
    from ray import _raylet

    parts: Any = _raylet  # its stub leaves the configuration out
    parts.Config.initialize("")
    parts.AuthenticationTokenLoader.instance().reset_cache()


def use_token_of_this_user() -> None:
    """Bring Ray's token to a Ray of this machine, where this user has one and chose no mode."""
    from ray._private.authentication import authentication_token_setup

    read_token_again()
    authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def address_of(address: str) -> str:
    """Return host:port of an address that may be ``auto``, as ``ray.init`` finds it.

    Raises:
        ConnectionError: if no Ray runs on this machine.
        ValueError: if it is no address.
    """
    from ray._private import services

    return services.canonicalize_bootstrap_address(address) or address


def lets_in(place: str) -> bool:
    """Tell whether a cluster, which must be there, takes this user's token.

    Raises:
        ConnectionError: if what answers there is none.
    """
    from ray import _raylet
    from ray.exceptions import AuthenticationError, RpcError

    client: Any = _raylet
    with _silent_stderr():  # what Ray's C++ says of a wrong token
        try:
            client.GcsClient(address=place)
        except AuthenticationError:
            return False
        except RpcError as error:
            raise ConnectionError(str(error)) from error
    return True


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what is written to the file descriptor of standard error, for a moment."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def join_no_ray_unasked() -> None:
    """Let calls of Ray fail where this process is connected to none.

    Else the first call of a thread that outlives its job's Ray would join any Ray of the machine.
    """
    from ray._private import auto_init_hook

    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    auto_init_hook.enable_auto_connect = False


def attempts_before() -> int:
    """Count the processes that have died over this task, which Ray starts again each time."""
    from ray._private import worker

    core: Any = worker.global_worker
    return core.core_worker.get_current_task_attempt_number()


def execution_callback() -> type:
    """Return the class of which Ray Data calls one after every step of its control loop."""
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    return ExecutionCallback


def set_data_context(context: Any) -> None:
    """Make a context that of the pipelines which this process makes from now on."""
    from ray.data import DataContext

    DataContext._set_current(context)


def keep_replica_to_loopback() -> None:
    """Let the server of this replica of Ray Serve listen on the loopback address only.

    Each has one, for other deployments, on all addresses; it runs whatever it is sent.  This is
    called by the constructor of what is served, before that server begins to listen.
    """
    from ray.serve._private import replica

    listen: Callable[[Any, str], int] = replica.add_port_to_grpc_server

    def listen_here(server: Any, address: str) -> int:
        return listen(server, address.replace("[::]", "127.0.0.1"))

    replica.add_port_to_grpc_server = listen_here


def store(key: str, value: str, *, overwrite: bool = True) -> bool:
    """Keep a text in Ray's head, where all of its processes find it; return whether it was new."""
    from ray.experimental import internal_kv

    return not internal_kv._internal_kv_put(key, value, overwrite, namespace=KEPT)


def stored(key: str) -> str | None:
    """Return a text that :func:`store` kept; none if there is none."""
    from ray.experimental import internal_kv

    value = internal_kv._internal_kv_get(key, namespace=KEPT)
    return None if value is None else value.decode()


def stored_keys(prefix: str) -> list[str]:
    """Return the keys that begin so of what :func:`store` kept."""
    from ray.experimental import internal_kv

    return [key.decode() for key in internal_kv._internal_kv_list(prefix, namespace=KEPT)]


def forget(key: str) -> None:
    """Remove a text that :func:`store` kept."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_del(key, namespace=KEPT)


def end_serve(seconds: float = 30.0) -> bool:
    """End Ray Serve and wait for its end; return whether that came in time.

    ``serve.shutdown`` waits in a task of the controller that only the controller's death ends, of
    which Ray prints that the task failed and will be retried.  Here the controller is asked, and
    its name is looked up until nobody has it.
    """
    import ray
    from ray.serve import context
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    client: Any = context._get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return True
    client.shutdown_cached_handles()
    until = time.monotonic() + seconds
    try:
        ray.get(client._controller.graceful_shutdown.remote(wait=False), timeout=seconds)
        while time.monotonic() < until:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            time.sleep(0.1)
    except (ray.exceptions.RayActorError, ValueError):  # it has ended; nobody has its name
        return True
    except ray.exceptions.GetTimeoutError:
        pass
    finally:
        context._disconnect()
    return False


def torch_backend() -> type:
    """Return the class with which Ray Train starts and ends the process group of torch."""
    from ray.train.torch.config import _TorchBackend

    return _TorchBackend


def hand_out_controller(trainer: Any, receive: Callable[[Any], None]) -> None:
    """Let ``receive`` have the controller of a training when it begins.

    The handler of Ctrl-C that Ray Train installs in that place would end the process with code 0.
    """
    trainer._register_sigint_handler = receive


def could_not_be_placed(error: BaseException) -> bool:
    """Tell whether a training ended since the cluster did not give its workers in time."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(_controller_failure(error), WorkerGroupStartupTimeoutError)


def why_not_started(error: BaseException) -> str | None:
    """Return why the workers of a training could not be started; none if that is not its error."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

    failure = _controller_failure(error)
    return str(failure) if isinstance(failure, WorkerGroupStartupFailedError) else None


def _controller_failure(error: BaseException) -> BaseException | None:
    return getattr(error, "controller_failure", None)


def nvml() -> Any:
    """Return Ray's copy of the binding to NVIDIA's management library, begun; none without a GPU.

    torch and MLflow ask for a package of its own for this.
    """
    from ray._private.thirdparty import pynvml

    binding: Any = pynvml  # what it has is not typed
    try:
        binding.nvmlInit()
    except binding.NVMLError:
        return None
    return binding
