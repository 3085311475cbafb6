"""As ``blspkd prepare list``: the name that this command had before."""

import sys

from blspkd_fairseq.cli.main import run
from blspkd_fairseq.cli.prepare.listed import *  # noqa: F403

if __name__ == "__main__":
    sys.exit(run(["prepare", "list", *sys.argv[1:]]))
