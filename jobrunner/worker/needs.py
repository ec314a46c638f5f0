"""What an attempt needs before it can run, fetched by the agent once for all that need it.

plan, code ── GET /blobs/<hash> ──► a file, checked against its name
MapOutputs, Winners ── asked of the leader ──► a file that slots read
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from jobrunner.control.messages import GetMapOutputs, GetWinners, MapOutputs, Start, TaskKind, Winners
from jobrunner.errors import Unavailable
from jobrunner.ids import Hash, JobId
from jobrunner.planner.plan import JobPlan, decode_plan
from jobrunner.rpc.client import Masters
from jobrunner.spec.settings import Settings
from jobrunner.worker.files import Directory, blob_file, keep_answer, keep_blob, load_blob


class Needs:
    """Plans in memory, the rest as files. Raises as `Masters` does, OSError of the disk, CorruptData."""

    def __init__(self, directory: Directory, masters: Masters, settings: Settings) -> None:
        self._directory = directory
        self._masters = masters
        self._bytes_max = settings.limits.job_bytes_max
        self._plans: dict[Hash, JobPlan] = {}
        self._files: dict[tuple[str, ...], str] = {}  # Here already, by what it is.
        self._fetching: dict[tuple[str, ...], asyncio.Task[str]] = {}

    def plan_if_here(self, plan: Hash) -> JobPlan | None:
        return self._plans.get(plan)

    async def plan(self, plan: Hash) -> JobPlan:
        found = self._plans.get(plan)
        if found is None:
            file = await self.blob(plan)
            with open(file, "rb") as stored:
                found = self._plans.setdefault(plan, decode_plan(stored.read()))
        return found

    async def blob(self, blob: Hash) -> str:
        """The file of a blob."""
        return await self._once(("blob", blob), lambda: self._fetch_blob(blob))

    def answer_key(self, start: Start) -> tuple[str, ...] | None:
        """What has to be asked of the leader for this attempt, if anything."""
        if start.kind is TaskKind.REDUCE:
            return ("outputs", start.attempt.job, start.map_stage, str(start.version))
        if start.kind is TaskKind.PUBLISH:
            return ("winners", start.attempt.job)
        return None

    def answer_if_here(self, start: Start) -> str | None:
        """The file of the leader's answer; "" where none is needed, None where it is not here yet."""
        key = self.answer_key(start)
        return "" if key is None else self._files.get(key)

    async def answer(self, start: Start) -> str:
        """The file of the leader's answer; "" where none is needed."""
        key = self.answer_key(start)
        if key is None:
            return ""
        job = start.attempt.job
        if start.kind is TaskKind.REDUCE:
            question: GetMapOutputs | GetWinners = GetMapOutputs(job, start.map_stage, start.version)
        else:
            question = GetWinners(job)
        return await self._once(key, lambda: self._fetch_answer(job, "-".join((key[0], *key[2:])), question))

    def forget(self, job: JobId) -> list[Hash]:
        """Drop what was kept for a job; returns blobs that no other job here uses."""
        dropped: set[Hash] = set()
        for plan in [plan for plan, kept in self._plans.items() if kept.job == job]:
            dropped |= {plan, self._plans.pop(plan).code}
        used = {kept.code for kept in self._plans.values()} | set(self._plans)
        for key in [key for key in self._files if key[1] == job or key[1] in dropped - used]:
            del self._files[key]
        return sorted(dropped - used)

    async def _fetch_blob(self, blob: Hash) -> str:
        if load_blob(self._directory, blob) is not None:
            return blob_file(self._directory, blob)
        data = await self._masters.fetch(f"/blobs/{blob}", bytes_max=self._bytes_max)
        return keep_blob(self._directory, blob, data)

    async def _fetch_answer(self, job: JobId, name: str, question: GetMapOutputs | GetWinners) -> str:
        page = whole = await self._masters.call(question)
        while isinstance(page, MapOutputs | Winners) and page.more:
            page = await self._masters.call(msgspec.structs.replace(question, offset=_rows(whole)))
            whole = _joined(whole, page)
        return keep_answer(self._directory, job, name, whole)

    async def _once(self, key: tuple[str, ...], fetch: Callable[[], Coroutine[Any, Any, str]]) -> str:
        """One fetch for all who ask at the same time; a failure is for all of them, and is not kept."""
        if key in self._files:
            return self._files[key]
        task = self._fetching.get(key)
        if task is None:
            task = self._fetching[key] = asyncio.create_task(self._fetch(key, fetch))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # It may outlive who asked.
        return await asyncio.shield(task)

    async def _fetch(self, key: tuple[str, ...], fetch: Callable[[], Coroutine[Any, Any, str]]) -> str:
        try:
            self._files[key] = await fetch()
            return self._files[key]
        finally:
            del self._fetching[key]


def _rows(answer: msgspec.Struct) -> int:
    return (
        len(answer.owner)
        if isinstance(answer, MapOutputs)
        else len(answer.winners)
        if isinstance(answer, Winners)
        else 0
    )


def _joined(whole: msgspec.Struct, page: msgspec.Struct) -> msgspec.Struct:
    """An answer and its next page. Raises Unavailable if it has changed between the two: then it is asked for anew."""
    if isinstance(whole, Winners) and isinstance(page, Winners):
        return Winners(whole.winners + page.winners, whole.counters, page.more)
    assert isinstance(whole, MapOutputs) and isinstance(page, MapOutputs), page
    if (page.version, page.owners) != (whole.version, whole.owners):
        raise Unavailable("map outputs changed while they were asked for")
    return MapOutputs(
        whole.version,
        whole.owners,
        whole.owner + page.owner,
        whole.attempt + page.attempt,
        whole.token + page.token,
        whole.digest + page.digest,
        whole.bytes + page.bytes,
        page.more,
    )
