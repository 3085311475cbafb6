"""``python -m blspkd_fairseq`` is ``blspkd``."""

import sys

from blspkd_fairseq.cli.main import run

if __name__ == "__main__":
    sys.exit(run())
