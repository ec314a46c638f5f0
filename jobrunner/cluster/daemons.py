"""One master or one worker in the foreground, until SIGTERM: what systemd, Kubernetes and `cluster up` start."""

import logging
import os
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Any

import msgspec

from jobrunner.cluster.directory import CLUSTER_FILE, ClusterDir, create_cluster_dir, locked
from jobrunner.errors import JobrunnerError, SpecError
from jobrunner.hosts import processors
from jobrunner.ids import MemberId
from jobrunner.spec.settings import Settings
from jobrunner.spec.settings_file import read_settings

if TYPE_CHECKING:
    from jobrunner.worker.template import TemplateHandle

SWITCH_INTERVAL_S = 0.0005  # A busy loop otherwise keeps the storage thread from reporting a sync for milliseconds.


@dataclass(frozen=True, slots=True)
class Place:
    """Where one daemon listens: on `listening` if it is bound already, else on host and port."""

    host: str
    port: int
    listening: socket | None = None


def start_logging() -> None:
    logging.basicConfig(
        level=os.environ.get("JOBRUNNER_LOG", "INFO").upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )


def run_loop(work: Coroutine[Any, Any, int]) -> int:
    """Run to the end, on uvloop where it is installed."""
    import asyncio

    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def serve_master_of(directory: ClusterDir, slot: int, place: Place, *, handle_sigint: bool) -> int:
    """Run master `slot` of a cluster directory in this process. Returns its exit status; raises what refuses it."""
    from jobrunner.master.server import MasterConfig, serve_master

    sys.setswitchinterval(SWITCH_INTERVAL_S)
    daemon = directory.file.masters[slot]
    config = MasterConfig(
        directory.cluster_id,
        directory.token,
        directory.path / f"master-{slot}",
        slot,
        MemberId(daemon.member),
        directory.members(),
        directory.settings(),
    )
    return run_loop(serve_master(config, place.listening, place.host, place.port, handle_sigint=handle_sigint))


def serve_worker_of(
    directory: ClusterDir, number: int, place: Place, template: "TemplateHandle", *, handle_sigint: bool
) -> int:
    """Run worker `number` of a cluster directory in this process, on a template that was started before."""
    from jobrunner.worker.config import AgentConfig
    from jobrunner.worker.main import run_worker_process

    worker_directory = directory.path / f"worker-{number}"
    worker_directory.mkdir(mode=0o700, exist_ok=True)
    config = AgentConfig(
        cluster_id=directory.cluster_id,
        cluster_token=directory.token,
        masters=tuple(directory.addresses),
        settings=directory.settings(),
        directory=str(worker_directory),
        cluster_dir=str(directory.path),
        name=number,
        slots=directory.file.slots,
        listening=place.listening,
        host=place.host,
        port=place.port,
        ignore_interrupt=not handle_sigint,
    )
    return run_worker_process(config, template)


def run_master(config: Path, slot: int, init: bool) -> int:
    """`jobrunner master --config DIR/cluster.toml --id N [--init]`."""
    start_logging()
    path = config.parent
    if init and not (path / CLUSTER_FILE).exists():
        with locked(path):
            if not (path / CLUSTER_FILE).exists():
                create_cluster_dir(path, _settings(config), workers=0, slots=default_slots(1))
    directory = ClusterDir.read(path)
    _check_id("master", slot, len(directory.file.masters))
    if init:
        directory.init_master(slot)
    host, _, port = directory.file.masters[slot].address.rpartition(":")
    return reported(lambda: serve_master_of(directory, slot, Place(host, int(port)), handle_sigint=True))


def run_worker(config: Path, number: int | None) -> int:
    """`jobrunner worker --config DIR/cluster.toml [--id N]`; without a number, the next that is not in use."""
    path = config.parent
    directory = ClusterDir.read(path)
    seed = str(directory.file.hash_seed)
    if os.environ.get("PYTHONHASHSEED") != seed:
        argv = [sys.executable, "-m", "jobrunner", "worker", "--config", str(config)]
        argv += ["--id", str(number)] if number is not None else []
        os.execve(sys.executable, argv, {**os.environ, "PYTHONHASHSEED": seed})
    start_logging()
    from jobrunner.worker.template import start_base_template

    host, port = directory.file.masters[0].address.rpartition(":")[0], 0
    if number is None:
        number = _next_number(directory)
    elif 0 <= number < len(directory.file.workers):
        port = directory.file.workers[number].port
    elif number < 0:
        raise SpecError(f"--id: found {number}, allowed: 0 and above")
    chosen, place = number, Place(host, port)
    template = start_base_template()
    return reported(lambda: serve_worker_of(directory, chosen, place, template, handle_sigint=True))


def _next_number(directory: ClusterDir) -> int:
    taken = {daemon.id for daemon in directory.file.workers}
    taken |= {int(p.name.removeprefix("worker-")) for p in directory.path.glob("worker-*") if p.name[7:].isdigit()}
    return max(taken, default=-1) + 1


def _settings(config: Path) -> Settings:
    return read_settings(config) if config.exists() else Settings()


def _check_id(role: str, found: int, count: int) -> None:
    if not 0 <= found < count:
        raise SpecError(f"--id: found {found}, allowed: 0 to {count - 1} ({role}s of this cluster)")


def reported(run: Any) -> int:
    """Run a daemon; what ends it is the last line of its log, and its exit status says what kind of end it was."""
    try:
        status: int = run()
    except JobrunnerError as error:
        logging.getLogger(__name__).critical("%s", error)
        return error.exit_status
    except msgspec.MsgspecError as error:
        logging.getLogger(__name__).critical("damaged file: %s", error)
        return 5
    return status


def default_slots(workers: int) -> int:
    """The machine's processors shared by its workers, at least one each."""
    return max(1, processors() // max(1, workers))
