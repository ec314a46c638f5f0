"""The Raft algorithm as a pure machine: `step`, `tick`, `propose`, `read`, `transfer` in; `ready` out. No I/O.

The shell, in a loop:
1. feed it messages, time and proposals; then take `ready()`, as often as it likes;
2. send `send_now` at once;
3. write `save` as one record and sync it; then send `after_persist`, call `saved()`, and take `ready()` again;
4. apply entries up to `commit_index`, in order, and report `applied(index)`.

`after_persist` holds whatever promises something: votes, acknowledgements, and requests for a vote (which promise the
log they name). The leader's acknowledgement of itself and a candidate's own vote count from `saved()` on, by
construction: they are read from what is durable. One save is under way at a time; what comes meanwhile waits for the
next, so a save is a group commit. Appends are sent in parallel with the leader's own write (thesis, 10.2.1).

Time is milliseconds of listening. A shell that was stopped does not count the gap (`slept`).
One file over the usual length: every rule here reads or changes the same term, vote and role, and holds only with the
others.
Sources: Ongaro, Consensus: Bridging Theory and Practice, 2014; etcd-io/raft.
"""

from collections.abc import Mapping
from typing import Protocol

from jobrunner.errors import CorruptData, NotLeader, Refused, Unavailable
from jobrunner.ids import MemberId
from jobrunner.raft.log import Log
from jobrunner.raft.messages import (
    Append,
    AppendReply,
    Entry,
    EntryKind,
    Heartbeat,
    HeartbeatReply,
    Member,
    Message,
    PreVoteReply,
    PreVoteRequest,
    SnapshotPiece,
    SnapshotReply,
    TimeoutNow,
    VoteReply,
    VoteRequest,
    decode_members,
)
from jobrunner.raft.progress import Progress, ProgressState, Tally, majority, quorum_index, tally
from jobrunner.raft.reads import ReadReady
from jobrunner.raft.ready import HardState, ProposalId, Ready, Save, Send
from jobrunner.raft.roles import Candidate, Follower, Leader, PreCandidate, Role, Transfer
from jobrunner.raft.settings import RaftSettings
from jobrunner.raft.snapshot import Incoming, Snapshot, Source, piece_of


class Chance(Protocol):
    """What is used of random.Random."""

    def randint(self, a: int, b: int, /) -> int: ...


