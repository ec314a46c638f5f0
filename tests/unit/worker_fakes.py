"""A master made of a script: it gives a session, serves blobs, takes reports, and says what a test tells it to say."""

import asyncio
import itertools
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from jobrunner.control.messages import (
    Ack,
    Beat,
    BeatAck,
    BlockOwner,
    Ended,
    Failed,
    GetJob,
    GetMapOutputs,
    GetWinners,
    Instruct,
    Instruction,
    JobState,
    JobStatus,
    MapDone,
    MapOutputs,
    OfferBlocks,
    Offered,
    OutputFile,
    Registered,
    RegisterWorker,
    Report,
    Reported,
    ReportLostOutput,
    Sealable,
    StageSpec,
    Start,
    TaskKind,
    Verdict,
    Winner,
    Winners,
    message_decoder,
)
from jobrunner.errors import SessionEnded, Unavailable
from jobrunner.ids import AttemptId, Epoch, Hash, JobId, SessionId, StageName, Token, job_id_from_number
from jobrunner.planner.code import StepCode, pack_code
from jobrunner.planner.plan import (
    AttemptPlan,
    InputFile,
    InputPlan,
    JobPlan,
    OutputPlan,
    Piece,
    ShufflePlan,
    blob_hash,
    encode_plan,
)
from jobrunner.rpc.connection import Connection
from jobrunner.rpc.server import RpcServer
from jobrunner.spec.settings import AttemptSection, SessionSection, Settings
from jobrunner.worker.agent import Agent
from jobrunner.worker.config import AgentConfig
from jobrunner.worker.template import TemplateHandle

CLUSTER, TOKEN = "c" * 32, "secret"
DEADLINE_S = 20.0
SETTINGS = Settings(session=SessionSection(beat_ms=50), attempt=AttemptSection(slot_attempts_max=1000))
_jobs = itertools.count(1)


async def until(condition: Callable[[], Any], what: str = "") -> Any:
    """Wait for a condition; returns what it returned."""
    end = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {DEADLINE_S:g} s for {what or condition}"
        await asyncio.sleep(0.005)
    return found


class FakeJob:
    """A job of one input file a map task."""

    def __init__(
        self,
        root: Path,
        step: StepCode,
        texts: list[str],
        *,
        reducers: int = 1,
        timeout_ms: int = 60_000,
        import_timeout_ms: int = 10_000,
        log_bytes_max: int = 100_000,
        tail_bytes_max: int = 16_384,
        sys_path: list[str] | None = None,
        params: dict[str, str] | None = None,
    ) -> None:
        self.id: JobId = job_id_from_number(next(_jobs))
        self.output = root / f"out-{self.id}"
        inputs = []
        for number, text in enumerate(texts):
            path = root / f"{self.id}-{number}.txt"
            path.write_text(text)
            inputs.append(InputFile(str(path), path.stat().st_size, path.stat().st_mtime_ns))
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        self.code = pack_code([step], sys_path=sys_path or [], python=python)
        stages = [StageSpec(StageName("map"), TaskKind.MAP, len(texts), final=not reducers)]
        if reducers:
            stages.append(StageSpec(StageName("reduce"), TaskKind.REDUCE, reducers, final=True, reads=StageName("map")))
        self.plan = JobPlan(
            job=self.id,
            name="test",
            code=blob_hash(self.code),
            params=params or {},
            inputs=inputs,
            splits=[[Piece(number, 0, file.bytes)] for number, file in enumerate(inputs)],
            stages=stages,
            input=InputPlan("text", "replace", 1 << 20),
            output=OutputPlan(str(self.output), "error", "text", ".txt"),
            shuffle=ShufflePlan(reducers, 1, 1 << 20, 16, 1024, 1 << 20, 2, 1000, "lz4"),
            attempt=AttemptPlan(timeout_ms, import_timeout_ms, log_bytes_max, tail_bytes_max),
            publish_tries_max=2,
            retry_ms=10,
        )
        self.encoded = encode_plan(self.plan)

    def start(self, token: int, kind: TaskKind, partition: int = 0, *, attempt: int = 0, version: int = 0) -> Start:
        stage = StageName(kind.value)
        name = AttemptId(self.id, stage, partition, attempt)
        return Start(name, Token(token), kind, blob_hash(self.encoded), StageName("map"), version)


