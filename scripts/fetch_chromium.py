"""Fetches Chromium as Debian packages, which needs apt-get and dpkg but no root, for the tests of the demo's page.

    python scripts/fetch_chromium.py [--cache DIR]

DIR/chromium gets it with the libraries that this machine lacks, and run.sh, which starts it.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from fetch_recordings import FetchError, download, unpack

from blspkd_fairseq.cache import default_cache, locked

RUN = """\
#!/bin/sh
here=$(dirname "$(readlink -f "$0")")/root/usr/lib
export LD_LIBRARY_PATH=$here/x86_64-linux-gnu:$here/x86_64-linux-gnu/pulseaudio
exec "$here/chromium/chromium" "$@"
"""


def fetch(cache: Path) -> Path:
    """Makes sure that Chromium is in ``cache`` and returns what starts it.

    Raises:
        FetchError: a package cannot be had, or Chromium does not start.
    """
    folder = cache / "chromium"
    with locked(cache):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(prefix=".chromium.", dir=cache) as temporary:
                work = Path(temporary)
                names = needed()
                print(f"chromium: downloading {len(names)} packages (about 110 MB)", flush=True)
                (work / "output").mkdir()
                unpack(download(names, work / "download").values(), work / "output" / "root")
                start = work / "output" / "run.sh"
                start.write_text(RUN)
                start.chmod(0o755)
                _check(start)
                (work / "output").rename(folder)
    print(f"{folder} is there", flush=True)
    return folder / "run.sh"


def needed() -> list[str]:
    """Chromium's package, and those of its dependencies that are not installed."""
    command = ["apt-get", "install", "--simulate", "--no-install-recommends", "chromium"]
    done = subprocess.run(command, capture_output=True, text=True)
    names = re.findall(r"^Inst ([a-z0-9.+-]+) ", done.stdout, re.MULTILINE)
    if done.returncode or "chromium" not in names:
        raise FetchError(f"apt-get has no package chromium: {done.stderr.strip() or 'is it installed already?'}")
    return names


def _check(start: Path) -> None:
    done = subprocess.run([str(start), "--version"], capture_output=True, text=True)
    if done.returncode:
        raise FetchError(f"Chromium does not start here: {done.stderr.strip()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="(default: %(default)s)")
    try:
        fetch(parser.parse_args().cache.resolve())
    except (FetchError, OSError) as error:
        print(f"fetch_chromium.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
