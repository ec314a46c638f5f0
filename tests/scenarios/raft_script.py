"""Plays text scripts on a `RaftGroup`: a command, a line of dashes, what it printed.

    members N [BYTES]             a new group of N, nothing in flight; entries of at most BYTES in one append
    log M TERM...                 M restarts with the first entry and one entry of each TERM
    term M TERM                   M restarts having heard of TERM, and voted for nobody in it
    restart M                     from what it had saved
    campaign M / tick M MS / propose M TEXT / lost M PEER / found M PEER / read M / transfer M TARGET
    compact M                     its snapshot of all that it applied replaces its log
    save M                        the save under way at M becomes durable
    deliver A->B [KIND]           what is under way from A to B (* is anybody), or only messages of a class
    drop A->B [KIND]              the same, lost
    repeat A->B [KIND]            the same, delivered and still under way
    stabilize [M...]              deliver and save until nothing is left, among M... or all
    status                        role, log and commit of each

Source of the idea: etcd-io/raft, testdata/ and rafttest/.
"""

from dataclasses import replace

from jobrunner.errors import JobrunnerError
from jobrunner.ids import MemberId
from jobrunner.raft.ready import HardState
from tests.scenarios.raft_group import SETTINGS, InFlight, RaftGroup, describe_role


class RaftScript:
    def __init__(self) -> None:
        self.group = RaftGroup(1)

    def run(self, line: str) -> str:
        """What the command `line` prints."""
        name, *words = line.split()
        self.group.story.clear()
        try:
            lines = getattr(self, "do_" + name.replace("-", "_"))(*words)
        except JobrunnerError as error:
            lines = [f"{type(error).__name__}: {error}"]
        return "\n".join((lines or []) + self.group.story) or "ok"

    def do_members(self, count: str, append_bytes_max: str = "65536") -> None:
        self.group = RaftGroup(int(count), replace(SETTINGS, append_bytes_max=int(append_bytes_max)))

    def do_log(self, member: str, *terms: str) -> None:
        self.group.give_log(MemberId(member), [int(term) for term in terms])

    def do_term(self, member: str, term: str) -> None:
        self.group.disks[MemberId(member)].state = HardState(int(term), None, 1)
        self.group.restart(MemberId(member))

    def do_restart(self, member: str) -> None:
        self.group.restart(MemberId(member))

    def do_campaign(self, member: str) -> None:
        self.group.engines[MemberId(member)].campaign()
        self.group.pump(MemberId(member))

    def do_tick(self, member: str, elapsed_ms: str) -> None:
        self.group.tick(MemberId(member), int(elapsed_ms))

    def do_propose(self, member: str, text: str) -> None:
        self.group.propose(MemberId(member), text.encode())

    def do_lost(self, member: str, peer: str) -> None:
        self.group.engines[MemberId(member)].peer_lost(MemberId(peer))
        self.group.pump(MemberId(member))

    def do_found(self, member: str, peer: str) -> None:
        self.group.engines[MemberId(member)].peer_found(MemberId(peer))
        self.group.pump(MemberId(member))

    def do_read(self, member: str) -> list[str]:
        number = self.group.engines[MemberId(member)].read()
        self.group.pump(MemberId(member))
        return [f"read {number}"]

    def do_transfer(self, member: str, target: str) -> None:
        self.group.engines[MemberId(member)].transfer(MemberId(target))
        self.group.pump(MemberId(member))

    def do_compact(self, member: str) -> None:
        self.group.compact(MemberId(member))

    def do_save(self, member: str) -> None:
        self.group.save(MemberId(member))

    def do_deliver(self, link: str, kind: str = "") -> list[str]:
        batch = self._under_way(link, kind)
        for sent in batch:
            self.group.deliver(sent)
        return [] if batch else ["nothing is under way"]

    def do_repeat(self, link: str, kind: str = "") -> None:
        for sent in self._under_way(link, kind):
            self.group.deliver(sent)
            self.group.network.append(sent)

    def do_drop(self, link: str, kind: str = "") -> list[str]:
        batch = self._under_way(link, kind)
        for sent in batch:
            self.group.network.remove(sent)
        return [f"lost: {sent}" for sent in batch] or ["nothing is under way"]

    def do_stabilize(self, *members: str) -> None:
        self.group.stabilize({MemberId(member) for member in members} or None)

    def do_status(self) -> list[str]:
        lines = []
        for member, engine in self.group.engines.items():
            terms = " ".join(str(engine.log.term_at(index)) for index in range(1, engine.log.last_index + 1))
            commit = engine.commit_index
            lines.append(f"{member} {describe_role(engine)}, voted for {engine.vote}, commit {commit}, log [{terms}]")
        return lines

    def _under_way(self, link: str, kind: str) -> list[InFlight]:
        sender, to = link.split("->")
        return [
            sent
            for sent in self.group.network
            if sender in ("*", sent.sender) and to in ("*", sent.to) and kind in ("", type(sent.message).__name__)
        ]


def play(text: str) -> str:
    """The script `text` with everything that is printed replaced by what is printed now; comments stay."""
    script = RaftScript()
    out: list[str] = []
    for block in text.strip().split("\n\n"):
        lines = block.split("\n")
        out += [line for line in lines if line.startswith("#")]
        commands = [line for line in lines[: _dashes(lines)] if not line.startswith("#")]
        if commands:
            printed = "\n".join(script.run(command) for command in commands)
            out += [*commands, "----", printed]
        out.append("")
    return "\n".join(out)


def _dashes(lines: list[str]) -> int:
    return lines.index("----") if "----" in lines else len(lines)
