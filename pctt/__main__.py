"""`pctt`, and `python -m pctt`: the command line, with torch's threads told to sleep while they wait.

OpenMP's threads wait in a loop by default. On a machine whose cores other programs want too, such a loop
keeps the thread that it waits for from running, and a training batch takes 20 to 50 times as long as it
should (docs/results/speed.md). OpenMP reads this setting when torch is loaded, so it is made before that; one
that is there already stays.
"""

import os
import sys


def main() -> int:
    """Runs one command and returns its exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from pctt.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
