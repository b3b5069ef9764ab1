"""Run the whole test suite on this machine's GPU and keep a summary beside the benchmarks.

    python benchmarks/gpu_tests.py --out benchmarks/results/<gpu>

Writes tests.json: the environment, the counts, and how many tests of each file passed. With --seconds the run is
interrupted after that long and what was done until then is written.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from report import environment, write_json


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for tests.json")
    parser.add_argument("--seconds", type=float, help="interrupt the tests after this long")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        start = time.monotonic()
        run = subprocess.Popen([sys.executable, "-m", "pytest", f"--junitxml={report}", *args.pytest])
        try:
            code = run.wait(args.seconds)
        except subprocess.TimeoutExpired:
            # As Ctrl-C does: pytest stops its workers and writes the report.
            run.send_signal(signal.SIGINT)
            code = run.wait()
        seconds = time.monotonic() - start
        cases = list(ElementTree.parse(report).iter("testcase"))
    files: dict[str, Counter] = {}
    failed = []
    for case in cases:
        if case.get("classname") is None:
            continue  # the interruption itself
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        files.setdefault(case.get("classname"), Counter())[outcome] += 1
        if outcome in ("failure", "error"):
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    total = sum(files.values(), Counter())
    summary = {
        "environment": environment(),
        "command": " ".join(["pytest", *args.pytest]),
        "seconds": round(seconds),
        "interrupted": code == 2,
        "total": dict(total),
        "files": {name: dict(counts) for name, counts in sorted(files.items())},
        "failed": failed,
    }
    write_json(args.out / "tests.json", summary)
    return code


if __name__ == "__main__":
    sys.exit(main())
