"""What the crash tests share: input, a cluster with short time-outs, and the proof that an output is right.

Every test ends with `check_output`: the counts equal an independent count, each partition was committed once (audited
from the masters' logs), and nothing but the output directory is left beside it.
"""

import collections
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jobrunner.commit.verify import verify_output
from jobrunner.control.messages import JobState, JobStatus
from jobrunner.ids import JobId
from jobrunner.master.commands import decode_entry
from jobrunner.master.state import MasterState
from jobrunner.raft.messages import Entry, EntryKind
from jobrunner.raft.segment import decode_header, read_frames
from jobrunner.testing.local import LocalCluster

# Short enough for a test that waits for a lease, long enough for a machine that is busy with other tests.
# One map a file: small files would otherwise share one.
SETTINGS = {"session.ttl_ms": 2000, "session.beat_ms": 200, "input.split_files_max": 1}


@dataclass(frozen=True)
class Text:
    """Input files, and the count of every word in them."""

    directory: Path
    counts: dict[str, int]


def make_text(directory: Path, *, files: int = 8, lines: int = 400, slow: int = 3) -> Text:
    """`files` files of `lines` lines; `slow` lines of each begin with a word "slowN" (see jobs.py)."""
    directory.mkdir(parents=True)
    counts: collections.Counter[str] = collections.Counter()
    for number in range(files):
        rows = [f"alpha w{(number * 7 + n) % 97} n{n % 13} beta" for n in range(lines)]
        for place in range(slow):
            rows[place * lines // max(1, slow)] = f"slow{place} word{number}"
        for row in rows:
            counts.update(row.split())
        (directory / f"{number:03}.txt").write_text("\n".join(rows) + "\n")
    return Text(directory, dict(counts))


@contextmanager
def cluster_for(tmp_path: Path, **options: object) -> Iterator[LocalCluster]:
    """A LocalCluster in tmp_path whose logs are printed when the test fails."""
    cluster = LocalCluster(settings=SETTINGS, directory=tmp_path / "cluster", **options)  # type: ignore[arg-type]
    with cluster:
        try:
            yield cluster
        except BaseException:
            print(cluster.logs())
            raise


def entries(directory: Path, pattern: str) -> list[Path]:
    """What matches just now, while others make and delete directories: a plain glob raises for one that goes."""
    try:
        return list(directory.glob(pattern))
    except FileNotFoundError:
        return []


def read_counts(output: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for part in sorted(output.glob("part-*")):
        for line in part.read_text().splitlines():
            word, number = line.split("\t")
            assert word not in counts, f"{word} is in the output twice"
            counts[word] = int(number)
    return counts


def check_output(cluster: LocalCluster, status: JobStatus, text: Text) -> None:
    """The output is right, whole, decided once, and alone."""
    assert status.state == JobState.COMMITTED, status
    output = Path(status.output)
    assert read_counts(output) == text.counts
    report = verify_output(str(output))
    assert report.ok, report.problems
    check_alone(output)
    audit_seals(cluster, status.id)


def check_alone(output: Path) -> None:
    """Nothing of ours is beside the output (which may be absent)."""
    left = [entry.name for entry in output.parent.iterdir() if ".jr-" in entry.name]
    assert not left, f"left behind: {left}"


def audit_seals(cluster: LocalCluster, job: JobId) -> None:
    """Replay the log of every master: a winner is decided once, never changes, and is what was published."""
    output = Path(cluster.client.job(job).status().output)
    manifest = json.loads((output / "_SUCCESS").read_bytes())
    published = {part["partition"]: (part["attempt"], part["token"]) for part in manifest["parts"]}
    most = 0
    for master in cluster.masters:
        winners: dict[tuple[str, int], tuple[int, int]] = {}
        state = MasterState()
        for entry in committed_entries(cluster.directory / f"master-{master.id}"):
            if entry.kind != EntryKind.DATA:
                continue
            state.apply(decode_entry(entry.data))
            for (owner, stage), claims in state.locks.winners.items():
                for partition, claim in claims.items() if owner == job else ():
                    decided = winners.setdefault((stage, partition), (claim.attempt, claim.token))
                    assert decided == (claim.attempt, claim.token), f"{stage}/{partition}: the winner changed"
        for (_, partition), decided in winners.items():
            assert published[partition] == decided, f"partition {partition}: published is not what was decided"
        most = max(most, len(winners))
    assert most == len(published), f"{most} partitions were decided, {len(published)} published"


def committed_entries(directory: Path) -> list[Entry]:
    """The entries that a master knows to be committed, from its segment files; it may be running or dead."""
    entries: dict[int, Entry] = {}
    commit = 0
    paths = sorted(directory.glob("*.log"))
    for path in (path for path in paths if path.stem.isdigit()):
        data = path.read_bytes()
        header = decode_header(data, str(path))
        for frame in read_frames(data, header, path=str(path), is_last=path == paths[-1]):
            for entry in frame.save.entries:
                entries[entry.index] = entry
            commit = frame.save.state.commit
    return [entries[index] for index in sorted(entries) if index <= commit]
