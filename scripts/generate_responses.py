"""As ``blspkd responses``: the name that this command had before."""

import sys

from blspkd_fairseq.cli.main import run
from blspkd_fairseq.cli.responses import *  # noqa: F403

if __name__ == "__main__":
    sys.exit(run(["responses", *sys.argv[1:]]))
