"""What scripts/venv.sh installs, and in which versions. Needs nothing but the standard library.

python scripts/pins.py needs [EXTRAS]  the requirements of the package and of EXTRAS (comma-separated)
python scripts/pins.py constraints     scripts/constraints.txt, made to fit the torch that is installed
python scripts/pins.py renew           writes the versions that are installed into scripts/constraints.txt
"""

from __future__ import annotations

import re
import runpy
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "scripts" / "constraints.txt"
HEADER = """\
# The versions that the tests passed with, of all that scripts/venv.sh installs. Written by `scripts/venv.sh --latest`.
# Left out are nvidia-*, cuda-* and triton, which a CUDA build of torch brings and requires in exact versions itself.
"""

Pins = dict[str, str]  # name: version

_OWN = {"blspkd-fairseq", "pip"}
_BROUGHT_BY_TORCH = ("nvidia-", "cuda-", "triton")
_LINE = re.compile(r'(?P<name>[\w.-]+)==(?P<version>[\w.]+)( ; python_version == "(?P<python>[\d.]+)")?')


def main() -> None:
    command, *arguments = sys.argv[1:]
    if command == "needs":
        print("\n".join(needs(*arguments)))
    elif command == "constraints":
        print("\n".join(fitting(FILE.read_text().splitlines(), *installed_torch())))
    elif command == "renew":
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        FILE.write_text(render({**parse(FILE.read_text().splitlines()), python: installed()}))


def needs(extras: str = "") -> list[str]:
    """Requirements without fairseq, whose own stand here: it asks for torchaudio, too, which nothing uses.

    Raises:
        SystemExit: there is no such extra.
    """
    listed = runpy.run_path(str(ROOT / "blspkd_fairseq" / "requirements.py"))
    unknown = sorted(set(filter(None, extras.split(","))) - set(listed["EXTRAS"]))
    if unknown:
        sys.exit(f"there is no extra {', '.join(unknown)}: choose from {', '.join(listed['EXTRAS'])}")
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    own = [one for one in listed["REQUIRED"] if name_of(one) != listed["FAIRSEQ_NAME"]]
    chosen = [one for extra in extras.split(",") for one in listed["EXTRAS"].get(extra, [])]
    return [*own, *listed["FAIRSEQ_NEEDS"], *chosen, *build]


def installed_torch() -> tuple[str, list[str]]:
    """Its version and requirements; "" and none where it is not installed yet."""
    try:
        torch = metadata.distribution("torch")
    except metadata.PackageNotFoundError:
        return "", []
    return torch.version, torch.requires or []


def fitting(lines: Iterable[str], torch: str, torch_needs: Iterable[str]) -> list[str]:
    """The constraints, but for torch and, where another version of it is installed, what that requires."""
    lines = [line for line in lines if not line.startswith("#")]
    free = {"torch"}
    if not any(re.match(rf"torch=={re.escape(torch.partition('+')[0])}( |$)", line) for line in lines):
        free |= {name_of(one) for one in torch_needs}
    kept = [f"torch=={torch}"] if torch else []
    return kept + [line for line in lines if name_of(line) not in free]


def name_of(requirement: str) -> str:
    """ "Ray[data]>=2" -> "ray"."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def installed() -> Pins:
    """What this Python has, without what is not for the list."""
    found = {name_of(one.metadata["Name"]): one.version.partition("+")[0] for one in metadata.distributions()}
    return {name: found[name] for name in found if name not in _OWN and not name.startswith(_BROUGHT_BY_TORCH)}


def parse(lines: Iterable[str]) -> dict[str, Pins]:
    """The versions for each Python."""
    pins: dict[str, Pins] = {"3.11": {}, "3.12": {}}
    for match in filter(None, map(_LINE.fullmatch, lines)):
        for python in [match["python"]] if match["python"] else pins:
            pins[python][match["name"]] = match["version"]
    return pins


def render(pins: dict[str, Pins]) -> str:
    """The text of the file: a line for all Pythons where they have the same version, else one for each."""
    lines = []
    for name in sorted(set().union(*pins.values())):
        versions = {python: pins[python][name] for python in sorted(pins) if name in pins[python]}
        if len(versions) == len(pins) and len(set(versions.values())) == 1:
            lines.append(f"{name}=={versions.popitem()[1]}")
        else:
            lines += [f'{name}=={version} ; python_version == "{python}"' for python, version in versions.items()]
    return HEADER + "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    main()
