"""`Masters` over three fake masters: finding the leader, following it, and what is said when there is none."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from aiohttp import web
from rpc_fakes import CLUSTER, MEMBER, SETTINGS, TOKEN, Answer, Ask, Leads, Recorder, decode, outcome, run, until

from jobrunner.errors import Denied, NotLeader, Refused, SpecError, Unavailable, Unknown
from jobrunner.rpc.client import Masters
from jobrunner.rpc.connection import Connection
from jobrunner.rpc.server import RpcServer, bind


class FakeMaster(Recorder):
    """Answers if the group says it leads, otherwise names the leader it believes in."""

    def __init__(self, group: "Group", number: int) -> None:
        super().__init__()
        self.group = group
        self.number = number
        self.address = ""
        self.believes: int | None = None  # Whom it names; None: the group's leader.
        self.mute = False
        self.server: RpcServer | None = None

    async def on_request(self, peer: Connection, message: msgspec.Struct) -> msgspec.Struct:
        assert isinstance(message, Ask)
        self.asked.append(message.text)
        if self.mute:
            await asyncio.sleep(3600)
        if self.number != self.group.leader:
            named = self.group.leader if self.believes is None else self.believes
            raise NotLeader("not me", leader=self.group.masters[named].address if named >= 0 else "")
        if message.text == "not yet" and self.asked.count("not yet") < 3:
            raise Unavailable("maps are missing")
        if message.text == "in doubt" and self.asked.count("in doubt") < 2:
            raise Unknown("leadership lost while it was proposed")
        if message.text == "refuse":
            raise Refused("a rule says no")
        if message.text == "wait":
            await self.gate.wait()
        return Answer(f"{message.text} by {self.number}")

    async def start(self) -> None:
        port = int(self.address.rpartition(":")[2]) if self.address else 0
        self.server = RpcServer(
            cluster_id=CLUSTER, cluster_token=TOKEN, settings=SETTINGS, handler=self, identity=MEMBER
        )

        async def blob(request: web.Request) -> web.Response:
            if request.match_info["hash"] != f"h{self.number}":
                raise web.HTTPNotFound
            return web.Response(body=f"of {self.number}".encode())

        self.server.add_get("/blobs/{hash}", blob)
        self.address = await self.server.start(bind("127.0.0.1", port))

    async def stop(self) -> None:
        """End without a word, as by kill -9."""
        assert self.server is not None
        for connection in list(self.server.connections):
            connection.abort()
        await self.server.stop()
        self.server = None

    def announce(self, epoch: int, address: str) -> None:
        for connection in self.opened:
            connection.push(Leads(epoch, address))


class Group:
    def __init__(self) -> None:
        self.leader = -1
        self.masters = [FakeMaster(self, number) for number in range(3)]
        self.beating: asyncio.Task[None] | None = None

    @property
    def addresses(self) -> list[str]:
        return [master.address for master in self.masters]

    def lead(self, number: int, epoch: int) -> None:
        """Make a master the leader, announced by all that run."""
        self.leader = number
        for master in self.masters:
            if master.server is not None:
                master.announce(epoch, self.masters[number].address)

    def beat(self, epoch: int) -> None:
        """Beacons of the leader, unless it is mute, from now on."""

        async def beats() -> None:
            while True:
                leader = self.masters[self.leader]
                if not leader.mute:
                    leader.announce(epoch, leader.address)
                await asyncio.sleep(SETTINGS.session.beacon_ms / 1000)

        self.beating = asyncio.get_running_loop().create_task(beats())


@contextlib.asynccontextmanager
async def group() -> AsyncIterator[Group]:
    made = Group()
    for master in made.masters:
        await master.start()
    try:
        yield made
    finally:
        if made.beating:
            made.beating.cancel()
        for master in made.masters:
            if master.server is not None:
                await master.stop()


@contextlib.asynccontextmanager
async def client(addresses: list[str], **options: Any) -> AsyncIterator[Masters]:
    def on_push(connection: Connection, message: msgspec.Struct) -> None:
        assert isinstance(message, Leads)
        masters.leader_is(message.epoch, message.address)

    given: dict[str, Any] = {
        "cluster_id": CLUSTER, "cluster_token": TOKEN, "role": "client", "decode": decode, "on_push": on_push,
        "settings": SETTINGS, "chance": random.Random(7),
    }  # fmt: skip
    masters = Masters(addresses, **(given | options))
    try:
        yield masters
    finally:
        await masters.close()


async def text(masters: Masters, word: str, **options: Any) -> str:
    reply = await masters.call(Ask(word), **options)
    assert isinstance(reply, Answer)
    return reply.text


def test_a_call_finds_the_leader_by_hints_alone() -> None:
    """A client that has just started knows addresses only."""

    async def main() -> None:
        async with group() as masters, client(masters.addresses) as asking:
            masters.leader = 2
            for number in range(3):
                assert await text(asking, f"w{number}") == f"w{number} by 2"
            assert asking.leader_address == masters.addresses[2]
            await until(lambda: len(asking.connected) == 3)

    run(main)


def test_an_announced_leader_is_asked_directly_and_an_older_epoch_changes_nothing() -> None:
    """An isolated old leader goes on announcing itself; it must not win calls back."""

    async def main() -> None:
        async with group() as masters, client(masters.addresses) as asking:
            await until(lambda: len(asking.connected) == 3)
            masters.lead(1, epoch=5)
            await until(lambda: asking.leader_epoch == 5)
            masters.masters[0].announce(4, masters.addresses[0])
            assert await text(asking, "x") == "x by 1"
            assert asking.leader_address == masters.addresses[1] and not masters.masters[0].asked
            masters.masters[1].announce(6, "")
            await until(lambda: asking.leader_address == "" and asking.leader_epoch == 6)

    run(main)


def test_pending_calls_move_when_a_newer_leader_is_announced() -> None:
    """A stopped leader answers nothing; waiting for the time-out of each call would cost ten seconds a call."""

    async def main() -> None:
        async with group() as masters, client(masters.addresses) as asking:
            await until(lambda: len(asking.connected) == 3)
            masters.lead(0, epoch=1)
            masters.masters[0].mute = True
            calls = [asyncio.ensure_future(text(asking, f"p{number}")) for number in range(20)]
            await until(lambda: len(masters.masters[0].asked) == 20)
            masters.lead(1, epoch=2)
            assert await asyncio.gather(*calls) == [f"p{number} by 1" for number in range(20)]

    run(main)


def test_a_call_survives_the_death_of_the_leader_and_its_restart() -> None:
    """Leaders die in the middle of calls: the same message goes to the next, then to the one that came back."""

    async def main() -> None:
        async with group() as masters, client(masters.addresses) as asking:
            await until(lambda: len(asking.connected) == 3)
            masters.lead(0, epoch=1)
            waiting = asyncio.ensure_future(text(asking, "wait"))
            await until(lambda: masters.masters[0].asked == ["wait"])
            masters.masters[1].gate.set()
            await masters.masters[0].stop()
            masters.leader = 1
            assert await waiting == "wait by 1"
            await masters.masters[0].start()
            await until(lambda: len(asking.connected) == 3)
            masters.lead(0, epoch=3)
            assert await text(asking, "again") == "again by 0"

    run(main)


def test_a_silent_leader_is_given_up_after_three_beacons() -> None:
    """A leader stopped by SIGSTOP closes nothing; the others must be asked before the call's own time-out."""

    async def main() -> None:
        async with group() as masters, client(masters.addresses) as asking:
            await until(lambda: len(asking.connected) == 3)
            masters.lead(0, epoch=1)
            masters.beat(epoch=1)
            assert await text(asking, "x") == "x by 0"
            masters.masters[0].mute = True
            call = asyncio.ensure_future(text(asking, "y"))
            await until(lambda: "y" in masters.masters[1].asked or "y" in masters.masters[2].asked)
            masters.leader = 2
            assert await call == "y by 2"

    run(main)


