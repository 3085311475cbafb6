"""One language, however it is written: ISO 639-1, 639-2 or 639-3, BCP 47, FLORES, or its English name."""

from __future__ import annotations

import logging
import re
from functools import cache
from typing import NamedTuple

logger = logging.getLogger(__name__)

# Those of Whisper, Common Voice's CoVoST 2 and FLORES-200. A line: all codes, the one to use first (ISO 639-1 where
# there is one; then 639-2, 639-3, what FLORES takes for the language, deprecated ones); its English names.
_TABLE = """
ace: Acehnese
acm: Mesopotamian Arabic
acq: Ta'izzi-Adeni Arabic
aeb: Tunisian Arabic
af afr: Afrikaans
ajp: South Levantine Arabic
ak aka: Akan
am amh: Amharic
apc: North Levantine Arabic, Levantine Arabic
ar ara arb: Arabic, Modern Standard Arabic, Standard Arabic
ars: Najdi Arabic
ary: Moroccan Arabic
arz: Egyptian Arabic
as asm: Assamese
ast: Asturian
awa: Awadhi
ay aym ayr: Aymara, Central Aymara
az aze azj: Azerbaijani, North Azerbaijani
azb: South Azerbaijani
ba bak: Bashkir
ban: Balinese
be bel: Belarusian
bem: Bemba
bg bul: Bulgarian
bho: Bhojpuri
bjn: Banjar
bm bam: Bambara
bn ben: Bengali, Bangla
bo bod tib: Tibetan, Standard Tibetan
br bre: Breton
bs bos: Bosnian
bug: Buginese
ca cat: Catalan, Valencian
ceb: Cebuano
cjk: Chokwe
ckb: Central Kurdish, Sorani
crh: Crimean Tatar
cs ces cze: Czech
cv chv: Chuvash
cy cym wel: Welsh
da dan: Danish
de deu ger: German
din dik: Dinka, Southwestern Dinka
dyu: Dyula
dz dzo: Dzongkha
ee ewe: Ewe
el ell gre: Greek, Modern Greek
en eng: English
eo epo: Esperanto
es spa: Spanish, Castilian
et est ekk: Estonian
eu eus baq: Basque
fa fas per pes: Persian, Farsi, Western Persian
ff ful fuv: Fulah, Nigerian Fulfulde
fi fin: Finnish
fj fij: Fijian
fo fao: Faroese
fon: Fon
fr fra fre: French
fur: Friulian
fy fry: Western Frisian, Frisian
ga gle: Irish
gd gla: Scottish Gaelic
gl glg: Galician
gn grn: Guarani
gu guj: Gujarati
ha hau: Hausa
haw: Hawaiian
he heb iw: Hebrew
hi hin: Hindi
hne: Chhattisgarhi
hr hrv: Croatian
ht hat: Haitian Creole, Haitian
hu hun: Hungarian
hy hye arm: Armenian
id ind in: Indonesian
ig ibo: Igbo
ilo: Ilocano
is isl ice: Icelandic
it ita: Italian
ja jpn: Japanese
jv jav jw: Javanese
ka kat geo: Georgian
kab: Kabyle
kac: Jingpho
kam: Kamba
kbp: Kabiye
kea: Kabuverdianu
kg kon: Kikongo
ki kik: Kikuyu
kk kaz: Kazakh
km khm: Khmer
kmb: Kimbundu
kn kan: Kannada
ko kor: Korean
kr kau knc: Kanuri, Central Kanuri
ks kas: Kashmiri
ku kur kmr: Kurdish, Northern Kurdish, Kurmanji
ky kir: Kyrgyz
la lat: Latin
lb ltz: Luxembourgish, Letzeburgesch
lg lug: Ganda, Luganda
li lim: Limburgish
lij: Ligurian
lmo: Lombard
ln lin: Lingala
lo lao: Lao
lt lit: Lithuanian
ltg: Latgalian
lua: Luba-Kasai
luo: Luo
lus: Mizo
lv lav lvs: Latvian, Standard Latvian
mag: Magahi
mai: Maithili
mg mlg plt: Malagasy, Plateau Malagasy
mi mri mao: Maori, Māori
min: Minangkabau
mk mkd mac: Macedonian
ml mal: Malayalam
mn mon khk: Mongolian, Halh Mongolian
mni: Meitei, Manipuri
mos: Mossi
mr mar: Marathi
ms msa may zsm: Malay, Standard Malay
mt mlt: Maltese
my mya bur: Burmese, Myanmar
ne nep npi: Nepali
nl nld dut: Dutch, Flemish
nn nno: Norwegian Nynorsk, Nynorsk
no nor nb nob: Norwegian, Norwegian Bokmål, Norwegian Bokmal, Bokmål
nso: Northern Sotho
nus: Nuer
ny nya: Nyanja, Chichewa
oc oci: Occitan
om orm gaz: Oromo, West Central Oromo
or ori ory: Odia, Oriya
pa pan: Punjabi, Panjabi, Eastern Panjabi
pag: Pangasinan
pap: Papiamento
pl pol: Polish
prs: Dari
ps pus pbt: Pashto, Pushto, Southern Pashto
pt por: Portuguese
qu que quy: Quechua, Ayacucho Quechua
rn run: Rundi
ro ron rum mo: Romanian, Moldavian, Moldovan
ru rus: Russian
rw kin: Kinyarwanda
sa san: Sanskrit
sat: Santali
sc srd: Sardinian
scn: Sicilian
sd snd: Sindhi
sg sag: Sango
shn: Shan
si sin: Sinhala, Sinhalese
sk slk slo: Slovak
sl slv: Slovenian, Slovene
sm smo: Samoan
sn sna: Shona
so som: Somali
sq sqi alb als: Albanian, Tosk Albanian
sr srp: Serbian
ss ssw: Swati
st sot: Southern Sotho
su sun: Sundanese
sv swe: Swedish
sw swa swh: Swahili
szl: Silesian
ta tam: Tamil
taq: Tamasheq
te tel: Telugu
tg tgk: Tajik
th tha: Thai
ti tir: Tigrinya
tk tuk: Turkmen
tl tgl fil: Tagalog, Filipino
tn tsn: Tswana
tpi: Tok Pisin
tr tur: Turkish
ts tso: Tsonga
tt tat: Tatar
tum: Tumbuka
tw twi: Twi
tzm: Central Atlas Tamazight
ug uig: Uyghur
uk ukr: Ukrainian
umb: Umbundu
ur urd: Urdu
uz uzb uzn: Uzbek, Northern Uzbek
vec: Venetian
vi vie: Vietnamese
war: Waray
wo wol: Wolof
xh xho: Xhosa
yi yid ydd ji: Yiddish, Eastern Yiddish
yo yor: Yoruba
yue: Cantonese, Yue Chinese
zh zho chi cmn: Chinese, Mandarin, Mandarin Chinese
zu zul: Zulu
"""

