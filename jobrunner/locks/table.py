"""The lock table: tokens, output paths, and for each output partition the one attempt whose output it is.

Applied in log order, the same on every master: nothing here reads a clock, draws a random number or walks a set.
Source: Burrows, The Chubby lock service, OSDI 2006, section 2.4 (sequencers).
"""

import msgspec

from jobrunner.control.messages import OutputFile
from jobrunner.ids import JobId, SessionId, StageName, Token

PartitionKey = tuple[JobId, StageName, int]


class Claim(msgspec.Struct, frozen=True):
    """An attempt's word that its files are closed, durable and final, and which input they were made from."""

    attempt: int
    token: Token
    session: SessionId  # Where its logs are; decides nothing.
    files: list[OutputFile]
    consumed: int


class LockTable:
    """`winners` is write-once: no death and no deadline clears an entry, only forgetting its whole job."""

    def __init__(self) -> None:
        self.last_token = 0
        self.winners: dict[tuple[JobId, StageName], dict[int, Claim]] = {}
        self.paths: dict[str, JobId] = {}

    def next_token(self) -> Token:
        """A token above every earlier one, also across leaders and restarts: the counter is in the log."""
        self.last_token += 1
        return Token(self.last_token)

    def winner(self, job: JobId, stage: StageName, partition: int) -> Claim | None:
        return self.winners.get((job, stage), {}).get(partition)

    def seal(self, job: JobId, stage: StageName, partition: int, claim: Claim) -> Claim:
        """Make `claim` the winner unless there is one; return the winner. Safe to repeat."""
        return self.winners.setdefault((job, stage), {}).setdefault(partition, claim)

    def take_path(self, url: str, job: JobId) -> JobId:
        """Give `url` to `job` unless a live job has it; return whose it is. Safe to repeat."""
        return self.paths.setdefault(url, job)

    def release_path(self, url: str, job: JobId) -> None:
        """Release `url` if it is `job`'s. Safe to repeat."""
        if self.paths.get(url) == job:
            del self.paths[url]

    def forget(self, job: JobId, stages: list[StageName]) -> None:
        """Drop the winners of an ended job that nobody asks about any more."""
        for stage in stages:
            self.winners.pop((job, stage), None)
