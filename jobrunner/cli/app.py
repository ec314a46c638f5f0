"""The tree of commands, and the one place where errors become lines on stderr and exit statuses."""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jobrunner.cli import clusters, jobs, kv, locks, logs, masters, run, verify
from jobrunner.errors import INTERRUPTED, JobrunnerError

_EPILOG = """Exit status: 0 done; 1 the job failed; 2 wrong use or spec; 3 cluster not reachable; 4 killed;
5 damaged data; 6 I/O error of a master's log; 7 log of a newer version; 130 interrupted."""


class Guarded(TyperGroup):
    """Any error of ours is one line, after the user's traceback if there is one; never our own traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except JobrunnerError as error:
            report(error)
            raise typer.Exit(error.exit_status) from None
        except KeyboardInterrupt as interrupt:
            print(f"jobrunner: {interrupt.args[0] if interrupt.args else 'interrupted'}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


def report(error: JobrunnerError) -> None:
    """The user's traceback, then one line, then what was noted on the way (a directory that was kept)."""
    trace = error.fields.get("traceback")
    if trace:
        print(str(trace).rstrip("\n"), file=sys.stderr)
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"jobrunner: {message}", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(f"jobrunner: {note}", file=sys.stderr)


app = typer.Typer(
    name="jobrunner",
    cls=Guarded,
    help="Fault-tolerant map/reduce jobs in Python: the output is complete and written once, whoever dies.\n\n"
    "\b\n"
    "Examples:\n"
    "  jobrunner run examples/wordcount.py books/ --output counts     on this machine, nothing to set up\n"
    "  jobrunner cluster up --workers 4                               a cluster that stays\n"
    "  jobrunner submit examples/wordcount.py books/ --output counts  prints the job's id\n"
    "  jobrunner wait JOB;  jobrunner status JOB;  jobrunner logs JOB --failed\n"
    "  jobrunner verify counts                                        proof from the manifest",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        import jobrunner

        print(f"jobrunner {jobrunner.__version__}")
        raise typer.Exit


def _failpoints(asked: bool) -> None:
    if asked:
        from jobrunner.failpoints import NAMES

        for name, place in NAMES.items():
            print(f"{name:<26} {place}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    failpoints: Annotated[
        bool,
        typer.Option(
            "--failpoints",
            callback=_failpoints,
            is_eager=True,
            help="List the places where JOBRUNNER_FAILPOINTS=name=kill|pause|error[:n],... acts.",
        ),
    ] = False,
) -> None:
    # Without its own text here the one given to Typer() would be lost.
    pass


app.command("run")(run.run)
app.command("submit")(run.submit)
app.command("wait")(run.wait)
app.command("jobs")(jobs.jobs)
app.command("status")(jobs.status)
app.command("kill")(jobs.kill)
app.command("logs")(logs.logs)
app.command("verify")(verify.verify)
app.command("lock")(locks.lock)
app.add_typer(locks.locks, name="locks")
app.add_typer(kv.kv, name="kv")
app.add_typer(clusters.cluster, name="cluster")
app.add_typer(masters.masters, name="masters")
app.command("master")(clusters.master)
app.command("worker")(clusters.worker)


def run_app() -> None:
    app()
