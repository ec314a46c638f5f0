"""The road itself on real processes, undisturbed, and the proof that the crash tests share."""

from pathlib import Path

from jobrunner.control.messages import JobState
from tests.crash.cluster import check_output, cluster_for, make_text
from tests.crash.jobs import wordcount


def test_an_undisturbed_job_is_right_whole_and_alone(tmp_path: Path) -> None:
    """What every other crash test compares with."""
    text = make_text(tmp_path / "in")
    with cluster_for(tmp_path) as cluster:
        handle = cluster.client.submit(wordcount, input=[text.directory], output=tmp_path / "out", reducers=3)
        status = handle.ended(60, tidy=True)
        assert status.state == JobState.COMMITTED
        check_output(cluster, status, text)
