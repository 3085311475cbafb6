"""As ``blspkd prepare covost2``: the name that this command had before."""

import sys

from blspkd_fairseq.cli.main import run
from blspkd_fairseq.cli.prepare.covost2 import *  # noqa: F403

if __name__ == "__main__":
    sys.exit(run(["prepare", "covost2", *sys.argv[1:]]))
