"""Installs blspkd-fairseq; versions of the package and of what it needs stand in blspkd_fairseq/."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# Run, not imported: importing the package would need what this file is about to install.
VERSION = runpy.run_path(str(ROOT / "blspkd_fairseq" / "version.py"))
NEEDS = runpy.run_path(str(ROOT / "blspkd_fairseq" / "requirements.py"))
README = ROOT / "README.md"

# With fairseq, pip brings a torchaudio that cannot be loaded beside every torch. There transformers fails, in programs
# that have nothing to do with this package, too. A .pth file is run when Python starts.
GUARD = "_blspkd_torchaudio"


class BuildWithGuard(build_py):
    """Puts the guard of transformers beside the package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # of scripts/venv.sh, which installs no torchaudio
            return
        source = ROOT / "blspkd_fairseq" / "compat" / "torchaudio.py"
        Path(self.build_lib, f"{GUARD}.py").write_bytes(source.read_bytes())
        Path(self.build_lib, f"{GUARD}.pth").write_text(f"import {GUARD}; {GUARD}.guard_transformers()\n")


setup(
    name="blspkd-fairseq",
    version=VERSION["__version__"],
    description="BLSP-KD for fairseq: teaches a text chat LLM to hear by distilling it from itself",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    packages=find_packages(include=["blspkd_fairseq", "blspkd_fairseq.*"]),
    package_data={"blspkd_fairseq": ["pretrained/*/*", "demo/static/*"]},
    entry_points={"console_scripts": ["blspkd = blspkd_fairseq.cli.main:run"]},
    python_requires=NEEDS["PYTHON"],
    cmdclass={"build_py": BuildWithGuard},
    install_requires=NEEDS["REQUIRED"],
    extras_require=NEEDS["EXTRAS"],
)