class FakeMaster:
    """One master, always the leader. `verdict` decides about a report."""

    def __init__(self) -> None:
        self.blobs: dict[Hash, bytes] = {}
        self.registered: list[RegisterWorker] = []
        self.beats: list[Beat] = []
        self.beats_at_offer: list[Beat] = []  # Those heard before blocks were offered.
        self.ended: list[Ended] = []
        self.offered: list[OfferBlocks] = []
        self.lost: list[ReportLostOutput] = []
        self.lost_owner: BlockOwner | None = None  # Where map outputs are said to be, instead of where they are.
        self.page_rows = 1_000  # Rows in one answer about map outputs or winners.
        self.verdict: Callable[[Ended], Verdict] = lambda _: Verdict.ACCEPTED
        self.asked_jobs: list[JobId] = []
        self.tidy = False  # What GetJob says.
        self.session_over = False
        self.keep = True  # What is said of offered blocks.
        self.mute = False  # Answers nothing but Unavailable.
        self.session = 100
        self.epoch = 1
        self._sequence = itertools.count(1)
        self._tokens = itertools.count(1)
        self._connections: list[Connection] = []
        self._decoder = message_decoder()
        self.server = RpcServer(
            cluster_id=CLUSTER, cluster_token=TOKEN, settings=SETTINGS, handler=self, identity="a" * 32
        )
        self.server.add_get("/blobs/{hash}", self._blob)

    async def start(self, sock: socket.socket | None = None) -> str:
        return await self.server.start(sock)

    def add(self, job: FakeJob) -> FakeJob:
        for data in (job.code, job.encoded):
            self.blobs[blob_hash(data)] = data
        return job

    def token(self) -> int:
        return next(self._tokens)

    def tell(self, *items: Instruction) -> None:
        message = Instruct(Epoch(self.epoch), SessionId(self.session), next(self._sequence), list(items))
        for connection in self._connections:
            connection.push(message)

    async def do(self, job: FakeJob, kind: TaskKind, partition: int = 0, **options: int) -> Ended:
        """Run one attempt and wait for its end."""
        start = job.start(self.token(), kind, partition, **options)
        self.tell(start)
        return await self.end_of(start)

    async def end_of(self, start: Start) -> Ended:
        found: list[Ended] = await until(
            lambda: [report for report in self.ended if report.token == start.token], f"the end of {start.attempt}"
        )
        return found[0]

    # --- the handler of RpcServer ---

    def decode(self, role: str, body: bytes) -> msgspec.Struct:
        return self._decoder.decode(body)

    def on_open(self, peer: Connection) -> None:
        self._connections.append(peer)

    def on_close(self, peer: Connection) -> None:
        self._connections.remove(peer)

    def on_push(self, peer: Connection, message: msgspec.Struct) -> None:
        raise AssertionError(message)

    async def on_request(self, peer: Connection, message: msgspec.Struct) -> msgspec.Struct:
        if self.mute:
            raise Unavailable("no leader")
        if isinstance(message, RegisterWorker):
            self.registered.append(message)
            self.session_over, self.session = False, self.session + 1
            return Registered(SessionId(self.session), Epoch(self.epoch), 1000, 50)
        if self.session_over:
            raise SessionEnded("over")
        if isinstance(message, Beat):
            self.beats.append(message)
            return BeatAck(Epoch(self.epoch))
        if isinstance(message, Report):
            self.ended += message.items
            return Reported([self.verdict(item) for item in message.items])
        if isinstance(message, OfferBlocks):
            self.offered.append(message)
            self.beats_at_offer = list(self.beats)
            return Offered([self.keep] * len(message.blocks))
        if isinstance(message, ReportLostOutput):
            self.lost.append(message)
            return Ack()
        if isinstance(message, GetMapOutputs):
            return self._map_outputs(message)
        if isinstance(message, GetJob):
            self.asked_jobs.append(message.job)
            return JobStatus(message.job, "", JobState.FAILED, None, "", 0, 0, [], {}, None, self.tidy, 1)
        assert isinstance(message, GetWinners), message
        return self._winners(message)

    def _map_outputs(self, asked: GetMapOutputs) -> MapOutputs:
        done = sorted(
            (item for item in self.ended if isinstance(item, MapDone) and item.attempt.job == asked.job),
            key=lambda item: item.attempt.partition,
        )
        more = len(done) > asked.offset + self.page_rows
        done = done[asked.offset : asked.offset + self.page_rows]
        hello = self.registered[-1]
        owner = self.lost_owner or BlockOwner(SessionId(self.session), hello.directory, hello.address)
        return MapOutputs(
            asked.version,
            [owner],
            [0] * len(done),
            [item.attempt.attempt for item in done],
            [item.token for item in done],
            [item.digest for item in done],
            [item.bytes for item in done],
            more,
        )

    def _winners(self, asked: GetWinners) -> Winners:
        sealed = [item for item in self.ended if isinstance(item, Sealable) and item.attempt.job == asked.job]
        rows = [Winner(item.attempt.partition, item.attempt.attempt, item.token, item.files) for item in sealed]
        end = asked.offset + self.page_rows
        return Winners(rows[asked.offset : end], {}, len(rows) > end)

    async def _blob(self, request: web.Request) -> web.StreamResponse:
        data = self.blobs.get(Hash(request.match_info["hash"]))
        return web.Response(status=404) if data is None else web.Response(body=data)


