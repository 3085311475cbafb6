"""Makes a folder of a trained model with its card, and puts it on a hub where asked.

What was trained is written (a few MB beside a large LLM), not the base models. With --dry-run nothing is written and
nothing leaves the machine: the files and their sizes are listed, and it need not be said where to.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from blspkd_fairseq.model_card import Card, CardError, write_card

EXAMPLE = """\
blspkd publish checkpoints/checkpoint_best.pt --output my-model --license mit --dataset me/corpus --hours 960 \\
    --metric "WER=LibriSpeech test-clean=3.1"
blspkd publish checkpoints/checkpoint_best.pt --push-to me/my-model --license mit --dry-run
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint, or folder of save_pretrained")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write it there")
    parser.add_argument("--push-to", metavar="OWNER/NAME", help="put it on the hub that huggingface_hub is set to")
    parser.add_argument("--private", action="store_true", help="of a new repository on the hub")
    parser.add_argument("--dry-run", action="store_true", help="list what would be written")
    parser.add_argument("--dtype", default="float16", help="of the weights (default: %(default)s)")
    parser.add_argument("--license", default="", help="such as mit or apache-2.0")
    parser.add_argument("--language", nargs="+", default=["en"], help="codes (default: en)")
    parser.add_argument("--base-model", nargs=2, default=(), metavar=("LLM", "ENCODER"), help="their names on the hub")
    parser.add_argument("--dataset", nargs="+", default=[], help="what it was trained on")
    parser.add_argument("--hours", type=float, default=0.0, help="of speech heard in training")
    parser.add_argument("--metric", action="append", default=[], metavar="METRIC=DATA=VALUE", help="what was measured")
    parser.add_argument("--limits", default="", help="what it cannot do, in sentences")
    parser.add_argument("--audio", type=Path, help="an example to go with it")
    parser.add_argument("--llm", help="where the LLM is now; in place of the model's own path or name")
    parser.add_argument("--speech-encoder", help="where the speech encoder is now")


def main(args: argparse.Namespace) -> int:
    """Writes, lists or pushes."""
    if args.output is None and args.push_to is None and not args.dry_run:
        raise ValueError("say where to: --output FOLDER, --push-to OWNER/NAME, or both (or --dry-run)")
    if args.output is not None and args.output.exists() and any(args.output.iterdir()) and not args.dry_run:
        raise ValueError(f"{args.output} is not empty: choose another folder")
    if args.audio is not None and not args.audio.is_file():
        raise ValueError(f"{args.audio} does not exist: check the path")
    writes = args.output is not None and not args.dry_run
    if writes:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, which then appears whole.
    with tempfile.TemporaryDirectory(prefix=".", dir=args.output.parent if writes else None) as temporary:
        folder = Path(temporary) / "model"
        build(args, folder)
        for path in sorted(folder.iterdir()):
            print(f"{path.name}\t{path.stat().st_size} bytes")
        if args.dry_run:
            return 0
        if args.output is not None:
            folder = folder.rename(args.output)
            print(f"{args.output} is written")
        if args.push_to is not None:
            from blspkd_fairseq.hub import push_folder

            print(push_folder(folder, args.push_to, args.private))
    return 0


def build(args: argparse.Namespace, folder: Path) -> None:
    """The folder as it will be published."""
    import dataclasses

    from blspkd_fairseq.hub import BlspKd, read_options

    name = args.push_to.rpartition("/")[2] if args.push_to else (args.output or Path(args.model)).name
    card = Card(
        name=name.removesuffix(".pt"),
        licence=args.license,
        languages=args.language,
        base_models=args.base_model,
        datasets=args.dataset,
        hours=args.hours,
        metrics=[read_metric(one) for one in args.metric],
        limits=args.limits,
        example=args.audio.name if args.audio is not None else "",
    )
    write_card(card, read_options(args.model))  # what is missing is said before a model is loaded
    given = {"llm": args.llm, "speech_encoder": args.speech_encoder}
    model = BlspKd.from_pretrained(args.model, "cpu", **{key: value for key, value in given.items() if value})
    if args.base_model:
        model.config = dataclasses.replace(model.config, llm=args.base_model[0], speech_encoder=args.base_model[1])
    model.save_pretrained(folder, args.dtype)
    (folder / "README.md").write_text(write_card(card, dataclasses.asdict(model.config)), encoding="utf-8")
    if args.audio is not None:
        if (folder / args.audio.name).exists():
            raise CardError(f"--audio {args.audio} has the name of a file of the model: give it another")
        shutil.copy(args.audio, folder / args.audio.name)


def read_metric(text: str) -> tuple[str, str, float]:
    """``METRIC=DATA=VALUE``.

    Raises:
        CardError: it is not that.
    """
    parts = [part.strip() for part in text.split("=")]
    try:
        metric, dataset, value = parts
        return metric, dataset, float(value)
    except ValueError as error:
        raise CardError(f"--metric {text} is not of the form METRIC=DATA=VALUE, such as WER=my test set=3.1") from error
