"""As ``blspkd average``: the name that this command had before."""

import sys

from blspkd_fairseq.cli.average import *  # noqa: F403
from blspkd_fairseq.cli.main import run

if __name__ == "__main__":
    sys.exit(run(["average", *sys.argv[1:]]))
