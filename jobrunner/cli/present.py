"""What commands print: one JSON object each, and the same as lines for people. Pure: values in, text out."""

import json
from collections.abc import Iterable, Sequence

from jobrunner.clock import rfc3339
from jobrunner.control.messages import ClusterInfo, JobError, JobState, JobStatus, StageStatus

_ATTEMPT_KEYS = ("started", "failed", "lost", "superseded")  # Always there, whatever else was seen.


def to_json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def status_object(status: JobStatus) -> dict[str, object]:
    """The object that `run`, `wait` and `status` print."""
    return {
        "id": status.id,
        "name": status.name,
        "state": status.state.value,
        "waiting_for": status.waiting_for,
        "output": status.output,
        "submitted_at": rfc3339(status.submitted_ms),
        "finished_at": None if status.finished_ms is None else rfc3339(status.finished_ms),
        "stages": [_stage_object(stage) for stage in status.stages],
        "counters": dict(status.counters),
        "error": None if status.error is None else _error_object(status.error),
    }


def cluster_object(info: ClusterInfo) -> dict[str, object]:
    """The object that `cluster status` prints."""
    return {
        "cluster_id": info.cluster_id,
        "leader": info.leader,
        "epoch": info.epoch,
        "masters": [
            {
                "id": master.id,
                "member": master.member,
                "address": master.address,
                "pid": master.pid,
                "role": master.role,
                "epoch": master.epoch,
                "commit_index": master.commit_index,
                "applied_index": master.applied_index,
            }
            for master in info.masters
        ],
        "workers": [
            {
                "id": worker.id,
                "address": worker.address,
                "pid": worker.pid,
                "host": worker.host,
                "slots": worker.slots,
                "state": worker.state,
                "running": list(worker.running),
            }
            for worker in info.workers
        ],
        "jobs": dict(info.jobs),
    }


def progress_line(status: JobStatus) -> str:
    """Where a job stands, on one line: `running: map 3/10 (2 running), reduce 0/4`."""
    stages = ", ".join(_stage_text(stage) for stage in status.stages)
    line = f"{status.state.value}: {stages}"
    return f"{line}; waiting for {waiting}" if (waiting := waiting_text(status)) else line


def waiting_text(status: JobStatus) -> str:
    """What a job waits for, where the counts of its stages do not say it already."""
    text = status.waiting_for or ""
    if any(stage.running or text.startswith(f"{stage.name}:") for stage in status.stages):
        return ""
    return text


def end_line(status: JobStatus) -> str:
    """How a committed job ended, on one line."""
    seconds = (
        "" if status.finished_ms is None else f" in {max(0, status.finished_ms - status.submitted_ms) / 1000:.1f} s"
    )
    parts = status.stages[-1].tasks if status.stages else 0
    return f"job {status.id} {status.state.value}{seconds}: {_count(parts, 'part')} in {status.output}"


def status_text(status: JobStatus) -> str:
    """`jobrunner status JOB` for people."""
    lines = [
        f"job        {status.id} ({status.name})",
        f"state      {status.state.value}" + (f", waiting for {status.waiting_for}" if status.waiting_for else ""),
        f"output     {status.output}",
        f"submitted  {rfc3339(status.submitted_ms)}",
    ]
    if status.finished_ms is not None:
        lines.append(f"finished   {rfc3339(status.finished_ms)}")
    for stage in status.stages:
        ends = ", ".join(f"{name} {count}" for name, count in stage.attempts.items() if count)
        lines.append(f"{stage.name:<10} {_stage_text(stage, named=False)}" + (f"; attempts: {ends}" if ends else ""))
    lines += [f"counter    {name} = {value}" for name, value in status.counters.items()]
    if status.error:
        lines.append(f"error      {error_line(status.error)}")
    return "\n".join(lines)


def error_line(error: JobError) -> str:
    where = f" in {error.attempt or error.task}" if error.attempt or error.task else ""
    place = f", at byte {error.input.offset} of {error.input.url}" if error.input else ""
    return f"{error.kind}{where}{place}: {error.message}"


def jobs_text(jobs: Sequence[JobStatus]) -> str:
    """One line a job, newest first."""
    rows = [("JOB", "STATE", "TASKS", "SUBMITTED", "NAME", "OUTPUT")]
    for job in jobs:
        done = sum(stage.done for stage in job.stages)
        tasks = sum(stage.tasks for stage in job.stages)
        rows.append((job.id, job.state.value, f"{done}/{tasks}", rfc3339(job.submitted_ms), job.name, job.output))
    return table(rows)


def cluster_text(info: ClusterInfo) -> str:
    """`jobrunner cluster status` for people."""
    workers = [("WORKER", "STATE", "ADDRESS", "PID", "HOST", "RUNNING")]
    for worker in info.workers:
        running = f"{len(worker.running)}/{worker.slots}"
        workers.append((str(worker.id), worker.state, worker.address, str(worker.pid), worker.host, running))
    jobs = ", ".join(f"{count} {state}" for state, count in info.jobs.items() if count) or "none"
    leader = "no leader" if info.leader is None else f"master {info.leader} leads"
    return "\n".join(
        [
            f"cluster {info.cluster_id}: {leader} (epoch {info.epoch})",
            masters_text(info),
            table(workers),
            f"jobs: {jobs}",
        ]
    )


def masters_text(info: ClusterInfo) -> str:
    """`jobrunner masters list` for people."""
    rows = [("MASTER", "ROLE", "ADDRESS", "PID", "EPOCH", "COMMIT", "APPLIED")]
    for master in info.masters:
        pid = "-" if master.pid is None else str(master.pid)
        counts = (str(master.epoch), str(master.commit_index), str(master.applied_index))
        rows.append((str(master.id), master.role, master.address, pid, *counts))
    return table(rows)


def table(rows: Iterable[Sequence[str]]) -> str:
    """Columns, as wide as they need."""
    rows = list(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def has_ended(status: JobStatus) -> bool:
    return status.state in (JobState.COMMITTED, JobState.FAILED, JobState.KILLED)


def _stage_object(stage: StageStatus) -> dict[str, object]:
    return {
        "name": stage.name,
        "kind": stage.kind.value,
        "tasks": stage.tasks,
        "done": stage.done,
        "running": stage.running,
        "attempts": {**dict.fromkeys(_ATTEMPT_KEYS, 0), **stage.attempts},
    }


def _error_object(error: JobError) -> dict[str, object]:
    return {
        "kind": error.kind,
        "message": error.message,
        "task": error.task,
        "attempt": error.attempt,
        "traceback": error.traceback,
        "input": None if error.input is None else {"url": error.input.url, "offset": error.input.offset},
    }


def _stage_text(stage: StageStatus, *, named: bool = True) -> str:
    notes = [f"{stage.running} running"] if stage.running else []
    notes += [f"{stage.attempts[end]} {end}" for end in ("failed", "lost") if stage.attempts.get(end)]
    text = f"{stage.done}/{stage.tasks}" + (f" ({', '.join(notes)})" if notes else "")
    return f"{stage.name} {text}" if named else text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
