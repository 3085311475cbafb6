"""As ``blspkd merge``: the name that this command had before."""

import sys

from blspkd_fairseq.cli.main import run
from blspkd_fairseq.cli.merge import *  # noqa: F403

if __name__ == "__main__":
    sys.exit(run(["merge", *sys.argv[1:]]))