def test_a_leader_that_sends_beacons_may_take_its_time() -> None:
    """A client that waits for its job must not wander about while the leader lives."""

    async def main() -> None:
        async with group() as masters, client(masters.addresses) as asking:
            await until(lambda: len(asking.connected) == 3)
            masters.lead(0, epoch=1)
            masters.beat(epoch=1)
            waiting = asyncio.ensure_future(text(asking, "wait"))
            await until(lambda: asking._tick > 15)
            assert masters.masters[0].asked == ["wait"] and not masters.masters[1].asked
            masters.masters[0].gate.set()
            assert await waiting == "wait by 0"

    run(main)


def test_followers_that_name_each_other_do_not_catch_a_call() -> None:
    """During an election everybody is wrong for a while; the call must come through, without a storm."""

    async def main() -> None:
        async with group() as masters, client(masters.addresses) as asking:
            await until(lambda: len(asking.connected) == 3)
            for number, master in enumerate(masters.masters):
                master.believes = (number + 1) % 3
            call = asyncio.ensure_future(text(asking, "z"))
            await until(lambda: sum(len(master.asked) for master in masters.masters) >= 12)
            masters.leader = 1
            assert await call == "z by 1"
            assert sum(len(master.asked) for master in masters.masters) < 60

    run(main)


def test_unavailable_is_asked_again_and_in_doubt_is_sent_again() -> None:
    """Time mends both: the reply of a leader that lost its epoch, and of one that has not got it yet."""

    async def main() -> None:
        async with group() as masters, client(masters.addresses) as asking:
            masters.leader = 0
            assert await text(asking, "not yet") == "not yet by 0"
            assert await text(asking, "in doubt") == "in doubt by 0"
            assert type(await outcome(text(asking, "in doubt", idempotent=True, deadline_s=0))) is Unavailable

    run(main)


