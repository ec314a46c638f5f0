"""verify: offline proof that an output is what was committed."""

import os
import sys
from typing import Annotated

import typer

from jobrunner.cli.options import JsonOpt
from jobrunner.errors import CorruptData, SpecError


def verify(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Output directory of a job.", show_default=False)],
    as_json: JsonOpt = False,
) -> None:
    """Prove that an output is what was committed.

    Every part is compared with the manifest: sizes, checksums, records, one winner a partition. Needs no
    cluster. Exit status 0 if all is as it was committed, 5 if not.
    """
    from jobrunner.cli.present import to_json
    from jobrunner.commit.names import local_path
    from jobrunner.commit.verify import verify_output

    if not os.path.isdir(local_path(output)):
        raise SpecError(f"OUTPUT: found {output!r}, allowed: the output directory of a job")
    try:
        report = verify_output(output)
    except OSError as error:
        raise SpecError(f"OUTPUT: {output!r} cannot be read: {error.strerror or error}") from error
    if as_json:
        print(
            to_json(
                {
                    "output": report.path,
                    "ok": report.ok,
                    "job": report.job,
                    "parts": report.parts,
                    "records": report.records,
                    "bytes": report.bytes,
                    "problems": report.problems,
                }
            )
        )
    if not report.ok:
        for problem in report.problems:
            print(problem, file=sys.stderr)
        raise CorruptData(f"{report.path} is not what was committed: problems found: {len(report.problems)}")
    if not as_json:
        print(f"{report.path} is whole: job {report.job}, {report.parts} parts, {report.records} records")
