"""For users' own tests: a real cluster of this machine that can be hurt, and a run without any process.

with LocalCluster(masters=3, workers=2) as cluster:       run_inline(job, ["a b", "b"]) == [("a", 1), ("b", 2)]
    handle = cluster.client.submit(job, ...)
    cluster.kill_leader()
    handle.wait()
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobrunner.testing.inline import run_inline
    from jobrunner.testing.local import LocalCluster

__all__ = ["LocalCluster", "run_inline"]


def __getattr__(name: str) -> Any:
    """Load on first use: a test of a map function needs no cluster code."""
    if name == "LocalCluster":
        from jobrunner.testing.local import LocalCluster

        return LocalCluster
    if name == "run_inline":
        from jobrunner.testing.inline import run_inline

        return run_inline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