class Cluster:
    """A fake master and a real agent with real processes."""

    def __init__(self, root: Path, template: TemplateHandle, *, slots: int = 2) -> None:
        self.root = root
        self.master = FakeMaster()
        self._template = template
        self._slots = slots

    async def __aenter__(self) -> "Cluster":
        address = await self.master.start()
        self.agent = Agent(agent_config(self.root, (address,), slots=self._slots), self._template)
        self._life = asyncio.create_task(self.agent.run())
        await until(lambda: self.master.beats, "the first beat")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.agent.stop()
        self.status = await self._life
        await self.master.server.stop()

    def job(self, step: StepCode, texts: list[str], **options: Any) -> FakeJob:
        return self.master.add(FakeJob(self.root, step, texts, **options))

    def log(self, start_or_end: Any, stream: str = "stdout") -> bytes:
        attempt = start_or_end.attempt
        path = self.root / "jobs" / attempt.job / "logs" / attempt.stage / str(attempt.partition) / str(attempt.attempt)
        return (path / stream).read_bytes() if (path / stream).exists() else b""


def agent_config(root: Path, masters: tuple[str, ...], *, slots: int = 2) -> AgentConfig:
    return AgentConfig(
        cluster_id=CLUSTER,
        cluster_token=TOKEN,
        masters=masters,
        settings=SETTINGS,
        directory=str(root / "worker-1"),
        cluster_dir=str(root),
        name=1,
        slots=slots,
    )


def failed(report: Ended) -> Failed:
    assert isinstance(report, Failed), report
    return report


def sealed_text(job: FakeJob, report: Ended) -> str:
    """What a Sealable's only file holds."""
    assert isinstance(report, Sealable), report
    (file,) = report.files
    assert isinstance(file, OutputFile)
    attempt = report.attempt
    stage = job.output.parent / f".{job.output.name}.jr-{job.id}"
    folder = f"{attempt.partition}-{attempt.attempt}-{report.token}"
    return (stage / "attempts" / folder / file.file).read_text()


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
