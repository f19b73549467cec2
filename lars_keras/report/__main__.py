"""Write the report of a run folder: `python -m lars_keras.report RUN_DIR` writes `RUN_DIR/report.html`."""

import argparse
import sys
from collections.abc import Sequence

from lars_keras.report.page import write_report


def main(argv: Sequence[str]) -> int:
    """Write the report of the run folder that is the only argument, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lars_keras.report", description="Write the report of a run.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of the run; it gets report.html")
    options = parser.parse_args(argv)
    try:
        print(write_report(options.run_dir))
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
