"""The command line: words in, one exit status out, and one clear line for whatever went wrong.

    app.py        the tree of commands, and the one place where errors become lines and exit statuses
    options.py    the options that several commands share
    target.py     TARGET -> Job           locate.py    which cluster, and its token
    run.py        run, submit, wait       jobs.py      jobs, status, kill
    logs.py       logs                    clusters.py  cluster up/status/down, master, worker
    verify.py     verify
    present.py    the JSON objects and tables        display.py   live progress, or a line per change

stdout is for results (a job id, a JSON object, a table), all else goes to stderr. Heavy modules are imported inside
commands: `jobrunner --help` loads neither pyarrow nor aiohttp.
Owns: words, formats and exit statuses. Must not know: how a job is checked, planned or run (api), or a cluster started.
"""


def main() -> None:
    """The `jobrunner` script; ends the process. Code in a page only because scripts name a package's function."""
    from jobrunner.cli.app import run_app

    run_app()
