"""Our side of a word count, under the command line of other frameworks' scripts; one job, cold, in its own process.

    python tests/benchmarks/wordcount.py gen --input DATA --output OUT [--parts 4] [--workers 2] [--masters 3]

Workloads: gen, list, list-count, count (Python functions), batch, batch-tokens (Arrow). To alternate it with others,
give their runner this command with its own placeholders: `... wordcount.py gen --input {data}/words --output {out}`.
"""

import argparse
import shutil
import sys
from pathlib import Path

from jobrunner.cli import main as jobrunner

PYTHON, ARROW = "wordcount_python.py", "wordcount_arrow.py"
FILES = {"gen": PYTHON, "list": PYTHON, "list-count": PYTHON, "count": PYTHON, "batch": ARROW, "batch-tokens": ARROW}

NAMES = {"list": "list_", "list-count": "list_count", "batch": "batch_", "batch-tokens": "batch_tokens"}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("workload", choices=FILES)
    words.add_argument("--input", required=True)
    words.add_argument("--output", required=True)
    words.add_argument("--parts", default="4", help="reducers")
    words.add_argument("--workers", default="2", help="slots")
    words.add_argument("--masters", default="3")
    asked = words.parse_args()
    shutil.rmtree(asked.output, ignore_errors=True)  # As the others do.
    target = f"{Path(__file__).parent / FILES[asked.workload]}:{NAMES.get(asked.workload, asked.workload)}"
    sys.argv[1:] = ["run", target, asked.input, "--output", asked.output, "--reducers", asked.parts]
    sys.argv += ["--slots", asked.workers, "--masters", asked.masters, "--json"]
    jobrunner()


if __name__ == "__main__":
    main()
