"""As ``blspkd prepare gigaspeech``: the name that this command had before."""

import sys

from blspkd_fairseq.cli.main import run
from blspkd_fairseq.cli.prepare.gigaspeech import *  # noqa: F403

if __name__ == "__main__":
    sys.exit(run(["prepare", "gigaspeech", *sys.argv[1:]]))