# Of BCP 47, POSIX (en_US.UTF-8) and FLORES (zho_Hans): a code, then subtags.
_TAG = re.compile(r"([a-z]{2,3})((?:[-_][a-z0-9]{1,8})*)(?:[.@][\w.@-]*)?")
# Kinds of a language, not languages: "Simplified Chinese", "Brazilian Portuguese".
_KINDS = re.compile(
    r"^(simplified|traditional|american|british|indian|australian|canadian|brazilian|european|mexican|swiss|austrian|"
    r"latin american)\s+"
)


class Language(NamedTuple):
    """A language. Attributes: ``code`` (ISO 639-1, or 639-3 where there is none), ``name`` in English."""

    code: str
    name: str


def _read_table() -> tuple[dict[str, Language], dict[str, Language]]:
    by_code: dict[str, Language] = {}
    by_name: dict[str, Language] = {}
    for line in _TABLE.strip().splitlines():
        codes, names = (part.split(separator) for part, separator in zip(line.split(": "), (" ", ", "), strict=True))
        language = Language(codes[0], names[0])
        by_code |= dict.fromkeys(codes, language)
        by_name |= dict.fromkeys(map(str.casefold, names), language)
    return by_code, by_name


_BY_CODE, _BY_NAME = _read_table()
LANGUAGES = {language.code: language.name for language in _BY_CODE.values()}
"""English names by code."""


@cache
def find_language(text: str) -> Language | None:
    """The language that a code or an English name means, whatever its script or region; None if it is unknown.

    ``zh``, ``zho``, ``chi``, ``cmn``, ``zh-Hant-TW``, ``zh_CN``, ``zho_Hans``, ``Chinese``, ``Simplified Chinese`` and
    ``Chinese (Traditional)`` are one; ``yue``, ``zh-yue`` and ``Cantonese`` another.
    """
    plain = " ".join(text.casefold().split())
    tag = _TAG.fullmatch(plain)
    if tag:
        subtags = re.split("[-_]", tag[2])[1:]
        # BCP 47's extended language subtag: the second one, of three letters, as in zh-yue.
        extended = _BY_CODE.get(subtags[0]) if subtags and re.fullmatch("[a-z]{3}", subtags[0]) else None
        return extended or _BY_CODE.get(tag[1])
    name = re.sub(r"\s*\(.*\)$", "", plain)
    return _BY_NAME.get(name) or _BY_NAME.get(_KINDS.sub("", name))


def looks_like_code(text: str) -> bool:
    """Whether a text that names a language is meant to be a code and not a name."""
    return _TAG.fullmatch(text.strip().casefold()) is not None


def is_same_language(one: str, other: str) -> bool:
    """Whether two texts mean one language; unknown ones are compared as they are."""
    return language_key(one) == language_key(other)


def language_key(text: str) -> str:
    """The code of a language, or, of one that is unknown, the text without case and outer spaces."""
    language = find_language(text)
    return language.code if language else text.strip().casefold()


def code_of(text: str, effect: str) -> str:
    """The code of a language, "" for none or an unknown one, which is said.

    Args:
        text: code or name.
        effect: what an unknown language means for the caller, for the warning.
    """
    language = find_language(text)
    if language is None and text.strip():
        _warn_unknown(text.strip(), effect)
    return language.code if language else ""


@cache
def _warn_unknown(text: str, effect: str) -> None:
    """Once for each."""
    logger.warning(
        f"{text!r} is no language that is known here, by code (ISO 639, BCP 47, FLORES) or English name: {effect}"
    )
