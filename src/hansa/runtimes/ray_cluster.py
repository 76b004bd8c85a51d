"""The Ray engine as hansa uses it: find or start it, ask what fits on it, and send it a value for all workers."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from hansa.core.errors import InputError, RunError
from hansa.runtimes.blame import first_line

_OURS = {  # of an engine that hansa starts
    "RAY_USAGE_STATS_ENABLED": "0",  # it sends nothing to anybody
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what newer versions do anyway; 2.49 to 2.55 warn that they will
}


def engine() -> Any:
    """The ``ray`` module; ``InputError`` names the extra where it is not installed."""
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "ray":
            raise
        raise InputError("Ray: expected Ray to be installed, found that it is not; pip install 'hansa[ray]'") from error
    return ray


def connect(ray: Any, address: str | None, num_cpus: int) -> bool:
    """Use the engine that runs in this process, or join the cluster at ``address``, or start one of ``num_cpus`` here.

    Without an address, the environment's ``RAY_ADDRESS`` is where a cluster is looked for. Returns whether it is for
    hansa to shut down. Raises ``InputError`` where Ray does not start or nobody answers.
    """
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    here: dict[str, Any] = {"num_cpus": num_cpus, "include_dashboard": False} if address == "local" else {}
    try:
        with _environment(_OURS if here else {}), _quiet():
            ray.init(address=address, log_to_driver=False, configure_logging=False, **here)
    except Exception as error:  # of many kinds, some of them the system's
        wanted = "to start Ray on this machine" if here else f"a Ray cluster at {address}"
        raise InputError(
            f"Ray: expected {wanted}, found {type(error).__name__}: {first_line(error)}; start one with `ray start "
            '--head` and give address="auto", or call ray.init() yourself'
        ) from error
    return True


def num_fitting(ray: Any, needs: Mapping[str, float]) -> int:
    """How many workers of such ``needs`` the cluster's machines can hold, were they idle."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(
        min(math.floor(machine.get(name, 0) / amount + 1e-9) for name, amount in needs.items() if amount)
        for machine in machines
    )


def put(ray: Any, value: Any, what: str) -> Any:
    """A reference to ``value`` in Ray's store: a copy a machine, which its workers read in place.

    ``what`` it is stands in the error where it cannot be pickled, or there is no room.
    """
    try:
        return ray.put(value)
    except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
        raise RunError(
            f"Ray: expected room for {what} in Ray's store, found {first_line(error)}; call "
            "ray.init(object_store_memory=...) with more yourself, or give a population whose functions load the data"
        ) from error
    except Exception as error:  # whatever an object's own way to be pickled raises
        raise InputError(
            f"Ray: expected {what} that can be sent to workers, found {type(error).__name__}: {first_line(error)}; "
            "open files, locks and connections within the functions that use them, or use runtime=hansa.InProcess()"
        ) from error


@contextmanager
def own_modules_travel(ray: Any) -> Iterator[None]:
    """Let what is pickled bring the code of modules that no import finds: an app file, and what lies beside it."""
    cloudpickle = ray.cloudpickle
    mine = [module for module in _modules() if module.__name__ not in cloudpickle.list_registry_pickle_by_value()]
    for module in mine:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in mine:
            cloudpickle.unregister_pickle_by_value(module)


def _modules() -> list[ModuleType]:
    """Modules of a user's own that another process could not import by their name."""
    prefixes = (sys.prefix, sys.base_prefix)
    installed = tuple({form(prefix) + os.sep for prefix in prefixes for form in (os.path.abspath, os.path.realpath)})
    return [
        module
        for name, module in list(sys.modules.items())
        if isinstance(file := getattr(module, "__file__", None), str)
        and os.path.isabs(file)
        and name not in ("__main__", "__mp_main__")
        and name.partition(".")[0] != "hansa"
        and not file.startswith(installed)
        and not _is_found(name, file)
    ]


def _is_found(name: str, file: str) -> bool:
    """Whether an import of ``name`` would find ``file``."""
    path, spec, names = None, None, name.split(".")
    for count in range(1, len(names) + 1):
        asked = ".".join(names[:count])
        finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
        spec = next((found for finder in finders if (found := finder.find_spec(asked, path))), None)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return spec is not None and spec.origin == file


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set what is not set, for as long as this lasts."""
    mine = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in mine})
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Let Ray log errors only: it has much to say as it starts."""
    log = logging.getLogger("ray")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
