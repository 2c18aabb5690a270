"""`pctt`, and `python -m pctt`: the command line, with torch's threads told not to wait in a loop for long.

GNU's OpenMP, which torch's wheels for Linux bring, has a thread that waits look 300,000 times before it
sleeps. On a machine whose cores other programs want too, such a loop keeps the thread that it waits for from
running, and a training batch takes tens of times as long as it should. A thirtieth of it costs nothing that
can be measured on a quiet machine, and avoids that (docs/results/speed.md). OpenMP reads the setting when
torch is loaded, so it is made before that; what a user has set stays.
"""

import os
import sys


def main() -> int:
    """Runs one command and returns its exit code."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"
    from pctt.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