class Engine:
    """One member. All its state but the log is here and in its role."""

    def __init__(
        self,
        *,
        member: MemberId,
        log: Log,
        state: HardState,
        settings: RaftSettings,
        rng: Chance,
        members: tuple[Member, ...] | None = None,
        snapshot: Source | None = None,
    ) -> None:
        """`members` and `snapshot`: of the newest snapshot, if there is one; the machine has been restored from it."""
        assert log.first_index - 1 <= state.commit <= log.last_index, (state, log.last_index)
        assert log.last_index >= 1, "a log begins with its members"
        self.member = member
        self.log = log
        if members is None:
            members = decode_members(log.slice(1, 1, 1)[0])
        self.members: Mapping[MemberId, Member] = {one.id: one for one in members}
        self.snapshot = snapshot
        self.term = state.term
        self.vote = state.vote
        self.commit_index = state.commit
        self.applied_index = snapshot.index if snapshot is not None else 0
        self.now_ms = 0
        self._settings = settings
        self._rng = rng
        self._durable = state
        self._saving: Save | None = None
        self._saving_since_ms = 0
        self._send_now: list[Send] = []
        self._after_persist: list[Send] = []
        self._incoming: Incoming | None = None
        self._install: Snapshot | None = None  # Complete; to be saved next, or being saved.
        self._reads_ready: list[ReadReady] = []
        self._reads_asked = 0
        self._hurry_until_ms = 0
        alone = len(self.members) == 1 and member in self.members
        self.role: Role = Follower(0 if alone else self._election_deadline())

    # --- what the shell reads ---

    @property
    def leader(self) -> MemberId | None:
        """The leader of this term, as far as this member knows."""
        match self.role:
            case Leader():
                return self.member
            case Follower(leader=leader):
                return leader
        return None

    def leader_address(self) -> str:
        """For people and redirects; "" if not known."""
        leader = self.leader
        return self.members[leader].address if leader is not None else ""

    def wait_ms(self) -> int:
        """How long until `tick` has something to do."""
        role = self.role
        if isinstance(role, Leader):
            due = min(role.beat_ms, role.check_ms)
            if role.transfer is not None:
                due = min(due, role.transfer.deadline_ms)
        else:
            due = role.deadline_ms
        return max(due - self.now_ms, 0)

    # --- inputs ---

    def advance(self, elapsed_ms: int) -> None:
        """`elapsed_ms` went by while this member was listening. Nothing falls due before `tick`."""
        assert elapsed_ms >= 0, elapsed_ms
        self.now_ms += elapsed_ms

    def tick(self, elapsed_ms: int = 0) -> None:
        """The same, and everything that had arrived has been stepped: do what is due."""
        self.advance(elapsed_ms)
        role = self.role
        if isinstance(role, Leader):
            if self._save_hangs():
                self.step_down()
            else:
                self._tick_leader(role)
        elif self.now_ms >= role.deadline_ms:
            self._start_pre_vote()

    def slept(self, gap_ms: int) -> None:
        """This process did not listen for `gap_ms`, which counts toward no deadline.

        A follower gives a living leader a beat's time to be heard. A leader beats at once; after a long gap it may be
        deposed, so it must hear from a quorum within a few beats, however recently, by its own count, it had.
        """
        role, settings = self.role, self._settings
        if not isinstance(role, Leader):
            role.deadline_ms = max(role.deadline_ms, self.now_ms + settings.heartbeat_ms)
            return
        role.beat_ms = self.now_ms
        if gap_ms >= settings.election_ms:
            for progress in role.progress.values():
                progress.active = False
            role.check_ms = self.now_ms + min(4 * settings.heartbeat_ms, settings.election_ms)

    def campaign(self) -> None:
        """Ask for votes at once, and again soon if nobody answers: the group is known to be fresh."""
        if not isinstance(self.role, Leader):
            self._hurry_until_ms = self.now_ms + 4 * self._settings.election_ms
            self._start_pre_vote()

    def peer_lost(self, member: MemberId) -> None:
        """This member's connection to `member` closed. If that was the leader, its process most likely died.

        The pre-vote starts within a few ms, drawn so that the survivors do not all ask in the same instant. Voters
        whose own connection to the leader lives refuse, so one bad link deposes nobody.
        """
        role = self.role
        if isinstance(role, Leader):
            self.report_unreachable(member)
            if role.transfer is not None and role.transfer.target == member:
                role.transfer = None
        elif isinstance(role, Follower) and role.leader == member and not role.lost:
            role.lost = True
            self._hurry_until_ms = self.now_ms + self._settings.election_ms
            soon = self._rng.randint(1, max(self._settings.heartbeat_ms // 5, 2))
            role.deadline_ms = min(role.deadline_ms, self.now_ms + soon)

    def peer_found(self, member: MemberId) -> None:
        """A connection to `member` opened: repeat what it may have missed."""
        if member not in self.members or member == self.member:
            return
        match self.role:
            case Leader(progress=progress):
                progress[member].paused = False
                self._beat(member, progress[member])
            case PreCandidate():
                self._now(member, PreVoteRequest(self.term + 1, self.log.last_index, self.log.last_term))
            case Candidate():
                self._ask_vote(member)

    def report_unreachable(self, member: MemberId) -> None:
        """A message to `member` was dropped. Nothing but heartbeats goes there until it answers one."""
        if isinstance(self.role, Leader) and member in self.role.progress:
            self.role.progress[member].probe(paused=True)

    def propose(self, data: bytes) -> ProposalId:
        """Append `data` to the log, if this member leads. A refusal is definite: nothing was or will be carried out.

        Raises NotLeader, Refused (too large for one message), Unavailable (too much is not yet committed).
        """
        role = self.role
        if not isinstance(role, Leader):
            raise NotLeader("this master does not lead", leader=self.leader_address())
        if role.transfer is not None:
            raise Unavailable("leadership is being handed over")
        entry = Entry(self.log.last_index + 1, self.term, EntryKind.DATA, data)
        if entry.size > self._settings.bulk_bytes_max:
            raise Refused(f"a proposal of {len(data)} bytes is over the limit of {self._settings.bulk_bytes_max}")
        if role.uncommitted and role.uncommitted_bytes + entry.size > self._settings.proposals_bytes_max:
            raise Unavailable("too much waits for the masters' disks (raft.proposals_bytes_max)")
        role.uncommitted.append((entry.index, entry.size))
        role.uncommitted_bytes += entry.size
        self.log.append(entry)
        return ProposalId(self.term, entry.index)

    def read(self) -> int:
        """Ask for a linearizable read: the number under which `ready` will hand out its index, if ever.

        Raises NotLeader. A read that leadership is lost under is never handed out.
        """
        role = self.role
        if not isinstance(role, Leader):
            raise NotLeader("this master does not lead", leader=self.leader_address())
        self._reads_asked += 1
        role.reads.add(self._reads_asked)
        return self._reads_asked

    def transfer(self, target: MemberId | None = None) -> MemberId:
        """Hand leadership to `target`, or to the member that is most complete; who it is.

        Proposals are refused until the target leads; given up after one election time-out (`transferring` is None).
        The same target again changes nothing; another one replaces it. Raises NotLeader, Refused.
        """
        role = self.role
        if not isinstance(role, Leader):
            raise NotLeader("this master does not lead", leader=self.leader_address())
        if target is None:
            ranked = sorted(role.progress, key=lambda one: (role.progress[one].active, role.progress[one].match))
            target = ranked[-1] if ranked else None
        if target is None or (target != self.member and target not in role.progress):
            raise Refused("there is no other voting master to hand leadership to")
        if target == self.member:
            role.transfer = None
        elif role.transfer is None or role.transfer.target != target:
            role.transfer = Transfer(target, self.now_ms + self._settings.election_ms)
        return target

    @property
    def transferring(self) -> MemberId | None:
        """To whom this leader is handing over."""
        role = self.role
        return role.transfer.target if isinstance(role, Leader) and role.transfer is not None else None

    def step_down(self) -> None:
        """Lead no more; the term and the vote stay."""
        if isinstance(self.role, Leader):
            self._become_follower(None)

    def step(self, sender: MemberId, message: Message) -> None:
        """A message arrived. Raises CorruptData if it proves that this member's or the group's log is damaged."""
        if sender not in self.members or sender == self.member:
            return
        if message.term > self.term:
            if not self._enter_higher_term(sender, message):
                return
        elif message.term < self.term:
            self._answer_older(sender, message)
            return
        match message:
            case PreVoteRequest():
                self._on_pre_vote_request(sender, message)
            case PreVoteReply():
                self._on_pre_vote_reply(sender, message)
            case VoteRequest():
                self._on_vote_request(sender, message)
            case VoteReply():
                self._on_vote_reply(sender, message)
            case Append():
                self._on_append(sender, message)
            case AppendReply():
                self._on_append_reply(sender, message)
            case Heartbeat():
                self._on_heartbeat(sender, message)
            case HeartbeatReply():
                self._on_heartbeat_reply(sender, message)
            case TimeoutNow():
                self._on_timeout_now(sender)
            case SnapshotPiece():
                self._on_snapshot_piece(sender, message)
            case SnapshotReply():
                self._on_snapshot_reply(sender, message)

    def ready(self) -> Ready:
        """What is to be done now. Everything in it is handed out once."""
        role = self.role
        if isinstance(role, Leader):
            self._begin_reads(role)
            self._send_appends(role)
            self._hand_over(role)
        save: Save | None = None
        after: tuple[Send, ...] = ()
        if self._saving is None:
            after = tuple(self._after_persist)
            self._after_persist.clear()
            if self._install is not None:
                state = HardState(self.term, self.vote, self._install.index)
                save = self._saving = Save(state, (), self._install)
                self._saving_since_ms = self.now_ms
            elif self.log.has_unsaved or (self.term, self.vote) != (self._durable.term, self._durable.vote):
                state = HardState(self.term, self.vote, self.commit_index)
                save = self._saving = Save(state, self.log.take_unsaved())
                self._saving_since_ms = self.now_ms
            else:
                self._send_now += after  # All that they promise is durable.
                after = ()
        now = tuple(self._send_now)
        self._send_now.clear()
        reads = tuple(self._reads_ready)
        self._reads_ready.clear()
        return Ready(now, save, after, reads)

    def saved(self) -> None:
        """The save under way is durable."""
        assert self._saving is not None
        install = self._saving.install
        self._durable = self._saving.state
        self._saving = None
        if install is not None:
            self._install = self._incoming = None
            self.log.reset(install.index, install.term)
            self.commit_index = self.applied_index = install.index
            return
        self.log.mark_saved()
        role = self.role
        if isinstance(role, Candidate) and (self._durable.term, self._durable.vote) == (self.term, self.member):
            role.votes[self.member] = True
            self._count_votes(role)
        elif isinstance(role, Leader):
            self._advance_commit(role)

    def applied(self, index: int) -> None:
        """The state machine has applied everything up to `index`; such entries may leave the memory."""
        assert self.applied_index <= index <= self.commit_index, (self.applied_index, index, self.commit_index)
        self.applied_index = index
        self.log.shrink(index)

    @property
    def installing(self) -> bool:
        """A snapshot replaces the log: nothing may be applied, or read from it, until that is saved."""
        return self._install is not None

    def compact(self, snapshot: Source, trailing: int) -> None:
        """`snapshot` is durable: what is more than `trailing` entries before its end leaves the log."""
        if self._install is None and (self.snapshot is None or snapshot.index > self.snapshot.index):
            self.snapshot = snapshot
            self.log.compact(min(snapshot.index - trailing, self.log.durable_index, self.applied_index))

    def installed(self, snapshot: Source) -> None:
        """The save under way, of a snapshot, is durable, and the machine was restored from it."""
        self.snapshot = snapshot
        self.saved()

    # --- elections ---

    def _start_pre_vote(self) -> None:
        if self.member not in self.members or self._save_hangs() or self.installing:
            self.role = Follower(self._election_deadline())
            return
        self.role = PreCandidate(self._election_deadline(), {self.member: True})
        if tally(self.role.votes, self.members) is Tally.WON:
            self._start_election()
            return
        self._now_all(PreVoteRequest(self.term + 1, self.log.last_index, self.log.last_term))

    def _start_election(self, *, transfer: bool = False) -> None:
        self.term += 1
        self.vote = self.member
        self.role = Candidate(self._election_deadline(), transfer=transfer)
        for member in self._peers():
            self._ask_vote(member)

    def _ask_vote(self, member: MemberId) -> None:
        transfer = isinstance(self.role, Candidate) and self.role.transfer
        self._later(member, VoteRequest(self.term, self.log.last_index, self.log.last_term, transfer))

    def _become_leader(self) -> None:
        settings = self._settings
        progress = {member: Progress(self.log.last_index + 1, progress_ms=self.now_ms) for member in self._peers()}
        noop = Entry(self.log.last_index + 1, self.term, EntryKind.NOOP)
        self.role = Leader(
            noop.index, self.now_ms + settings.heartbeat_ms, self.now_ms + settings.election_ms, progress
        )
        self._hurry_until_ms = 0
        self.log.append(noop)

    def _become_follower(self, leader: MemberId | None) -> None:
        self.role = Follower(self._election_deadline(), leader, self.now_ms)

    def _enter_higher_term(self, sender: MemberId, message: Message) -> bool:
        """Enter the message's term if it is one to enter; False if the message is done with."""
        match message:
            case PreVoteRequest() | VoteRequest(transfer=False) if self._is_loyal():
                if isinstance(message, PreVoteRequest):
                    self._now(sender, PreVoteReply(self.term, False))
                return False
            case PreVoteRequest() | PreVoteReply(granted=True):
                return True  # About a term that nobody has entered.
            case Append() | Heartbeat() | TimeoutNow() | SnapshotPiece():
                leader: MemberId | None = sender
            case _:
                leader = None
        self.term = message.term
        self.vote = None  # Legal here only: the term rises.
        self._become_follower(leader)
        return True

    def _is_loyal(self) -> bool:
        """A leader was heard within the shortest election timeout, so whoever campaigns is alone in missing it.

        A leader is loyal to itself: its own check of the quorum ends that.
        """
        role = self.role
        if isinstance(role, Follower):
            heard = role.leader is not None and self.now_ms - role.heard_ms < self._settings.election_ms
            return heard and not role.lost
        return isinstance(role, Leader)

    def _answer_older(self, sender: MemberId, message: Message) -> None:
        """A silent drop would leave an old leader, or a member that asks with an old term, stuck for ever."""
        match message:
            case PreVoteRequest():
                self._now(sender, PreVoteReply(self.term, False))
            case VoteRequest():
                self._later(sender, VoteReply(self.term, False))
            case Append() | Heartbeat() | SnapshotPiece():
                self._later(sender, HeartbeatReply(self.term))

    def _on_pre_vote_request(self, sender: MemberId, message: PreVoteRequest) -> None:
        granted = message.term > self.term and self.log.is_behind(message.last_index, message.last_term)
        self._now(sender, PreVoteReply(message.term if granted else self.term, granted))
        role = self.role
        if granted and not isinstance(role, Leader) and self.now_ms < self._hurry_until_ms:
            role.deadline_ms = max(role.deadline_ms, self._election_deadline())  # Two in a hurry would split the votes.

    def _on_pre_vote_reply(self, sender: MemberId, message: PreVoteReply) -> None:
        role = self.role
        if not isinstance(role, PreCandidate) or message.granted != (message.term == self.term + 1):
            return
        role.votes.setdefault(sender, message.granted)
        match tally(role.votes, self.members):
            case Tally.WON:
                self._start_election()
            case Tally.LOST:
                self.role = Follower(role.deadline_ms)

    def _on_vote_request(self, sender: MemberId, message: VoteRequest) -> None:
        free = self.vote == sender or (self.vote is None and self.leader is None)
        granted = free and self.log.is_behind(message.last_index, message.last_term)
        if granted:
            self.vote = sender
            if isinstance(self.role, Follower):
                self.role.deadline_ms = self._election_deadline()
        self._later(sender, VoteReply(self.term, granted))

    def _on_vote_reply(self, sender: MemberId, message: VoteReply) -> None:
        role = self.role
        if isinstance(role, Candidate):
            role.votes.setdefault(sender, message.granted)
            self._count_votes(role)

    def _count_votes(self, role: Candidate) -> None:
        match tally(role.votes, self.members):
            case Tally.WON:
                self._become_leader()
            case Tally.LOST:
                self.role = Follower(role.deadline_ms)

    # --- following ---

    def _follow(self, sender: MemberId) -> None:
        """`sender` is the leader of this term."""
        role = self.role
        if isinstance(role, Leader):
            raise CorruptData(
                f"two leaders in term {self.term}: {self.member} and {sender}; some log is not what it was"
            )
        if isinstance(role, Follower) and role.leader == sender:
            role.heard_ms, role.lost = self.now_ms, False
            self._hurry_until_ms = 0
            role.deadline_ms = self._election_deadline()
        else:
            self._hurry_until_ms = 0
            self._become_follower(sender)

    def _on_append(self, sender: MemberId, message: Append) -> None:
        self._follow(sender)
        if self.installing:
            return
        if message.prev_index < self.commit_index:  # Old news: what is committed is the same everywhere.
            self._later(sender, AppendReply(self.term, self.commit_index))
            return
        if not self.log.matches(message.prev_index, message.prev_term):
            hint_index, hint_term = self.log.conflict_hint(message.prev_index, message.prev_term)
            self._later(sender, AppendReply(self.term, message.prev_index, True, hint_index, hint_term))
            return
        self.log.splice(message.entries, committed=self.commit_index)
        last = message.prev_index + len(message.entries)
        self.commit_index = max(self.commit_index, min(message.commit, last))
        self._later(sender, AppendReply(self.term, last))

    def _on_snapshot_piece(self, sender: MemberId, message: SnapshotPiece) -> None:
        self._follow(sender)
        if self.installing:
            return
        if message.index <= self.commit_index:
            self._incoming = None
            self._later(sender, AppendReply(self.term, self.commit_index))
            return
        if self.log.matches(message.index, message.snapshot_term):  # What follows it here may be all that there is.
            self._incoming = None
            self.commit_index = message.index
            self._later(sender, AppendReply(self.term, message.index))
            return
        if self._incoming is None or not self._incoming.is_of(message):
            self._incoming = Incoming(message.index, message.snapshot_term, message.size)
        self._install = self._incoming.add(message)
        if self._install is not None:
            self._later(sender, AppendReply(self.term, message.index))
        else:
            self._now(sender, SnapshotReply(self.term, message.index, len(self._incoming.data)))

    def _on_heartbeat(self, sender: MemberId, message: Heartbeat) -> None:
        self._follow(sender)
        if message.commit > self.log.last_index:
            raise CorruptData(
                f"the log ends at {self.log.last_index}, but this member had acknowledged {message.commit}: "
                "its directory is not what it was"
            )
        self.commit_index = max(self.commit_index, message.commit)
        self._now(sender, HeartbeatReply(self.term, message.round))

    def _on_timeout_now(self, sender: MemberId) -> None:
        """Without a pre-vote: the leader has stopped taking proposals. A late one is of an older term."""
        role = self.role
        if isinstance(role, Follower) and role.leader == sender and not self._save_hangs():
            self._start_election(transfer=True)

    # --- leading ---

    def _tick_leader(self, role: Leader) -> None:
        settings = self._settings
        if self.now_ms >= role.check_ms:
            heard = sum(1 for progress in role.progress.values() if progress.active)
            if 1 + heard < majority(len(self.members)):
                self.step_down()
                return
            for progress in role.progress.values():
                progress.active = False
            role.check_ms = self.now_ms + settings.election_ms
        if role.transfer is not None and self.now_ms >= role.transfer.deadline_ms:
            role.transfer = None
        if self.now_ms >= role.beat_ms:
            role.beat_ms = self.now_ms + settings.heartbeat_ms
            if self.commit_index >= role.noop_index:
                role.reads.begin(self.commit_index, at_beat=True)
            for member, progress in role.progress.items():
                self._beat(member, progress)
                silent = self.now_ms - progress.progress_ms >= settings.election_ms
                if progress.snapshot is not None and silent:
                    progress.paused, progress.progress_ms = False, self.now_ms
                elif progress.inflight and silent:
                    progress.probe()

    def _beat(self, member: MemberId, progress: Progress) -> None:
        round = self.role.reads.round if isinstance(self.role, Leader) else 0
        self._now(member, Heartbeat(self.term, min(progress.match, self.commit_index), round))

    def _hand_over(self, role: Leader) -> None:
        """Tell the target once nothing is unanswered: its log is this one, and all of it is committed and applied."""
        transfer, last = role.transfer, self.log.last_index
        if transfer is None or transfer.told or role.progress[transfer.target].match < last:
            return
        if self.applied_index == self.commit_index == last:
            transfer.told = True
            self._now(transfer.target, TimeoutNow(self.term))

    def _begin_reads(self, role: Leader) -> None:
        """Before its own first entry is committed a leader does not know what is (Raft, 8)."""
        if self.commit_index >= role.noop_index and role.reads.begin(self.commit_index):
            for member, progress in role.progress.items():
                self._beat(member, progress)
            self._confirm_reads(role)

    def _confirm_reads(self, role: Leader) -> None:
        quorum = quorum_index([role.reads.round, *(progress.round for progress in role.progress.values())])
        self._reads_ready += role.reads.confirmed(quorum)

    def _on_append_reply(self, sender: MemberId, message: AppendReply) -> None:
        role = self.role
        if not isinstance(role, Leader):
            return
        progress = role.progress[sender]
        progress.active = True
        if message.rejected:
            guess, _ = self.log.conflict_hint(message.hint_index, message.hint_term)
            progress.rejected(message.index, guess + 1)
        else:
            if message.index > self.log.last_index:
                raise CorruptData(
                    f"{sender} holds entry {message.index}, the leader's log ends at {self.log.last_index}"
                )
            progress.acked(message.index, self.now_ms)
            self._advance_commit(role)

    def _on_heartbeat_reply(self, sender: MemberId, message: HeartbeatReply) -> None:
        role = self.role
        if not isinstance(role, Leader):
            return
        progress = role.progress[sender]
        progress.active = True
        if message.round > progress.round:
            progress.round = message.round
            self._confirm_reads(role)
        if progress.state is ProgressState.PROBE:
            progress.paused = False
        elif progress.state is ProgressState.SNAPSHOT:
            return
        elif self.log.term_at(progress.next - 1) is None:
            progress.probe()  # What it needs has left the log meanwhile.
        elif progress.match < self.log.last_index and not (progress.bulk and progress.inflight):
            # Behind, and possibly because a message was lost: an empty append is rejected if so. One that overtook a
            # message on the bulk connection would be rejected in vain; those that are lost are found by time.
            if self.now_ms - progress.checked_ms < self._settings.heartbeat_ms // 2:
                return  # Rounds for reads may be many, and each would ask.
            progress.checked_ms = self.now_ms
            self._append_to(sender, progress, first=self.log.last_index + 1, last=progress.next - 1)

    def _on_snapshot_reply(self, sender: MemberId, message: SnapshotReply) -> None:
        role = self.role
        if isinstance(role, Leader):
            role.progress[sender].active = True
            role.progress[sender].snapshot_wanted(message.index, message.offset, self.now_ms)

    def _send_piece(self, member: MemberId, progress: Progress) -> None:
        """One piece, and then its answer: a follower that is slow to take it holds up nobody else."""
        assert progress.snapshot is not None
        piece = piece_of(
            progress.snapshot, term=self.term, offset=progress.offset, bytes_max=self._settings.snapshot_piece_bytes
        )
        self._send_now.append(Send(member, piece, bulk=True))
        progress.paused = True

    def _advance_commit(self, role: Leader) -> None:
        """Commit what a majority has durably, if it is of this term (Raft, 5.4.2 and figure 8)."""
        index = quorum_index([self.log.durable_index, *(progress.match for progress in role.progress.values())])
        if index <= self.commit_index or self.log.term_at(index) != self.term:
            return
        self.commit_index = index
        while role.uncommitted and role.uncommitted[0][0] <= index:
            role.uncommitted_bytes -= role.uncommitted.popleft()[1]

    def _send_appends(self, role: Leader) -> None:
        last = self.log.last_index
        for member, progress in role.progress.items():
            while progress.may_send(self._settings.inflight_max):
                if progress.snapshot is None and self.log.term_at(progress.next - 1) is None:
                    assert self.snapshot is not None, (progress, self.log.first_index)
                    progress.send_snapshot(self.snapshot, self.now_ms)
                if progress.snapshot is not None:
                    self._send_piece(member, progress)
                    break
                if progress.state is ProgressState.REPLICATE and progress.next > last:
                    break
                if not self._append_to(member, progress, first=progress.next, last=last):
                    break

    def _append_to(self, member: MemberId, progress: Progress, *, first: int, last: int) -> bool:
        """Send entries from `first` on; none if `first` > `last`. False if another connection must drain first."""
        settings = self._settings
        prev = progress.next - 1
        entries: list[Entry] = []
        bulk = False
        if first <= last:
            entries = self.log.slice(first, last, settings.append_bytes_max)
            bulk = entries[0].size > settings.append_bytes_max
            if progress.inflight and progress.bulk != bulk:
                return False
            if bulk and progress.state is ProgressState.PROBE:
                entries, bulk = [], False  # First learn where it stands; a guess may cost a megabyte.
            elif bulk:
                entries = self.log.slice(first, last, settings.bulk_bytes_max)
        prev_term = self.log.term_at(prev)
        assert prev_term is not None, (prev, self.log.first_index)
        commit = min(self.commit_index, prev + len(entries))
        self._send_now.append(Send(member, Append(self.term, prev, prev_term, commit, tuple(entries)), bulk))
        if entries or progress.state is ProgressState.PROBE:
            progress.sent(prev + len(entries), bulk=bulk, now_ms=self.now_ms)
        return True

    # --- small things ---

    def _save_hangs(self) -> bool:
        return self._saving is not None and self.now_ms - self._saving_since_ms >= self._settings.sync_hang_ms

    def _election_deadline(self) -> int:
        if self.now_ms < self._hurry_until_ms:
            beat = self._settings.heartbeat_ms
            return self.now_ms + self._rng.randint(beat // 2, beat * 3 // 2)
        return self.now_ms + self._rng.randint(self._settings.election_ms, 2 * self._settings.election_ms - 1)

    def _peers(self) -> list[MemberId]:
        return [member for member in self.members if member != self.member]

    def _now(self, to: MemberId, message: Message) -> None:
        self._send_now.append(Send(to, message))

    def _now_all(self, message: Message) -> None:
        for member in self._peers():
            self._now(member, message)

    def _later(self, to: MemberId, message: Message) -> None:
        """Send once everything this member now knows is durable."""
        self._after_persist.append(Send(to, message))
