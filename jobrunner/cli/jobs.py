"""jobs, status, kill: what the masters know of jobs."""

import sys

from jobrunner.cli.locate import Where, open_client
from jobrunner.cli.options import ClusterOpt, DirOpt, JobArg, JsonOpt, ReachOpt, StaleOpt, TokenFileOpt


def jobs(
    cluster: ClusterOpt = None,
    directory: DirOpt = None,
    token_file: TokenFileOpt = None,
    reach_timeout: ReachOpt = None,
    stale: StaleOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """List the jobs that the cluster remembers, newest first."""
    from jobrunner.cli.present import jobs_text, status_object, to_json

    with open_client(Where(cluster, directory, token_file, reach_timeout)) as client:
        found = client.jobs(stale=stale)
    print(to_json({"jobs": [status_object(job) for job in found]}) if as_json else jobs_text(found))


def status(
    job: JobArg,
    cluster: ClusterOpt = None,
    directory: DirOpt = None,
    token_file: TokenFileOpt = None,
    reach_timeout: ReachOpt = None,
    stale: StaleOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Show a job: its state and what it waits for.

    Also tasks and attempts of each stage, counters, and the error that it ended with.
    """
    from jobrunner.cli.present import status_object, status_text, to_json

    with open_client(Where(cluster, directory, token_file, reach_timeout)) as client:
        found = client.job(job).status(stale=stale)
    print(to_json(status_object(found)) if as_json else status_text(found))


def kill(
    job: JobArg,
    cluster: ClusterOpt = None,
    directory: DirOpt = None,
    token_file: TokenFileOpt = None,
    reach_timeout: ReachOpt = None,
) -> None:
    """Kill a job; nothing of it stays.

    One that has ended, or whose output is decided, stays as it is: that is no error.
    """
    from jobrunner.control.messages import JobState

    with open_client(Where(cluster, directory, token_file, reach_timeout)) as client:
        found = client.job(job).kill("killed by `jobrunner kill`")
    if found.state is not JobState.KILLED:
        print(f"job {found.id} is {found.state.value}: it was too late to kill it", file=sys.stderr)
