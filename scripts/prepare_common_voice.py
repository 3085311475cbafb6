"""As ``blspkd prepare common-voice``: the name that this command had before."""

import sys

from blspkd_fairseq.cli.main import run
from blspkd_fairseq.cli.prepare.common_voice import *  # noqa: F403

if __name__ == "__main__":
    sys.exit(run(["prepare", "common-voice", *sys.argv[1:]]))
