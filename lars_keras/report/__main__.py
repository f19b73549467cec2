"""Write the report of a run folder: `python -m lars_keras.report RUN_DIR` writes `RUN_DIR/report.html`."""

import sys
from collections.abc import Sequence

from lars_keras.report.page import write_report


def main(argv: Sequence[str]) -> int:
    """Write the report of the run folder that is the only argument, and return the exit code."""
    if len(argv) != 1:
        print("usage: python -m lars_keras.report RUN_DIR", file=sys.stderr)
        return 2
    try:
        print(write_report(argv[0]))
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
