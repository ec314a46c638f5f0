"""Links between masters: who is linked, what is dropped, and who hears of it."""

import asyncio
from typing import Any

import msgspec
import pytest
from rpc_fakes import CLUSTER, SETTINGS, TOKEN, Ask, Recorder, run, serving, until

from jobrunner.errors import SpecError
from jobrunner.ids import MemberId
from jobrunner.rpc.connection import Connection
from jobrunner.rpc.peers import PeerLinks

A, B, C = (MemberId(letter * 32) for letter in "abc")


class Heard:
    """The callbacks' side."""

    def __init__(self) -> None:
        self.unreachable = list[MemberId]()
        self.lost = list[MemberId]()

    def links(self, **options: Any) -> PeerLinks:
        given: dict[str, Any] = {
            "member": A, "name": "master-0", "cluster_id": CLUSTER, "cluster_token": TOKEN, "settings": SETTINGS,
            "on_unreachable": self.unreachable.append, "on_lost": self.lost.append,
        }  # fmt: skip
        return PeerLinks(**(given | options))


def word(text: str, size: int = 0) -> bytes:
    return msgspec.msgpack.encode(Ask(text, bytes(size)))


def linked(links: PeerLinks, member: MemberId) -> bool:
    """Both connections are up here; there they are a moment earlier."""
    link = links._links[member]
    return link.control.connection is not None and link.bulk.connection is not None


def roles(handler: Recorder) -> list[str]:
    return sorted(peer.role for peer in handler.opened)


def test_messages_go_over_the_link_they_were_meant_for_in_order() -> None:
    """A snapshot on the control link would delay heartbeats, and so cause elections."""

    async def main() -> None:
        handler, heard = Recorder(), Heard()
        async with serving(handler, identity=B) as server:
            links = heard.links()
            links.set_members({A: "127.0.0.1:1", B: server.address})
            await until(lambda: linked(links, B) and roles(handler) == ["bulk", "master"])
            for number in range(100):
                links.send(B, word(str(number)), bulk=number % 2 == 1)
            await until(lambda: len(handler.pushed) == 100)
            for role, rest in (("master", 0), ("bulk", 1)):
                got = [message.text for peer, message in handler.pushed if peer.role == role]  # type: ignore[attr-defined]
                assert got == [str(number) for number in range(100) if number % 2 == rest]
            assert {(peer.identity, peer.name) for peer in handler.opened} == {(A, "master-0")}
            assert not links.connected(A) and not heard.unreachable
            await links.close()

    run(main)


def test_what_cannot_be_sent_is_dropped_and_reported_on_a_later_turn() -> None:
    """Raft must hear of it, but not from inside its own call."""

    async def main() -> None:
        heard = Heard()
        links = heard.links()
        links.set_members({B: "127.0.0.1:1"})
        for _ in range(10):
            links.send(B, word("x"), bulk=False)
            links.send(C, word("x"), bulk=True)
        assert heard.unreachable == []
        await until(lambda: heard.unreachable == [B, C])
        await links.close()

    run(main)


def test_a_peer_with_another_uuid_is_not_linked() -> None:
    """A directory made anew at an old address has forgotten its votes: it must not be taken for the old member."""

    async def main() -> None:
        handler, heard = Recorder(), Heard()
        async with serving(handler, identity=C) as server:
            links = heard.links()
            links.set_members({B: server.address})
            await until(lambda: links._links[B].control.failure is not None)
            assert C in str(links._links[B].control.failure)
            links.send(B, word("x"), bulk=False)
            await until(lambda: heard.unreachable == [B])
            assert not handler.opened and not links.connected(B)
            await links.close()

    run(main)


def test_a_lost_peer_is_reported_once_and_dialled_until_it_is_back() -> None:
    """on_lost starts the election that makes a killed leader cost milliseconds."""

    async def main() -> None:
        handler, heard = Recorder(), Heard()
        async with serving(handler, identity=B) as server:
            address = server.address
            links = heard.links()
            links.set_members({B: address})
            await until(lambda: linked(links, B) and len(handler.opened) == 2)
            await server.stop()
        await until(lambda: heard.lost == [B])
        assert not links.connected(B)
        again = Recorder()
        async with serving(again, identity=B, port=int(address.rpartition(":")[2])):
            await until(lambda: roles(again) == ["bulk", "master"] and linked(links, B))
            links.send(B, word("welcome back"), bulk=False)
            await until(lambda: len(again.pushed) == 1)
            await links.close()
        assert heard.lost == [B]

    run(main)


def test_members_come_go_and_move() -> None:
    """A removed member must be left alone, and one that moved be found at its new address."""

    async def main() -> None:
        old, new, third, heard = Recorder(), Recorder(), Recorder(), Heard()
        async with (
            serving(old, identity=B) as at_old,
            serving(new, identity=B) as at_new,
            serving(third, identity=C) as at_third,
        ):
            links = heard.links()
            links.set_members({B: at_old.address, C: at_third.address})
            await until(lambda: len(old.opened) == 2 and len(third.opened) == 2)
            links.set_members({B: at_new.address})
            await until(lambda: len(new.opened) == 2 and len(old.closed) == 2 and len(third.closed) == 2)
            links.set_members({B: at_new.address})
            await until(lambda: linked(links, B))
            links.send(B, word("x"), bulk=True)
            await until(lambda: len(new.pushed) == 1)
            assert len(new.opened) == 2 and heard.lost == []
            await links.close()

    run(main)


def test_a_peer_that_reads_nothing_costs_its_bound_and_not_the_other_link() -> None:
    """A stopped follower's bulk queue fills; its control link and the leader's loop must not notice."""

    async def main() -> None:
        heard = Heard()

        class Stuck(Recorder):
            def on_push(self, peer: Connection, message: msgspec.Struct) -> None:
                super().on_push(peer, message)
                if peer.role == "bulk":
                    peer._transport.pause_reading()  # type: ignore[union-attr]

        handler = Stuck()
        async with serving(handler, identity=B) as server:
            links = heard.links()
            links.set_members({B: server.address})
            await until(lambda: linked(links, B) and len(handler.opened) == 2)
            sent = 0
            while not heard.unreachable:
                links.send(B, word("x", 60_000), bulk=True)
                sent += 1
                assert sent < 2_000, "memory is not bounded"
                if sent % 10 == 0:
                    await asyncio.sleep(0)
            links.send(B, word("still fine"), bulk=False)
            await until(lambda: any(message == Ask("still fine") for _, message in handler.pushed))
            with pytest.raises(SpecError):
                links.send(B, word("x", 70_000), bulk=True)
            await links.close()

    run(main)


def test_a_peer_may_say_nothing_on_a_link_that_we_dialled() -> None:
    """Each direction has its own connections; what comes the wrong way has no handler."""

    async def main() -> None:
        handler, heard = Recorder(), Heard()
        async with serving(handler, identity=B) as server:
            links = heard.links()
            links.set_members({B: server.address})
            await until(lambda: linked(links, B) and len(handler.opened) == 2)
            next(peer for peer in handler.opened if peer.role == "master").push(Ask("psst"))
            await until(lambda: heard.lost == [B])
            await links.close()

    run(main)
