"""Makes updates of batches that fit and of finite numbers, and counts those that cannot be made."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from blspkd_fairseq.faults.errors import DoesNotFit, NotFinite, NothingToLearn, TrainingError, listed, names_of
from blspkd_fairseq.faults.left_out import LeftOutRows
from blspkd_fairseq.faults.limits import FaultLimits
from blspkd_fairseq.faults.shortened import ShortenedResponses

logger = logging.getLogger(__name__)

Sample = dict[str, Any]
Result = TypeVar("Result")

_LESS_MEMORY = (
    "give a smaller --batch-size or --max-tokens with more --update-freq, a smaller --max-response-tokens, "
    "--gradient-checkpointing, or --cache-encoder-features"
)


class UpdateGuard:
    """Makes updates, smaller where memory is short, and none where numbers are not finite.

    Args:
        limits: how much of it a training bears.
        halve: splits a batch in two; a batch of one utterance gives none.
        parameters: those that are trained, by name.

    Attributes:
        left_out: rows whose audio cannot be read.
        shortened: rows whose response was cut.
    """

    def __init__(
        self,
        limits: FaultLimits,
        halve: Callable[[Sample], list[Sample]],
        parameters: Callable[[], Iterable[tuple[str, Tensor]]],
    ) -> None:
        self.limits = limits
        self.left_out = LeftOutRows(limits)
        self.shortened = ShortenedResponses()
        self._halve = halve
        self._parameters = parameters
        self._updates = 0  # that were made in this epoch
        self._oom_in_a_row = 0
        self._too_large: list[str] = []  # utterances that do not fit alone
        self._non_finite_in_a_row = 0
        self._non_finite = 0
        self._losses: list[tuple[list[str], float]] = []  # of the batches of the update

    # ---- an update ---------------------------------------------------------------------------------------------

    def update(
        self,
        samples: Sequence[Sample],
        step: Callable[[list[Sample]], Result],
        alone: bool,
        is_finite: Callable[[Sample], bool] = lambda _: True,
    ) -> Result | None:
        """Makes an update of collated batches.

        Args:
            samples: the batches.
            step: makes an update of those that it gets, from zero gradients on.
            alone: there is no other process, which would have to take part in what is done again.
            is_finite: whether the gradient of a batch is, by itself and in this process; asked when that of all is not.

        Returns:
            What ``step`` does, or None if there was no update.

        Raises:
            TrainingError: more went wrong than may; in every process but for memory, of which one knows alone.
        """
        for sample in samples:
            self.left_out.note(sample["bad_rows"])
            self.shortened.note(sample["shortened"])
        # A batch that stands in for one without any readable row has no weight, and is needed by other processes only.
        todo = [sample for sample in samples if not (alone and sample["left_out"])]
        fits = True
        while todo:
            self._losses.clear()
            try:
                result = step(todo)
            except DoesNotFit as error:
                names, why = error.names, error.why
            except NotFinite:
                self._count_non_finite(todo, is_finite, alone)
                return None
            except NothingToLearn:
                return None
            else:
                self._count_update(fits)
                return result
            # Behind the exception, whose traceback holds the tensors of the update that failed.
            todo = self._smaller(todo, names, why, alone, first=fits)
            fits = False
        return None

    def saw_loss(self, sample: Sample, loss: float) -> bool:
        """Notes the loss of a batch, for the message if the update fails; False if it is not finite."""
        self._losses.append((names_of(sample), loss))
        return math.isfinite(loss)

    def _count_update(self, fits: bool) -> None:
        self._updates += 1
        self._non_finite_in_a_row = 0
        if fits:
            self._oom_in_a_row = 0

    # ---- memory ------------------------------------------------------------------------------------------------

    def _smaller(self, samples: list[Sample], names: list[str], why: str, alone: bool, first: bool) -> list[Sample]:
        """The batches of an update, that of ``names`` (or the largest) in halves; one utterance alone is left out."""
        named = (i for i, sample in enumerate(samples) if names_of(sample) == names)
        place = next(named, max(range(len(samples)), key=lambda i: samples[i]["nsentences"]))
        sample = samples[place]
        names = names_of(sample)
        if not alone:
            raise TrainingError(
                f"this process has no memory for a batch of {_sizes(sample)} ({listed(names)}), and the others cannot "
                f"do theirs again: {_LESS_MEMORY} ({why})"
            )
        self._oom_in_a_row += first
        if self._oom_in_a_row > self.limits.max_oom:
            raise TrainingError(
                f"{self._oom_in_a_row} updates in a row had no memory for their batches, the last for {_sizes(sample)} "
                f"({listed(names)}): {_LESS_MEMORY} (--max-oom {self.limits.max_oom} allows for fewer; {why})"
            )
        halves = self._halve(sample)
        if halves:
            logger.warning(f"no memory for {_sizes(sample)} ({listed(names)}): in halves ({why})")
        else:
            self._too_large += [name for name in names if name not in self._too_large]
            logger.warning(
                f"no memory for {_sizes(sample)} ({listed(names)}): left out, the {len(self._too_large)}. of at most "
                f"{self.limits.max_oom} ({why})"
            )
        if len(self._too_large) > self.limits.max_oom:
            raise TrainingError(
                f"{len(self._too_large)} utterances do not even fit alone ({listed(self._too_large)}), but --max-oom "
                f"{self.limits.max_oom} may be left out: {_LESS_MEMORY} ({why})"
            )
        return [*samples[:place], *halves, *samples[place + 1 :]]

    # ---- numbers -----------------------------------------------------------------------------------------------

    def _count_non_finite(self, samples: list[Sample], is_finite: Callable[[Sample], bool], alone: bool) -> None:
        """Says whose numbers they are; the update is not made, so that weights and optimizer are as before."""
        bad = [name for name, parameter in self._parameters() if not parameter.isfinite().all()]
        if bad:
            raise TrainingError(
                f"{listed(bad)}: NaN or Inf in what is trained, which no update can mend: go on from an earlier "
                "checkpoint (--restore-file), with a smaller --lr or --clip-norm"
            )
        self._non_finite += 1
        self._non_finite_in_a_row += 1
        message = self._say_whose(samples, is_finite, alone)
        if self._non_finite_in_a_row > self.limits.max_non_finite:
            raise TrainingError(
                f"{self._non_finite_in_a_row} updates in a row were not finite, but --max-non-finite is "
                f"{self.limits.max_non_finite}: {message}; look at these rows, or give a smaller --lr"
            )
        logger.warning(f"{message}: no update ({self._non_finite} so far, {self._non_finite_in_a_row} in a row)")

    def _say_whose(self, samples: list[Sample], is_finite: Callable[[Sample], bool], alone: bool) -> str:
        """Names the batches whose loss is not finite, or else those whose gradient by itself is not."""
        by_loss = [(names, loss) for names, loss in self._losses if not math.isfinite(loss)]
        if by_loss:
            names = [name for batch, _ in by_loss for name in batch]
            return f"a loss of {by_loss[0][1]} in the batch of {listed(names)}"
        by_gradient = samples if len(samples) == 1 and alone else [one for one in samples if not is_finite(one)]
        if not by_gradient and not alone:
            return "NaN or Inf in the gradient of another process"
        names = [name for batch in by_gradient or samples for name in names_of(batch)]
        return f"NaN or Inf in the gradient, though the loss is finite, in the batch of {listed(names)}"

    # ---- epochs ------------------------------------------------------------------------------------------------

    def end_epoch(self, epoch: int, gather: Callable[[list[Any]], Iterable[Any]]) -> None:
        """Sums up what was left out.

        Args:
            epoch: its number.
            gather: joins a list of each process.

        Raises:
            TrainingError: nothing was trained, or too much left out.
        """
        updates, self._updates = self._updates, 0
        self.left_out.end_epoch(epoch, gather)
        self.shortened.end_epoch(epoch)
        if self._too_large or self._non_finite:
            logger.warning(
                f"by the end of epoch {epoch}, {len(self._too_large)} utterances did not fit the memory, and "
                f"{self._non_finite} updates were not finite; each was named above"
            )
        if not updates:
            raise TrainingError(
                f"epoch {epoch} has ended without a single update: {len(self.left_out)} rows could not be read, "
                f"{len(self._too_large)} utterances did not fit the memory, and {self._non_finite} updates were not "
                "finite; the messages before this one say what to change"
            )


def _sizes(sample: Sample) -> str:
    samples = sample["net_input"]["samples"]
    seconds = f", the longest audio {max(samples) / 16_000:.1f} s" if samples else ""
    return f"{sample['nsentences']} utterances of {sample['ntokens']} tokens{seconds}"
