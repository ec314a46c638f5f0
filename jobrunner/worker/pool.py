"""The agent's children: a base template, a template a job, and slots; forked, spoken to, killed, buried.

A slot counts as gone only when its template has told how it ended and all that it said was heard: a result sent in the
last instant is a result. A template that dies takes its slots along (the kernel sees to it).
"""

import asyncio
import os
import signal
import socket
from dataclasses import dataclass, field
from typing import Protocol

from jobrunner.control.messages import EndCause
from jobrunner.ids import JobId
from jobrunner.worker import processes, wire
from jobrunner.worker.links import Link, LogPipe
from jobrunner.worker.logs import AttemptLog
from jobrunner.worker.template import TemplateHandle


class PoolEvents(Protocol):
    """What the pool tells the agent, from the loop."""

    def said(self, slot: int, message: wire.FromSlot) -> None: ...

    def slot_exited(self, slot: int, cause: EndCause, message: str) -> None: ...

    def base_lost(self) -> None: ...

    def remark(self, text: str) -> None: ...


class ImportFailure(Exception):
    """A job's modules could not be imported here."""

    def __init__(self, cause: EndCause, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.cause = cause
        self.message = message
        self.traceback = traceback


@dataclass(slots=True)
class _Output:
    """A child's stdout and stderr."""

    out: LogPipe
    err: LogPipe
    log: AttemptLog | None = None

    def switch(self, log: AttemptLog) -> None:
        self.drain()
        if self.log is not None:
            self.log.close()
        self.log, self.out.log, self.err.log = log, log.stdout, log.stderr

    def drain(self) -> None:
        self.out.drain()
        self.err.drain()

    def close(self) -> None:
        self.drain()
        self.out.close()
        self.err.close()
        if self.log is not None:
            self.log.close()


@dataclass(slots=True)
class _Template:
    child: int
    code: str
    plan: str
    output: _Output
    link: Link[wire.FromTemplate]
    imported: asyncio.Future[None]
    forks: bool = False  # Slots may be forked from it.


@dataclass(slots=True)
class _Slot:
    owner: Link[wire.FromTemplate]  # Of the template that forked it, and alone may kill and bury it.
    link: Link[wire.FromSlot]
    output: _Output
    exited: bool = field(default=False)


class Pool:
    """All child processes of one agent."""

    def __init__(self, handle: TemplateHandle, events: PoolEvents) -> None:
        self._events = events
        self._slots: dict[int, _Slot] = {}
        self._templates: dict[JobId, _Template] = {}
        self._leaving: dict[int, _Template] = {}  # Told to end; by child.
        self._child_last = 0
        self._closing = False
        self._base: Link[wire.FromTemplate] = Link(handle.socket, wire.FromTemplate, self._base_said, self._base_closed)
        self._base.send(wire.Hello(os.getpid()))

    # --- templates ---------------------------------------------------------------------------------------------------

    async def template(self, job: JobId, *, code: str, plan: str, import_timeout_ms: int, log: AttemptLog) -> None:
        """Have the job's modules imported, once. Raises ImportFailure; asking again tries again."""
        found = self._templates.get(job)
        if found is None:
            found = self._start_template(job, code, plan, import_timeout_ms, log)
        await asyncio.shield(found.imported)

    def forget(self, job: JobId) -> None:
        """End the job's template, and with it its slots and what its user code left behind."""
        found = self._templates.pop(job, None)
        if found is not None:
            self._leaving[found.child] = found
            if found.imported.done():
                found.link.finish()  # It ends by itself, after all that it adopted.
            else:
                self._base.send(wire.KillChild(found.child))

    def has_template(self, job: JobId) -> bool:
        """The job's modules are imported."""
        found = self._templates.get(job)
        return found is not None and found.imported.done() and found.imported.exception() is None

    def jobs(self) -> list[JobId]:
        """Jobs with a template, the longest unused first."""
        return list(self._templates)

    def _start_template(self, job: JobId, code: str, plan: str, import_timeout_ms: int, log: AttemptLog) -> _Template:
        self._child_last -= 1
        child = self._child_last
        ours, output, fds = _plumbing()
        output.switch(log)
        link: Link[wire.FromTemplate] = Link(
            ours, wire.FromTemplate, lambda message: self._template_said(job, message), lambda: None
        )
        made = _Template(child, code, plan, output, link, asyncio.get_running_loop().create_future())
        made.imported.add_done_callback(_retrieve)
        self._templates[job] = made
        self._base.send(wire.ForkTemplate(child, code, plan, import_timeout_ms), fds)
        return made

    def _template_said(self, job: JobId, message: wire.FromTemplate) -> None:
        if isinstance(message, wire.ChildExited):
            self._slot_gone(message)
            return
        template = self._templates.get(job)
        if template is None or template.imported.done():
            return
        if isinstance(message, wire.ImportFailed):
            template.output.drain()
            self._leaving[template.child] = self._templates.pop(job)
            template.imported.set_exception(ImportFailure(message.cause, message.message, message.traceback))
            return
        template.forks = message.threads <= 1
        if not template.forks:
            self._events.remark(
                f"{job}: its modules start threads at import ({message.threads} run): each slot imports for itself"
            )
        template.imported.set_result(None)

    # --- slots -------------------------------------------------------------------------------------------------------

    def start_slot(self, number: int, job: JobId | None) -> None:
        """Fork a slot: from the job's template, or from the base if it must import for itself or runs commit steps."""
        ours, output, fds = _plumbing()
        template = self._templates.get(job) if job is not None else None
        request = wire.ForkSlot(number)
        owner = self._base
        if template is not None and template.forks:
            owner = template.link
        elif template is not None:
            request = wire.ForkSlot(number, template.code, template.plan)
        link: Link[wire.FromSlot] = Link(
            ours,
            wire.FromSlot,
            lambda message: self._events.said(number, message),
            # User code closed our socket: nothing can be heard of it any more.
            lambda: self.kill_slot(number),
        )
        self._slots[number] = _Slot(owner, link, output)
        owner.send(request, fds)
        if not owner.open:
            asyncio.get_running_loop().call_soon(self._lost_owner, owner, "its template process was gone")

    def run(self, number: int, run: wire.Run, log: AttemptLog) -> None:
        """Send an attempt to a slot, with `log` for what it writes."""
        slot = self._slots[number]
        slot.output.switch(log)
        slot.link.send(run)

    def tail(self, number: int) -> str:
        """The end of what the slot's attempt has written."""
        slot = self._slots[number]
        slot.output.drain()
        return slot.output.log.tail.text() if slot.output.log is not None else ""

    def slots(self) -> int:
        """Slots not yet gone."""
        return len(self._slots)

    def log(self, number: int) -> AttemptLog | None:
        slot = self._slots.get(number)
        return slot.output.log if slot is not None else None

    def kill_slot(self, number: int) -> None:
        slot = self._slots.get(number)
        if slot is not None:
            slot.owner.send(wire.KillChild(number))

    def _slot_gone(self, exit_: wire.ChildExited) -> None:
        if exit_.signal:
            name = processes.signal_name(exit_.signal)
            hint = " (out of memory, or from outside)" if exit_.signal == signal.SIGKILL else ""
            self._bury(exit_.child, EndCause.SIGNAL, f"the process was killed by {name}{hint}")
        else:
            text = f"the process exited with status {exit_.status} before the attempt was finished"
            self._bury(exit_.child, EndCause.EXITED, text)

    def _bury(self, number: int, cause: EndCause, message: str) -> None:
        slot = self._slots.get(number)
        if slot is None or slot.exited:
            return
        slot.exited = True
        slot.link.drain()
        slot.output.drain()
        self._events.slot_exited(number, cause, message)
        del self._slots[number]
        slot.link.close()
        slot.output.close()

    def _lost_owner(self, owner: Link[wire.FromTemplate], message: str) -> None:
        for number, slot in list(self._slots.items()):
            if slot.owner is owner:
                self._bury(number, EndCause.SIGNAL, message)

    # --- the base ----------------------------------------------------------------------------------------------------

    def _base_said(self, message: wire.FromTemplate) -> None:
        assert isinstance(message, wire.ChildExited), message
        if message.child > 0:
            self._slot_gone(message)
            return
        for job, template in list(self._templates.items()):
            if template.child == message.child:
                template.link.drain()  # Its last words: a failed import, or how slots ended.
                self._leaving[template.child] = template
                if self._templates.get(job) is template:
                    del self._templates[job]
        if message.child in self._leaving:
            self._template_gone(self._leaving.pop(message.child), message)

    def _template_gone(self, template: _Template, exit_: wire.ChildExited) -> None:
        template.link.drain()
        template.output.drain()
        tail = template.output.log.tail.text() if template.output.log is not None else ""
        template.link.close()
        template.output.close()
        if not template.imported.done():
            template.imported.set_exception(_died_importing(exit_, tail))
        self._lost_owner(template.link, "its template process was killed")

    def _base_closed(self) -> None:
        if not self._closing:
            self._events.base_lost()

    async def close(self, timeout_s: float) -> None:
        """End every child. The base kills what it forked or adopted; its end is awaited for `timeout_s`."""
        self._closing = True
        for number in list(self._slots):
            self.kill_slot(number)
        for job in list(self._templates):
            self.forget(job)
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._base.open and self._slots and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.005)
        for slot in self._slots.values():
            slot.link.close()
            slot.output.close()
        self._base.close()


def _died_importing(exit_: wire.ChildExited, tail: str) -> ImportFailure:
    if exit_.signal == signal.SIGALRM:
        text = "importing the job's modules took longer than worker.import_timeout_ms"
        return ImportFailure(EndCause.TIMEOUT, text, tail)
    if exit_.signal:
        name = processes.signal_name(exit_.signal)
        return ImportFailure(EndCause.SIGNAL, f"importing the job's modules ended by {name}", tail)
    text = f"importing the job's modules ended the process with status {exit_.status}"
    return ImportFailure(EndCause.EXITED, text, tail)


def _plumbing() -> tuple[socket.socket, _Output, list[int]]:
    """Our socket and pipes of a new child, and the descriptors that are the child's: socket, stdout, stderr."""
    ours, theirs = socket.socketpair()
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    return ours, _Output(LogPipe(out_read), LogPipe(err_read)), [theirs.detach(), out_write, err_write]


def _retrieve(future: "asyncio.Future[None]") -> None:
    """An import that nobody waits for any more may fail unseen."""
    if not future.cancelled():
        future.exception()
