"""The rows of the comparison on everyday English: what each is, and of which it is said that they differ.

Every row is trained twice: on as many utterances as the others, a warm-up's included, and for as many minutes
(``NAME_in_time``). What goes on from a warm-up or another row goes on from the same one in both.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "comparison"))

from systems import CE, CNN, FROZEN, WARM_UP, Row, Table, on_less  # noqa: E402

_LORA = "--lora-scope speech"
_WARM_UP = f"{WARM_UP} {FROZEN}"
_ON_POLICY = (
    f"--criterion on_policy_distillation {_LORA} --estimator exact --rollouts 2 --rollout-max-tokens 48"
    " --adapter-dropout 0 --lora-dropout 0"  # as in the roll-outs
)

# Half of the utterances of a row with a warm-up are the warm-up's; what goes on from "mix" has half as many more.
BY_UTTERANCES: dict[str, Row] = {
    "warm_up": Row("warm-up alone: token cross-entropy", _WARM_UP, transcripts=True, rate_of="warm_up"),
    "warm_half": Row("(half of it, where the next begin)", _WARM_UP, share=0.5, transcripts=True, rate_of="warm_up"),
    "blsp": Row("BLSP: CNN, cross-entropy", f"{CNN} {CE} {FROZEN}", rate_of="blsp"),
    "cnn_kl": Row("CNN, response KL", f"{CNN} {FROZEN}", rate_of="cnn_kl"),
    "scratch": Row("BLSP-KD from scratch", _LORA, rate_of="scratch"),
    "continue": Row("warm-up, BLSP-KD on continue", _LORA, "warm_half", 0.5, rate_of="mix", responses="continue"),
    "chat": Row("warm-up, BLSP-KD on chat", _LORA, "warm_half", 0.5, rate_of="mix", responses="chat"),
    "mix": Row("warm-up, BLSP-KD on the mix", _LORA, "warm_half", 0.5, rate_of="mix"),
    "no_input_kl": Row("... without input KL", f"{_LORA} --input-kl-weight 0", "warm_half", 0.5, rate_of="mix"),
    "no_lora": Row("... without Partial LoRA", FROZEN, "warm_half", 0.5, rate_of="mix"),
    "encoder": Row(
        "... encoder trained, too", f"{_LORA} --unfreeze-speech-encoder", "warm_half", 0.5, rate_of="encoder",
        trains_encoder=True,
    ),
    "longer": Row("... on the mix, half as long again", _LORA, "mix", 0.5, rate_of="longer"),
    "x_opd": Row("... X-OPD (exact) on top", _ON_POLICY, "mix", 0.5, rate_of="x_opd", on_policy=True),
    "anchored": Row(
        "... X-OPD (exact), half of it cross-entropy",
        f"{_ON_POLICY} --off-policy-share 0.5 --off-policy-cross-entropy", "mix", 0.5, rate_of="x_opd", on_policy=True,
    ),
}  # fmt: skip
HIDDEN = ("warm_half",)
# What sets the minutes of the others: of what goes on half as long, and of all else.
REFERENCE, LONG_REFERENCE = "mix", "longer"


def in_time(name: str) -> str:
    """The row again, in as many minutes as the reference; itself, where it is the reference."""
    return name if name in (REFERENCE, LONG_REFERENCE) else f"{name}_in_time"


def _in_minutes(name: str, row: Row) -> Row:
    long = row.start == REFERENCE
    return row._replace(
        title=f"{row.title}, equal minutes", like=name, as_long_as=LONG_REFERENCE if long else REFERENCE
    )


IN_TIME = {
    in_time(name): _in_minutes(name, row)
    for name, row in BY_UTTERANCES.items()
    if name not in HIDDEN and in_time(name) != name
}

# Rows again on parts of the data, each within the next, on as many utterances.
SCALED = ("blsp", "mix")
DIVISORS = (32, 16, 8, 4, 2)
LESS_DATA = {
    less: row
    for name in SCALED
    for divisor in DIVISORS
    for less, row in on_less(BY_UTTERANCES, name, divisor).items()
}  # fmt: skip

ROWS = BY_UTTERANCES | IN_TIME | LESS_DATA
UNTRAINED = {"text": "the LLM reads the transcript", "cascade": "cascade: Whisper, then the LLM"}
# Of the primary contrasts (contrasts.toml), with all seeds.
MAIN = (
    "mix", "blsp_in_time", "scratch_in_time", "chat", "continue", "longer", "x_opd_in_time", "warm_up_in_time", "blsp",
    "scratch", "warm_up", "x_opd",
)  # fmt: skip
LONG = ("mix", "longer", "x_opd", "anchored", "x_opd_in_time", "anchored_in_time")  # long answers are asked of, too
RATES = {
    "warm_up": (3e-4, 1e-3, 3e-3),
    "blsp": (3e-4, 1e-3, 3e-3),
    "cnn_kl": (3e-4, 1e-3, 3e-3),
    "scratch": (3e-4, 1e-3, 3e-3),
    "mix": (1e-4, 3e-4, 1e-3),
    "encoder": (3e-5, 1e-4, 3e-4),
    "longer": (3e-5, 1e-4, 3e-4),
    "x_opd": (1e-5, 3e-5, 1e-4),
}


def searched(name: str) -> str:
    """The row on which the learning rate of this one is searched."""
    return ROWS[name].rate_of


TABLE = Table(
    ROWS,
    UNTRAINED,
    MAIN,
    tuple(LESS_DATA),
    (*HIDDEN, *(name for name in LESS_DATA if name.startswith("warm_half"))),
    RATES,
    searched,
    widest=2,
)
