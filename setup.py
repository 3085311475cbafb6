"""Installs blspkd-fairseq; versions of the package and of what it needs stand in blspkd_fairseq/."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
# Run, not imported: importing the package would need what this file is about to install.
VERSION = runpy.run_path(str(ROOT / "blspkd_fairseq" / "version.py"))
NEEDS = runpy.run_path(str(ROOT / "blspkd_fairseq" / "requirements.py"))
README = ROOT / "README.md"

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
    install_requires=NEEDS["REQUIRED"],
    extras_require=NEEDS["EXTRAS"],
)
