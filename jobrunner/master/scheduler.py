"""State -> which attempt on which worker: first in, first out over jobs; maps before the reduces that read them.

Steps of the commit need no slot, so that a cluster full of one job still commits another.
"""

from heapq import heapify, heapreplace

from jobrunner.ids import SessionId
from jobrunner.master.commands import Placement
from jobrunner.master.jobs import STEP_KINDS, Job
from jobrunner.master.state import MasterState
from jobrunner.master.tasks import StageTable


def place_attempts(state: MasterState, ahead: dict[SessionId, int], *, placements_max: int) -> list[Placement]:
    """Placements for open tasks, most free worker first.

    `ahead`: attempts that may wait at each worker beyond its slots, so that a slot never waits for the masters.
    Only sessions named in it get anything.
    """
    heap = [(-free, id) for id, free in _free(state, ahead).items()]
    heapify(heap)
    places: list[Placement] = []
    for job in state.active.values():
        for table in job.open_tables():
            if not heap or len(places) >= placements_max:
                return places
            if table.spec.kind in STEP_KINDS:
                places.append(Placement(job.submit.job, table.spec.name, 0, heap[0][1]))
            else:
                _place_stage(job, table, heap, places, placements_max)
    return places


def _free(state: MasterState, ahead: dict[SessionId, int]) -> dict[SessionId, int]:
    free = {}
    for id, extra in ahead.items():
        used = sum(running.kind not in STEP_KINDS for running in state.attempts[id].values())
        free[id] = state.sessions.live[id].slots + extra - used
    return free


def _place_stage(
    job: Job, table: StageTable, heap: list[tuple[int, SessionId]], places: list[Placement], placements_max: int
) -> None:
    total = sum(-negative for negative, _ in heap if negative < 0)
    for partition in table.take_open(min(total, placements_max - len(places))):
        negative, id = heap[0]
        places.append(Placement(job.submit.job, table.spec.name, partition, id))
        heapreplace(heap, (negative + 1, id))
