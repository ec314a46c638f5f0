"""What an agent tells the masters, in messages that can be sent."""

import asyncio
from typing import Any

import msgspec

from jobrunner.control.messages import Ack, LossKind
from jobrunner.ids import AttemptId, StageName, job_id_from_number
from jobrunner.spec.settings import LimitsSection, Settings
from jobrunner.worker.attempts import Attempts
from jobrunner.worker.session import Session

FRAME = 65_536
JOB = job_id_from_number(1)


class Masters:
    """They take every report."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    async def call(self, message: Any) -> Ack:
        assert len(msgspec.msgpack.encode(message)) < FRAME
        self.told.append(message)
        return Ack()


def test_more_lost_maps_than_fit_a_frame_are_reported_in_part() -> None:
    """The agent ended at a message that it could not send. The next reader finds what is left."""
    lost = [AttemptId(JOB, StageName("map"), number, 0) for number in range(5_000)]

    async def main() -> None:
        masters: Any = Masters()
        nobody: Any = None
        settings = Settings(limits=LimitsSection(frame_bytes_max=FRAME))
        session = Session(nobody, Attempts(1), masters, nobody, settings)
        session.report_lost(AttemptId(JOB, StageName("reduce"), 0, 0), lost, LossKind.MISSING)
        await session._report()
        (report,) = masters.told
        assert 500 < len(report.lost) < 5_000 and report.lost == lost[: len(report.lost)]

    asyncio.run(main())
