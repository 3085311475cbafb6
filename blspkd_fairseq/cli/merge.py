"""One manifest of several: to train on several corpora at once.

    blspkd merge --inputs librispeech/train-*.tsv gigaspeech/train-xl.tsv --output data/train.tsv

Audio paths become absolute, those in conversations, too. Ids stay as they are unless two manifests share one: then all
begin with the number of their manifest, such as 2/. Columns that not all of them have are left out, and named, but for
conversation and teacher_text.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from blspkd_fairseq.data.conversation import ConversationError, with_audio_in
from blspkd_fairseq.data.manifest import REQUIRED_COLUMNS, Manifest, ManifestError, write_manifest


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    try:
        print(f"{args.output}: {merge(args.inputs, args.output)} rows of {len(args.inputs)} manifests")
    except ManifestError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


def merge(inputs: Sequence[Path], output: Path) -> int:
    """Writes the rows of all manifests and returns their number.

    Raises:
        ManifestError: a manifest is missing or wrong, or is itself the output.
    """
    if output.resolve() in {path.resolve() for path in inputs}:
        raise ManifestError(f"{output} is one of the inputs: give the output another name")
    manifests = [Manifest.load(path, REQUIRED_COLUMNS) for path in inputs]
    every = dict.fromkeys(name for one in manifests for name in one.columns)
    columns = [name for name in every if name in _MAY_BE_EMPTY or all(name in one.columns for one in manifests)]
    left_out = sorted({name for one in manifests for name in one.columns} - set(columns))
    if left_out:
        print(f"{output}: columns that not all manifests have are left out: {', '.join(left_out)}")
    ids = [row["id"] for one in manifests for row in one]
    shared = len(set(ids)) < len(ids)
    output.parent.mkdir(parents=True, exist_ok=True)
    return write_manifest(output, _rows(manifests, columns, shared), columns)


_MAY_BE_EMPTY = ("conversation", "teacher_text")
"""Columns that rows of other manifests have, too, as soon as one has them: without them a row would be another."""


def _rows(manifests: Sequence[Manifest], columns: Sequence[str], number_ids: bool) -> Iterator[dict[str, str]]:
    for number, manifest in enumerate(manifests, start=1):
        folder = manifest.path.resolve().parent
        for index, row in enumerate(manifest):
            if row.get("conversation"):
                try:
                    row["conversation"] = with_audio_in(row["conversation"], folder)
                except ConversationError as error:
                    raise ManifestError(f"{manifest.location(index)}: {error}") from error
            if row["audio"]:
                row["audio"] = str(folder / row["audio"])  # an absolute path stays itself
            row["id"] = f"{number}/{row['id']}" if number_ids else row["id"]
            yield {name: row.get(name, "") for name in columns}
