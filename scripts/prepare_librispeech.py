"""As ``blspkd prepare librispeech``: the name that this command had before."""

import sys

from blspkd_fairseq.cli.main import run
from blspkd_fairseq.cli.prepare.librispeech import *  # noqa: F403

if __name__ == "__main__":
    sys.exit(run(["prepare", "librispeech", *sys.argv[1:]]))
