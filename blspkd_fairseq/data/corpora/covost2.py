"""CoVoST 2: translations of Common Voice 4."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from blspkd_fairseq.data.corpora.common_voice import check_folder, check_locale, clip, clip_seconds, common_voice_folder
from blspkd_fairseq.data.corpora.items import NO_CLIP, CorpusError, Dropped, Item
from blspkd_fairseq.data.corpora.tables import read_table

# fmt: off
X_TO_EN = (
    "fr", "de", "es", "ca", "it", "ru", "zh-CN", "pt", "fa", "et", "mn", "nl", "tr", "ar", "sv-SE", "lv", "sl", "ta",
    "ja", "id", "cy",
)
EN_TO_X = (
    "de", "tr", "fa", "sv-SE", "mn", "zh-CN", "cy", "ca", "sl", "et", "id", "ar", "ta", "lv", "ja",
)
# fmt: on


def check_direction(src_lang: str, tgt_lang: str) -> None:
    """Raises a CorpusError, with the list, unless CoVoST 2 has this direction."""
    if (tgt_lang == "en" and src_lang in X_TO_EN) or (src_lang == "en" and tgt_lang in EN_TO_X):
        return
    raise CorpusError(
        f"CoVoST 2 has no direction {src_lang}_{tgt_lang}: from {', '.join(X_TO_EN)} into en, and from en into "
        f"{', '.join(EN_TO_X)}"
    )


def read_covost2(
    root: Path,
    src_lang: str,
    tgt_lang: str,
    split: str,
    translations: Path | None = None,
    unescape: bool = False,
) -> Iterator[Item]:
    """Utterances of a split (train, dev, test) of a direction.

    Takes ``covost_v2.<src>_<tgt>.<split>.tsv`` (path, sentence, translation, client_id) in its order where it exists.
    Otherwise joins the published ``covost_v2.<src>_<tgt>.tsv`` (path, translation, split) with Common Voice's
    ``validated.tsv`` on the path, in the order of the latter; translations that it lacks come last, as dropped.

    Args:
        root: Common Voice 4, or the folder of its source language.
        translations: folder of the translations; default: the Common Voice folder.

    Raises:
        CorpusError: another layout.
    """
    folder = common_voice_folder(root, src_lang)
    check_folder(folder, src_lang)
    places = [translations] if translations else [folder, root]
    name = f"covost_v2.{src_lang}_{tgt_lang}"
    files = [place / f"{name}{ending}" for ending in (f".{split}.tsv", ".tsv") for place in places]
    table = next((path for path in files if path.is_file()), None)
    if table is None:
        raise CorpusError(
            f"no translations in {' or '.join(map(str, places))}: expected {name}.tsv (with the columns path, "
            f"translation, split) or {name}.{split}.tsv there"
        )
    langs, seconds = (src_lang, tgt_lang), clip_seconds(folder)
    if table.name == f"{name}.tsv":
        yield from _join_covost2(folder, table, split, langs, unescape, seconds)
        return
    for row in read_table(table, ("path", "sentence", "translation"), unescape):
        if isinstance(row, Dropped):
            yield row
        else:
            yield clip(folder, row, row["sentence"], row["translation"], langs, seconds)


def _join_covost2(
    folder: Path, table: Path, split: str, langs: tuple[str, str], unescape: bool, seconds: Mapping[str, float]
) -> Iterator[Item]:
    wanted: dict[str, str] = {}
    for row in read_table(table, ("path", "translation", "split"), unescape):
        if isinstance(row, Dropped):
            yield row
        # "train_covost" marks what Common Voice itself does not use for training.
        elif row["split"] == split or (split == "train" and row["split"] == "train_covost"):
            wanted[row["path"]] = row["translation"]
    for row in read_table(folder / "validated.tsv", ("client_id", "path", "sentence"), unescape):
        if isinstance(row, Dropped):
            continue  # of another split, for all that is known; if not, its translation is left over below
        translation = wanted.pop(row["path"], None)
        if translation is not None:
            check_locale(folder / "validated.tsv", row, langs[0])
            yield clip(folder, row, row["sentence"], translation, langs, seconds)
    for path in wanted:
        yield Dropped(path.removesuffix(".mp3"), NO_CLIP, f"{table.name} has it, but validated.tsv does not")
