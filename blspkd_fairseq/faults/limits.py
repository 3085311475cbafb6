"""Options that say how many faults a training bears."""

from dataclasses import dataclass, field


@dataclass
class FaultLimits:
    """Faults. A training that meets more of a kind ends with an error."""

    max_oom: int = field(
        default=5,
        metadata={
            "help": "updates in a row that may run out of memory, whose batches are then taken in halves, and "
            "utterances in all that may be left out since one of them alone does not fit; with several processes there "
            "are none"
        },
    )
    max_non_finite: int = field(
        default=3,
        metadata={"help": "updates in a row that may be left out because of NaN or Inf in their loss or gradient"},
    )
    max_bad_audio: int = field(default=1000, metadata={"help": "rows that --skip-bad-audio may leave out"})
    max_bad_audio_share: float = field(
        default=0.01, metadata={"help": "... and the share of the manifests' rows, though one row always may"}
    )
    loader_timeout: int = field(
        default=300,
        metadata={"help": "seconds that --num-workers' processes may take to bring the next batch (0: for ever)"},
    )


def check_limits(limits: FaultLimits) -> None:
    """Refuses what is no limit.

    Raises:
        ValueError: names the option.
    """
    for name in ("max_oom", "max_non_finite", "max_bad_audio", "loader_timeout"):
        if getattr(limits, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {getattr(limits, name)}")
    if not 0 <= limits.max_bad_audio_share <= 1:
        raise ValueError(f"--max-bad-audio-share must be between 0 and 1, got {limits.max_bad_audio_share}")