def test_what_must_not_be_sent_twice_ends_as_unknown() -> None:
    """Without an id of its own in it, a second sending could be a second doing."""

    async def main() -> None:
        async with group() as masters, client(masters.addresses) as asking:
            masters.leader = 0
            assert type(await outcome(text(asking, "in doubt", idempotent=False))) is Unknown
            assert masters.masters[0].asked.count("in doubt") == 1
            assert await text(asking, "not yet", idempotent=False) == "not yet by 0"

    run(main)


def test_refusals_and_oversized_messages_are_the_callers_at_once() -> None:
    """A rule says no again however often it is asked."""

    async def main() -> None:
        async with group() as masters, client(masters.addresses) as asking:
            masters.leader = 0
            assert type(await outcome(text(asking, "refuse"))) is Refused
            assert type(await outcome(asking.call(Ask("x", bytes(100_000))))) is SpecError
            assert masters.masters[0].asked.count("refuse") == 1

    run(main)


def test_nobody_there_is_unavailable_and_names_the_addresses() -> None:
    """Exit status 3 with what was tried; and sent to a leader that never answered is Unknown, not Unavailable."""

    async def main() -> None:
        async with group() as masters:
            addresses = masters.addresses
            for master in masters.masters:
                await master.stop()
            async with client(addresses) as asking:
                error = await outcome(text(asking, "x", deadline_s=0.1))
                assert type(error) is Unavailable
                assert f"no master of {', '.join(addresses)} could be reached for 0.1 s" in str(error)
                await masters.masters[0].start()
                masters.lead(0, epoch=1)
                masters.masters[0].mute = True
                await until(lambda: asking.connected)
                error = await outcome(text(asking, "x", deadline_s=0.2, timeout_s=0.05))
                assert type(error) is Unknown and "may or may not" in str(error)

    run(main)


def test_no_leader_at_all_is_unavailable_and_definite() -> None:
    """Every answer was a refusal, so nothing was carried out: the caller may do anything."""

    async def main() -> None:
        async with group() as masters, client(masters.addresses) as asking:
            error = await outcome(text(asking, "x", deadline_s=0.15))
            assert type(error) is Unavailable and "answered as leader" in str(error)

    run(main)


def test_masters_that_all_turn_us_away_are_an_error_at_once() -> None:
    """A wrong token does not mend in sixty seconds."""

    async def main() -> None:
        async with group() as masters, client(masters.addresses, cluster_token="wrong") as asking:
            assert type(await outcome(text(asking, "x"))) is Denied
            with pytest.raises(Denied):
                await asking.wait_connected(5)

    run(main)


def test_a_master_that_is_only_named_by_others_is_dialled() -> None:
    """A member added later is in no client's list of addresses."""

    async def main() -> None:
        async with group() as masters, client(masters.addresses[:1]) as asking:
            masters.leader = 2
            assert await text(asking, "x") == "x by 2"
            assert asking.connected == [masters.addresses[0], masters.addresses[2]]

    run(main)


def test_connections_are_announced_before_anything_is_received_on_them() -> None:
    """An agent registers in on_connected; an instruction that comes earlier would meet no session."""

    async def main() -> None:
        events = list[str]()

        class Greeting(FakeMaster):
            def on_open(self, peer: Connection) -> None:
                super().on_open(peer)
                peer.push(Leads(1, self.address))

        def push(connection: Connection, message: msgspec.Struct) -> None:
            events.append("pushed")

        greeting = Greeting(Group(), 0)
        await greeting.start()
        options: dict[str, Any] = {
            "on_push": push,
            "on_connected": lambda connection: events.append("up"),
            "on_disconnected": lambda connection: events.append("down"),
        }
        async with client([greeting.address], **options):
            await until(lambda: events == ["up", "pushed"])
            await greeting.stop()
            await until(lambda: events == ["up", "pushed", "down"])

    run(main)


def test_blobs_come_from_any_master_that_has_them() -> None:
    """A follower may not have applied the last blob yet."""

    async def main() -> None:
        async with group() as masters, client(masters.addresses) as asking:
            await until(lambda: len(asking.connected) == 3)
            for number in range(3):
                assert await asking.fetch(f"/blobs/h{number}", bytes_max=100) == f"of {number}".encode()
            assert type(await outcome(asking.fetch("/blobs/none", bytes_max=100))) is Refused

    run(main)


def test_close_ends_waiting_calls() -> None:
    """A tool that is interrupted must not hang for its reach time-out."""

    async def main() -> None:
        async with group() as masters, client(masters.addresses) as asking:
            masters.lead(0, epoch=1)
            call = asyncio.ensure_future(outcome(text(asking, "wait")))
            await until(lambda: masters.masters[0].asked)
            await asking.close()
            assert isinstance(await call, Unavailable)
            assert isinstance(await outcome(text(asking, "x")), Unavailable)

    run(main)
