"""What workers, clients and masters have in common in the simulation: being stopped, being ended, asking masters.

An `Actor` is a process with a mailbox. A `Caller` is to it what `rpc.client.Masters` is to a real one: it asks the
master that it takes for the leader, else the others in turn, and asks again under the same ids until one answers. The
network under it is worse than TCP: a request may also arrive twice, or long after its answer is no longer waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from jobrunner.control.messages import message_decoder
from jobrunner.errors import JobrunnerError, NotLeader, Unavailable
from tests.simulation.raft_world import MS

if TYPE_CHECKING:
    from tests.simulation.control_world import ControlWorld

Deliver = Callable[[], None]
Reply = Callable[[msgspec.Struct | JobrunnerError], None]

encode = msgspec.msgpack.Encoder().encode
decode = message_decoder().decode


class Actor:
    """A process that is no master. `life` tells one process of it from the next."""

    def __init__(self, world: ControlWorld, name: str) -> None:
        self.world = world
        self.name = name
        self.life = 0
        self.running = False
        self.paused_since: int | None = None
        self.mail: list[Deliver] = []  # What arrived while it was stopped.

    def begin(self) -> None:
        """Start a new process."""
        self.life += 1
        self.running, self.paused_since = True, None
        self.mail.clear()

    def end(self) -> None:
        self.running = False
        self.life += 1

    def pause(self) -> None:
        self.paused_since = self.world.now_us

    def wake(self) -> None:
        self.paused_since = None
        mail, self.mail = self.mail, []
        for deliver in mail:
            deliver()

    def later(self, delay_us: int, event: Deliver) -> None:
        """Run `event` if the same process then still runs; when it is stopped, after it wakes."""
        life = self.life

        def run() -> None:
            if not self.running or self.life != life:
                return
            if self.paused_since is not None:
                self.world.at(10 * MS, run)
                return
            event()

        self.world.at(delay_us, run)

    def pushed(self, message: msgspec.Struct) -> None:
        """A master says something unasked."""


@dataclass(eq=False)
class _Call:
    message: bytes
    then: Callable[[msgspec.Struct], None]
    refused: Callable[[JobrunnerError], None]
    timeout_us: int
    ends_us: int  # No new try after this.
    tries: int = 0
    over: bool = False


class Caller:
    """Asks masters for one process of an actor; dies with it."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        self._world = actor.world
        self._turn = 0
        self.leader = ""
        self.epoch = 0

    def leader_is(self, epoch: int, address: str) -> None:
        if epoch >= self.epoch:
            self.epoch, self.leader = epoch, address

    def ask(
        self,
        message: msgspec.Struct,
        then: Callable[[msgspec.Struct], None],
        refused: Callable[[JobrunnerError], None],
        *,
        timeout_us: int = 300 * MS,
        for_us: int = 1 << 60,
    ) -> None:
        """`then` gets the answer; `refused` an error that asking again does not mend, or Unavailable after `for_us`."""
        self._try(_Call(encode(message), then, refused, timeout_us, self._world.now_us + for_us))

    def _try(self, call: _Call) -> None:
        if call.over:
            return
        if self._world.now_us > call.ends_us:
            call.over = True
            call.refused(Unavailable("nobody answered in time"))
            return
        call.tries += 1
        number, world, actor = call.tries, self._world, self._actor
        life = actor.life
        master = world.nodes.get(self.leader) or world.masters[self._turn % len(world.masters)]

        def reply(answer: msgspec.Struct | JobrunnerError) -> None:
            sent = answer if isinstance(answer, JobrunnerError) else decode(encode(answer))

            def deliver() -> None:
                if actor.life == life and not call.over and call.tries == number:
                    self._answered(call, sent)

            world.carry(master.name, actor, deliver)

        world.carry(actor.name, master, lambda: master.hear(actor, decode(call.message), reply))
        actor.later(call.timeout_us, lambda: self._late(call, number, master.name))

    def _late(self, call: _Call, number: int, master: str) -> None:
        if call.tries == number and not call.over:
            self._elsewhere(master)
            self._try(call)

    def _elsewhere(self, master: str) -> None:
        self._turn += 1
        if self.leader == master:
            self.leader = ""

    def _answered(self, call: _Call, answer: msgspec.Struct | JobrunnerError) -> None:
        if isinstance(answer, NotLeader):
            self._turn += 1
            self.leader = str(getattr(answer, "leader", ""))
        if isinstance(answer, NotLeader | Unavailable):
            call.tries += 1  # A late copy of this answer is no second one.
            number = call.tries
            pause_us = self._world.rng.randint(5 * MS, 30 * MS)
            self._actor.later(pause_us, lambda: self._try(call) if call.tries == number else None)
            return
        call.over = True
        if isinstance(answer, JobrunnerError):
            call.refused(answer)
        else:
            call.then(answer)
