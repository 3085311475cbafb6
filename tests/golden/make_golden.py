"""Makes what later releases must still load, tests/golden/VERSION: tiny base models, a checkpoint and a saved model.

    PYTHONPATH=.:tests python tests/golden/make_golden.py

Run once for each release, before its version is raised, and committed; never made again.
"""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from commands import fairseq, train
from tiny import save_llm, save_whisper, write_speech, write_split

from blspkd_fairseq import BlspKd, __version__
from blspkd_fairseq.checkpoint_files import read_checkpoint, write_checkpoint

FOLDER = Path(__file__).parent
INSTRUCTIONS = ("chat", "repeat", "Say it again: {speech}")


def answers(model: BlspKd, folder: Path) -> dict[str, list[str]]:
    """Greedy and beam answers to two noises."""
    audio = [folder / f"{i}.wav" for i in range(2)]
    for i, path in enumerate(audio):
        write_speech(path, 0.7 + 0.5 * i, seed=10 + i)
    given = {name: model.generate(audio, name, max_new_tokens=6) for name in INSTRUCTIONS}
    return given | {"beam": model.generate(audio, max_new_tokens=4, beam=3)}


def figures(checkpoint: Path, base: Path, folder: Path) -> dict[str, float]:
    """What fairseq-validate says of five utterances."""
    write_split(folder, "valid", 5)
    overrides: dict[str, Any] = {name: str(base / name) for name in ("llm", "speech_encoder")}
    log = fairseq(
        "validate", folder, "--path", checkpoint, "--valid-subset", "valid", "--batch-size", 5, "--log-format", "json",
        "--model-overrides", repr(overrides),
    )  # fmt: skip
    line = next(line for line in log.splitlines() if '"valid_loss"' in line)
    found = json.loads(line[line.index("{") :])
    names = ("loss", "response_kl", "input_kl", "response_agreement", "input_agreement", "token_count_error")
    return {name: float(found[f"valid_{name}"]) for name in names}


def main() -> None:
    golden = FOLDER / __version__
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):  # relative paths: no machine's names
        llm = save_llm(Path("llm"), hidden=16, layers=1)
        encoder = save_whisper(Path("speech_encoder"), width=8)
        write_split(Path("data"), "train", 8)
        options = ("--max-update", 3, "--disable-validation", "--no-epoch-checkpoints", "--lr", 0.01)
        train(Path("data"), Path("save"), llm, encoder, *options)
        state = read_checkpoint(Path("save/checkpoint_last.pt"))
        state["cfg"]["common"]["user_dir"] = "blspkd_fairseq"
        write_checkpoint(state, Path("checkpoint.pt"))
        BlspKd.from_pretrained("checkpoint.pt", device="cpu").save_pretrained("saved")
        expected = {
            "torch": torch.__version__,
            "answers": answers(BlspKd.from_pretrained("saved", device="cpu"), Path("data")),
            "figures": figures(Path("checkpoint.pt"), Path("."), Path("data")),
        }
        golden.mkdir()
        for name in ("llm", "speech_encoder", "saved"):
            shutil.copytree(name, golden / name)
        shutil.copy("checkpoint.pt", golden)
        (golden / "expected.json").write_text(json.dumps(expected, indent=2) + os.linesep)


if __name__ == "__main__":
    main()
