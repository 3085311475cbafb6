"""The rows of the comparison: each system is a set of options of ``fairseq-train``, and the claims of the papers."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """One trained system.

    Attributes:
        title: what stands in the table.
        options: of ``fairseq-train``, beside those that all share.
        start: the row whose checkpoint it goes on from, or "".
        share: of the training time that the row spends itself; with that of ``start`` it is 1, above it for X-OPD.
        transcripts: trained on transcripts alone, without responses.
        data_divisor: 4 trains on the first quarter of the training set.
        rate_of: of rows that begin from scratch, the row on which their learning rate was searched.
        on_policy: trained on its own roll-outs.
        trains_encoder: so that the encoder's frames cannot be kept.
        responses: what the responses that it learns answer, or "" for the usual ones.
        like: the row that this one is again, but for as long as ``as_long_as`` trained.
        as_long_as: a row whose training time it has, or "".
    """

    title: str
    options: str
    start: str = ""
    share: float = 1.0
    transcripts: bool = False
    data_divisor: int = 1
    rate_of: str = "kl"
    on_policy: bool = False
    trains_encoder: bool = False
    responses: str = ""
    like: str = ""
    as_long_as: str = ""


class Table(NamedTuple):
    """Everything that is trained and compared.

    Attributes:
        rows: by name.
        untrained: titles of the systems without training.
        main: rows that all seeds train; the others have the first seed.
        last: rows that come when all others are done.
        hidden: rows that are trained for others only.
        rates: learning rates, in rising order, that are tried on a row.
        searched: the row on which the rate of a row is searched.
        widest: how many more rates are tried where the best is at the edge.
    """

    rows: Mapping[str, Row]
    untrained: Mapping[str, str]
    main: Sequence[str]
    last: Sequence[str]
    hidden: Sequence[str]
    rates: Mapping[str, tuple[float, ...]]
    searched: Callable[[str], str]
    widest: int = 0


CNN = "--adapter cnn --input-kl-weight 0"
CE = "--response-ce-weight 1 --response-kl-weight 0 --input-kl-weight 0"
_RESPONSE = "--input-kl-weight 0"
FROZEN = "--lora-scope none"
_UNFROZEN = "--lora-scope speech --unfreeze-speech-encoder"
WARM_UP = "--token-ce-weight 1 --token-mse-weight 1 --response-kl-weight 0 --input-kl-weight 0 --token-vocabulary train"
_DEEP = "--adapter-pre-layers 2 --adapter-post-layers 2"
_SMALL = "--lora-rank 4"
_ON_POLICY = (
    "--criterion on_policy_distillation --lora-scope speech --rollouts 2 --rollout-max-tokens 16"
    " --adapter-dropout 0 --lora-dropout 0"  # as in the roll-outs
)

ROWS: dict[str, Row] = {
    "blsp": Row("BLSP: CNN, cross-entropy", f"{CNN} {CE} {FROZEN}", rate_of="blsp"),
    "cnn_kl": Row("CNN, response KL", f"{CNN} {FROZEN}", rate_of="cnn_kl"),
    "cnn_kl_ce": Row("CNN, response KL + cross-entropy", f"{CNN} --response-ce-weight 1 {FROZEN}", rate_of="blsp"),
    "cnn_kl_lora": Row("CNN, response KL, Partial LoRA", f"{CNN} --lora-scope speech", rate_of="cnn_kl"),
    "ce": Row("CFormer, cross-entropy", f"{CE} {FROZEN}"),
    "kl": Row("CFormer, response KL", f"{_RESPONSE} {FROZEN}"),
    "kl_input": Row("CFormer, response + input KL", FROZEN),
    "blsp_kd": Row("BLSP-KD: + Partial LoRA", "--lora-scope speech"),
    "unfrozen": Row("BLSP-KD + encoder trained", _UNFROZEN, trains_encoder=True),
    "lora_all": Row("CFormer, both KL, LoRA everywhere", "--lora-scope all"),
    "warm_up": Row("token cross-entropy alone", f"{WARM_UP} {FROZEN}", transcripts=True),
    "warm_half": Row("(half of it, where the next begin)", f"{WARM_UP} {FROZEN}", share=0.5, transcripts=True),
    "warm_ce": Row("warm-up, then cross-entropy", f"{CE} {FROZEN}", "warm_half", 0.5),
    "warm_kl": Row("warm-up, then response KL", f"{_RESPONSE} {FROZEN}", "warm_half", 0.5),
    "warm_kl_input": Row("warm-up, then response + input KL", FROZEN, "warm_half", 0.5),
    "warm_blsp_kd": Row("warm-up, then BLSP-KD", "--lora-scope speech", "warm_half", 0.5),
    "warm_unfrozen": Row("warm-up, then BLSP-KD + encoder trained", _UNFROZEN, "warm_half", 0.5, trains_encoder=True),
    "warm_lora_all": Row("warm-up, then both KL, LoRA everywhere", "--lora-scope all", "warm_half", 0.5),
    "deep_half": Row("(half of it, two layers)", f"{WARM_UP} {FROZEN} {_DEEP}", share=0.5, transcripts=True),
    "deep": Row(
        "warm-up, then BLSP-KD, two layers before and after CIF", f"--lora-scope speech {_DEEP}", "deep_half", 0.5
    ),
    "longer": Row("warm-up, then BLSP-KD, half as long again", "--lora-scope speech", "warm_blsp_kd", 0.5),
    "x_opd": Row("X-OPD, sampled, on top of it", _ON_POLICY, "warm_blsp_kd", 0.5, on_policy=True),
    "x_opd_exact": Row(
        "X-OPD, exact, on top of it", f"{_ON_POLICY} --estimator exact", "warm_blsp_kd", 0.5, on_policy=True
    ),
}
# Less LoRA, trained for twice the time, compared with nothing: the model that the package carried at first.
SMALL: dict[str, Row] = {
    "small_warm_up": Row("(where the small model begins)", f"{WARM_UP} {FROZEN} {_SMALL}", transcripts=True),
    "small": Row("BLSP-KD: longer, rank 4", f"--lora-scope speech {_SMALL}", "small_warm_up"),
}
ROWS |= SMALL
SETS = {"heard": "heard voices", "unheard": "a voice never heard", "real": "real recordings"}
QUESTIONS = ("questions_heard", "questions_unheard")
UNTRAINED = {"text": "the LLM reads the transcript", "cascade": "cascade: Whisper tiny.en, then the LLM"}
# With all seeds; the first under noise, too.
MAIN = ("blsp", "cnn_kl", "blsp_kd", "warm_up", "warm_blsp_kd", "longer", "x_opd", "x_opd_exact")

# Rows again with less data, for as many minutes.
SCALED = ("blsp", "warm_blsp_kd")
DIVISORS = (8, 4, 2)


def on_less(rows: Mapping[str, Row], name: str, divisor: int) -> dict[str, Row]:
    """A row and those that it begins with, on a part of the data."""
    row = rows[name]
    start = f"{row.start}_{divisor}" if row.start else ""
    less = row._replace(title=f"{row.title}, 1/{divisor} of the data", start=start, data_divisor=divisor)
    return (on_less(rows, row.start, divisor) if row.start else {}) | {f"{name}_{divisor}": less}


LESS_DATA: dict[str, Row] = {}
for _name in SCALED:
    for _divisor in DIVISORS:
        LESS_DATA |= on_less(ROWS, _name, _divisor)
ROWS |= LESS_DATA

# Three learning rates, half a decade apart, are tried on a row of each kind, from scratch or on top of another.
LEARNING_RATES = {
    "blsp": (3e-4, 1e-3, 3e-3),
    "cnn_kl": (3e-4, 1e-3, 3e-3),
    "kl": (3e-4, 1e-3, 3e-3),
    "warm_up": (3e-4, 1e-3, 3e-3),
    "warm_kl": (1e-4, 3e-4, 1e-3),
    "x_opd": (3e-5, 1e-4, 3e-4),
}


def searched(name: str) -> str:
    """The row on which the learning rate of this one is searched."""
    row = ROWS[name]
    if row.transcripts:
        return "warm_up"
    if row.start:
        return "x_opd" if row.on_policy else "warm_kl"
    return row.rate_of


# Trained for others only.
HIDDEN = ("warm_half", "deep_half", "small_warm_up", *(f"warm_half_{divisor}" for divisor in DIVISORS))

TABLE = Table(ROWS, UNTRAINED, MAIN, (*SMALL, *LESS_DATA), HIDDEN, LEARNING_RATES, searched)


class Claim(NamedTuple):
    """What a paper says: ``better`` is better than ``worse``."""

    text: str
    better: str
    worse: str


CLAIMS = (
    Claim("distillation beats cross-entropy on continuations (CNN)", "cnn_kl", "blsp"),
    Claim("distillation beats cross-entropy on continuations (CFormer)", "kl", "ce"),
    Claim("the same after the warm-up", "warm_kl", "warm_ce"),
    Claim("cross-entropy beside the KL helps (CNN, ours)", "cnn_kl_ce", "cnn_kl"),
    Claim("an embedding for each token beats a fixed stride", "kl", "cnn_kl"),
    Claim("the whole of BLSP-KD beats BLSP", "blsp_kd", "blsp"),
    Claim("input KL helps", "kl_input", "kl"),
    Claim("input KL helps after the warm-up", "warm_kl_input", "warm_kl"),
    Claim("Partial LoRA helps", "blsp_kd", "kl_input"),
    Claim("Partial LoRA helps after the warm-up", "warm_blsp_kd", "warm_kl_input"),
    Claim("training the encoder helps", "unfrozen", "blsp_kd"),
    Claim("training the encoder helps after the warm-up", "warm_unfrozen", "warm_blsp_kd"),
    Claim("the warm-up helps BLSP-KD (ours)", "warm_blsp_kd", "blsp_kd"),
    Claim("distillation adds to the warm-up (ours)", "warm_blsp_kd", "warm_up"),
    Claim("on-policy distillation beats as much more of BLSP-KD", "x_opd", "longer"),
    Claim("the exact estimator beats the sampled one (ours)", "x_opd_exact", "x_opd"),
    Claim("a shallow adapter beats a deeper one in this time (ours)", "warm_blsp_kd", "deep"),
    Claim("the exact estimator beats as much more of BLSP-KD (ours)", "x_opd_exact", "longer"),
    Claim("BLSP-KD beats the cascade of the same encoder (with the warm-up)", "warm_blsp_kd", "cascade"),
)
