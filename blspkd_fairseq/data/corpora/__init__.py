r"""Readers of corpora, a file for each: where their audio lies and what was said in it.

A reader goes through one split of a corpus in the order of its files and gives an :class:`Entry` for every utterance
and a :class:`Dropped` for every row that names none. Text is taken to the character: cells of TSV files are raw, as
Common Voice and CoVoST 2 publish them (quotes mean nothing; their writer puts a backslash before a backslash or a tab
inside a cell, which ``unescape`` undoes). Lists of one's own may be quoted. A byte order mark, CRLF line ends and
UTF-16 are tolerated.
"""

from blspkd_fairseq.data.corpora.common_voice import common_voice_folder, read_common_voice
from blspkd_fairseq.data.corpora.covost2 import EN_TO_X, X_TO_EN, check_direction, read_covost2
from blspkd_fairseq.data.corpora.gigaspeech import punctuate, read_gigaspeech
from blspkd_fairseq.data.corpora.items import MALFORMED, NO_CLIP, NO_SPEECH, CorpusError, Dropped, Entry, Item
from blspkd_fairseq.data.corpora.librispeech import librispeech_subsets, read_librispeech
from blspkd_fairseq.data.corpora.listed import IMPORT_COLUMNS, read_listed
from blspkd_fairseq.data.corpora.tables import QUOTES, read_table

__all__ = [
    "EN_TO_X",
    "IMPORT_COLUMNS",
    "MALFORMED",
    "NO_CLIP",
    "NO_SPEECH",
    "QUOTES",
    "X_TO_EN",
    "CorpusError",
    "Dropped",
    "Entry",
    "Item",
    "check_direction",
    "common_voice_folder",
    "librispeech_subsets",
    "punctuate",
    "read_common_voice",
    "read_covost2",
    "read_gigaspeech",
    "read_librispeech",
    "read_listed",
    "read_table",
]
