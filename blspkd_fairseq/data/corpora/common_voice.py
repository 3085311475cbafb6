"""Common Voice: LANG/clips/*.mp3 and LANG/train.tsv, dev.tsv, ..."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from blspkd_fairseq.data.corpora.items import NO_CLIP, CorpusError, Dropped, Entry, Item
from blspkd_fairseq.data.corpora.tables import read_table
from blspkd_fairseq.data.languages import is_same_language


def common_voice_folder(root: Path, lang: str) -> Path:
    """The folder of a language: ``root`` or ``root/lang``.

    Raises:
        CorpusError: neither holds clips.
    """
    for folder in (root / lang, root):
        if (folder / "clips").is_dir() and next(folder.glob("*.tsv"), None) is not None:
            return folder
    raise CorpusError(
        f"{root} is no Common Voice of {lang}: expected clips/ and TSV files such as train.tsv and validated.tsv in "
        f"it or in {root / lang}"
    )


def read_common_voice(root: Path, lang: str, split: str, unescape: bool = False) -> Iterator[Item]:
    """Utterances of ``<split>.tsv`` (train, dev, test, validated, other), in its order.

    Raises:
        CorpusError: another layout.
    """
    folder = common_voice_folder(root, lang)
    table = folder / f"{split}.tsv"
    if not table.is_file():
        found = ", ".join(sorted(path.stem for path in folder.glob("*.tsv")))
        raise CorpusError(f"{folder} has no {split}.tsv: there are {found}")
    seconds = clip_seconds(folder)
    check_folder(folder, lang)
    for row in read_table(table, ("client_id", "path", "sentence"), unescape):
        if isinstance(row, Dropped):
            yield row
        else:
            check_locale(table, row, lang)
            yield clip(folder, row, row["sentence"], None, (lang, ""), seconds)


def check_folder(folder: Path, lang: str) -> None:
    """Early releases do not say the language of a clip, but lie in folders such as ``cv-corpus-4/fr``.

    Raises:
        CorpusError: the folder is another language's.
    """
    if folder.parent.name.startswith("cv-corpus") and not is_same_language(folder.name, lang):
        raise CorpusError(
            f"{folder} is Common Voice of {folder.name} and not of {lang}: give the language of its clips"
        )


def check_locale(table: Path, row: Mapping[str, str], lang: str) -> None:
    """Compares Common Voice's own column with the language that was asked for.

    Raises:
        CorpusError: it is another one.
    """
    locale = row.get("locale", "")
    if locale.strip() and not is_same_language(locale, lang):
        raise CorpusError(
            f"{table} says that the language of {row['path']} is {locale}, and not {lang}: give the language of its "
            "clips"
        )


def clip(
    folder: Path,
    row: Mapping[str, str],
    text: str,
    translation: str | None,
    langs: tuple[str, str],
    seconds: Mapping[str, float],
) -> Item:
    name = row["path"] if Path(row["path"]).suffix else f"{row['path']}.mp3"
    if not row["path"].strip():
        return Dropped(f"{folder.name}: {text[:40]}", NO_CLIP, "the row names no clip")
    speaker = row.get("client_id", "")
    declared = seconds.get(Path(name).name)
    return Entry(
        name.removesuffix(".mp3"),
        folder / "clips" / name,
        text,
        translation,
        speaker,
        *langs,
        declared_seconds=declared,
    )


def clip_seconds(folder: Path) -> dict[str, float]:
    """Lengths of the clips by name, which newer releases publish."""
    path = folder / "clip_durations.tsv"
    if not path.is_file():
        return {}
    seconds = {}
    for row in read_table(path, ("clip",)):
        if isinstance(row, dict):
            value = next((cell for column, cell in row.items() if column.startswith("duration")), "")
            if value.replace(".", "", 1).isdecimal():
                seconds[row["clip"]] = float(value) / 1000
    return seconds
