"""Criterion ``kl_distillation``: a weighted sum of BLSP-KD's losses, BLSP's cross-entropy and a warm-up.

Each term is a mean over the tokens of an utterance, and the update a mean over utterances. fairseq adds up gradients
over batches and processes and divides by the summed ``sample_size``; with a mean per utterance and ``sample_size`` =
utterances the update is the same however a batch is split. The logged figures are means over all tokens.

A new term is a row of :data:`TERMS`, an option of its weight, and its formula.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.logging import metrics
from torch import Tensor

from blspkd_fairseq.criterions.sums import DistillationConfig, Sums, anchor, chunk_size_on, log_ratio, pieces_of, total
from blspkd_fairseq.data.batch import Labels
from blspkd_fairseq.modules.distillation_loss import (
    distance_cross_entropy,
    linear_cross_entropy,
    linear_kl_div_with_agreement,
)
from blspkd_fairseq.modules.soft_tokens import soft_tokens_of
from blspkd_fairseq.modules.speech_llm import Distillation, SpeechLLM, SpeechLlmOutput


class Term(NamedTuple):
    """One term of the loss.

    Attributes:
        name: as it is logged.
        option: the option that holds its weight.
        position: what it compares: "input" (speech positions), "response", "embedding" (the adapter's output, for which
            the LLM does not run) or "count".
        needs_teacher: the LLM reads the transcript, too.
        one_to_one: needs an embedding for each token of the transcript.
    """

    name: str
    option: str
    position: str
    needs_teacher: bool = False
    one_to_one: bool = False


TERMS = (
    Term("response_kl", "response_kl_weight", "response", needs_teacher=True),
    Term("input_kl", "input_kl_weight", "input", needs_teacher=True, one_to_one=True),
    Term("quantity", "quantity_weight", "count"),
    Term("response_ce", "response_ce_weight", "response"),
    Term("response_end_kl", "end_of_turn_kl_weight", "response", needs_teacher=True),
    Term("response_l2", "response_l2_weight", "response", needs_teacher=True),
    Term("token_ce", "token_ce_weight", "embedding", one_to_one=True),
    Term("token_mse", "token_mse_weight", "embedding", one_to_one=True),
)
_PER_TOKEN = [term.name for term in TERMS if term.position != "count"]


@dataclass
class KlDistillationConfig(DistillationConfig):
    """Terms of ``--criterion kl_distillation``. A weight of 0 switches a term off."""

    response_kl_weight: float = field(
        default=1.0, metadata={"help": "KL at the positions that predict the response (BLSP-KD)"}
    )
    input_kl_weight: float = field(
        default=1.0, metadata={"help": "KL between speech position i and transcript position i (BLSP-KD)"}
    )
    response_ce_weight: float = field(
        default=0.0, metadata={"help": "cross-entropy of the response (BLSP); needs no teacher"}
    )
    end_of_turn_kl_weight: float = field(
        default=0.0,
        metadata={
            "help": "KL at the position that predicts the end of turn, beside its share in the response's "
            "(Ultravox, fixie-ai/ultravox PR 309: 1)"
        },
    )
    response_l2_weight: float = field(
        default=0.0,
        metadata={
            "help": "mean squared difference of the output hidden states at the positions that predict the response, "
            "in place of or beside the KL (DiVA, arXiv 2410.02678)"
        },
    )
    token_ce_weight: float = field(
        default=0.0,
        metadata={
            "help": "warm-up: cross-entropy of each speech embedding against the LLM's token embeddings, label the "
            "transcript's token; alone (all other weights but --quantity-weight 0) it needs no run of the LLM"
        },
    )
    token_mse_weight: float = field(
        default=0.0,
        metadata={
            "help": "warm-up: squared distance of each speech embedding to its token's embedding, over the variance of "
            "the token embeddings (Wav2Prompt, arXiv 2406.00522); needs no run of the LLM"
        },
    )
    token_ce_scale: float = field(
        default=0.0,
        metadata={
            "help": "--token-ce-weight goes by distances in place of dot products, sharpened by this (40 tells "
            "SmolLM2's tokens apart); 0: dot products, whose minimum is not the token's own embedding"
        },
    )
    token_vocabulary: str = field(
        default="all",
        metadata={"help": "tokens that --token-ce-weight discerns: all, or train (those of the training transcripts)"},
    )
    token_negatives: int = field(
        default=0,
        metadata={
            "help": "in training, --token-ce-weight tells an update's tokens apart from this many others, drawn from "
            "--token-vocabulary, in place of all (0): with soft tokens on a CPU a warm-up is twice as fast with 3000; "
            "validation goes on with all"
        },
    )
    kd_temperature: float = field(default=1.0, metadata={"help": "divides the logits of the KL terms (blsp-emo: 2)"})
    scale_by_squared_temperature: bool = field(
        default=False, metadata={"help": "multiply the KL terms by the squared temperature (blsp-emo: no)"}
    )
    reverse_kl: bool = field(
        default=False, metadata={"help": "KL(student || teacher) in place of KL(teacher || student)"}
    )
    log_all_terms: bool = field(
        default=False, metadata={"help": "in validation, measure terms of weight 0, too, where the data allow it"}
    )


@register_criterion("kl_distillation", dataclass=KlDistillationConfig)
class KlDistillationCriterion(FairseqCriterion):
    """See the module. Without a term at the response, manifests need no responses."""

    def __init__(self, cfg: KlDistillationConfig, task: Any) -> None:
        super().__init__(task)
        self.cfg = cfg
        self.weights = {term.name: float(getattr(cfg, term.option)) for term in TERMS}
        _check(cfg, self.weights)
        self._vocabulary: Tensor | None = None
        self._table: Tensor | None = None

    @classmethod
    def build_criterion(cls, cfg: KlDistillationConfig, task: Any) -> "KlDistillationCriterion":
        return cls(cfg, task)

    @property
    def needs_responses(self) -> bool:
        """Whether the manifest must have ``tgt_text``."""
        return any(self.weights[term.name] for term in TERMS if term.position == "response")

    @property
    def reads_responses(self) -> bool:
        """Whether the LLM reads responses where there are some."""
        return self.needs_responses or self.cfg.log_all_terms

    def check_model(self, model: SpeechLLM) -> None:
        """Refuses what compares speech position i with token i, for an adapter that has no such positions.

        Raises:
            ValueError: names the options.
        """
        if soft_tokens_of(model.adapter) is not None and self.cfg.token_ce_scale:
            raise ValueError(
                "--token-ce-scale is of embeddings that are no soft tokens: leave it out, or --adapter-soft-tokens, "
                "which learns how sharp its posterior is"
            )
        if soft_tokens_of(model.adapter) is None and self.cfg.token_negatives:
            raise ValueError("--token-negatives are drawn for soft tokens: add --adapter-soft-tokens, or leave it out")
        if model.adapter.one_to_one:
            return
        given = [term.option for term in TERMS if term.one_to_one and self.weights[term.name]]
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(
                f"{options} must be 0 with this adapter: it has no embedding for each token of the transcript, so that "
                "there is nothing to compare token by token; or choose --adapter cformer"
            )
        if not any(weight for name, weight in self.weights.items() if name != "quantity"):
            raise ValueError(f"{_ALL_ZERO} (--quantity-weight counts tokens, which this adapter does not)")

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True

    def forward(self, model: Any, sample: dict[str, Any], reduce: bool = True) -> tuple[Tensor, int, dict[str, float]]:
        """Returns the summed loss of the batch's utterances, their number, and sums to log."""
        terms = self._terms(model, sample)
        positions = {term.position for term in terms} & {"input", "response"}
        teacher = any(term.needs_teacher for term in terms)
        output = model(**sample["net_input"], positions=positions, teacher=teacher)

        names = {term.name for term in terms}
        sums = Sums(sample["nsentences"])
        losses: dict[str, Tensor] = {}  # of each utterance, [B]
        if output.input is not None:
            losses |= self._compare("input", names, output.input, output, model, sums)
        if output.response is not None:
            losses |= self._compare("response", names, output.response, output, model, sums)
        losses |= self._embedding_terms(names, output, model, sums)
        quantity = sums.quantity(output)
        if quantity is not None:
            losses["quantity"] = quantity

        # What the warm-up leaves out still belongs to the loss.
        parts = (model.speech_llm.llm, soft_tokens_of(model.speech_llm.adapter))
        unused = (
            [] if positions else [p for part in parts if part is not None for p in part.parameters() if p.requires_grad]
        )
        loss = anchor(output.adapter, unused)
        loss = loss + sum(self.weights[name] * values.sum() for name, values in losses.items() if self.weights[name])
        sums.add("loss", loss)
        log = sums.read(_SUMS, pieces_of(sample))
        log |= {"ntokens": sample["ntokens"], "nsentences": sums.rows, "sample_size": sums.rows}
        log["transcript_tokens"] = float(output.batch.tokens)
        return loss, sums.rows, log

    # ---- terms -------------------------------------------------------------------------------------------------

    def _terms(self, model: Any, sample: dict[str, Any]) -> list[Term]:
        """What to compute for this batch."""
        wanted = {term for term in TERMS if self.weights[term.name]}
        if self.cfg.log_all_terms and not model.training:
            one_to_one = model.speech_llm.adapter.one_to_one
            wanted |= {term for term in TERMS if term.one_to_one or term.name == "quantity"} if one_to_one else set()
            if all(row.response for row in sample["plan_rows"]):
                wanted |= {term for term in TERMS if term.name in ("response_kl", "response_ce")}
        return [term for term in TERMS if term in wanted]

    def _compare(
        self, position: str, names: set[str], compared: Distillation, output: SpeechLlmOutput, model: Any, sums: Sums
    ) -> dict[str, Tensor]:
        """The terms of one position."""
        cfg, speech_llm = self.cfg, model.speech_llm
        weight, bias = speech_llm.head
        chunk, transform = chunk_size_on(cfg, weight.device), speech_llm.logit_transform
        losses = {}
        if {f"{position}_kl", f"{position}_end_kl"} & names:
            assert compared.teacher is not None
            kl, agrees = linear_kl_div_with_agreement(
                compared.student, compared.teacher, weight, bias, cfg.kd_temperature, cfg.reverse_kl, chunk, transform
            )
            sums.add(f"{position}_agree", agrees.sum())
            if cfg.scale_by_squared_temperature:
                kl = kl * cfg.kd_temperature**2
            losses[f"{position}_kl"] = sums.mean(f"{position}_kl", kl, compared)
            if f"{position}_end_kl" in names:
                ends = output.batch.ends
                own = Labels(*(part.index_select(0, ends) for part in output.batch.response))
                own = own._replace(counts=torch.ones_like(own.counts))
                losses[f"{position}_end_kl"] = sums.mean(f"{position}_end_kl", kl.index_select(0, ends), own)
        if f"{position}_l2" in names:
            assert compared.teacher is not None
            distance = (compared.student.float() - compared.teacher.float()).square().mean(1)
            losses[f"{position}_l2"] = sums.mean(f"{position}_l2", distance, compared)
        if f"{position}_ce" in names:
            ce = linear_cross_entropy(compared.student, compared.targets, weight, bias, chunk, transform)
            losses[f"{position}_ce"] = sums.mean(f"{position}_ce", ce, compared)
        return losses

    def _embedding_terms(self, names: set[str], output: SpeechLlmOutput, model: Any, sums: Sums) -> dict[str, Tensor]:
        """The warm-up's: speech embeddings against the embeddings of the transcript's tokens."""
        wanted = names & {"token_ce", "token_mse"}
        if not wanted:
            return {}
        labels = output.batch.transcript
        hidden = output.adapter.embeddings.flatten(0, 1).index_select(0, output.batch.student.source)
        losses = {}
        if "token_ce" in wanted:
            losses["token_ce"] = sums.mean("token_ce", self._token_ce(hidden, labels.targets, output, model), labels)
        if "token_mse" in wanted:
            tokens = model.speech_llm.embed(labels.targets).float()
            distance = (hidden.float() - tokens) / model.speech_llm.adapter.output_scale
            losses["token_mse"] = sums.mean("token_mse", distance.square().mean(1), labels)
        return losses

    def _token_ce(self, hidden: Tensor, ids: Tensor, output: SpeechLlmOutput, model: Any) -> Tensor:
        """``[N]`` nats of the tokens ``ids`` [N], by the embeddings or, where they are soft, by their posterior."""
        soft = soft_tokens_of(model.speech_llm.adapter)
        tokens = self._discerned(model, ids)
        # A token outside gets the next id as label, so it always counts as wrong.
        targets = torch.searchsorted(tokens, ids).clamp(max=len(tokens) - 1)
        if soft is not None:
            assert output.adapter.queries is not None
            queries = output.adapter.queries.of(output.batch.student.source)
            ce: Tensor = soft.cross_entropy(queries, targets, None if self._discerns_all else tokens)
            return ce
        if self._table is None:
            self._table = model.speech_llm.embed(tokens).float()
        chunk, scale = chunk_size_on(self.cfg, hidden.device), self.cfg.token_ce_scale
        if scale:
            return distance_cross_entropy(hidden, targets, self._table, scale, chunk)
        return linear_cross_entropy(hidden, targets, self._table.to(hidden.dtype), chunk_size=chunk)

    @property
    def _draws(self) -> bool:
        return bool(self.cfg.token_negatives) and self.training

    @property
    def _discerns_all(self) -> bool:
        """Tokens are told apart from all others of the LLM, whose indices are their ids."""
        return self.cfg.token_vocabulary == "all" and not self._draws

    def _discerned(self, model: Any, ids: Tensor) -> Tensor:
        """Sorted ids of the tokens that ``ids`` [N] are told apart from; drawn ones may stand there again."""
        if self._vocabulary is None:
            size = model.speech_llm.llm.get_input_embeddings().num_embeddings
            tokens = torch.arange(size) if self.cfg.token_vocabulary == "all" else self.task.training_tokens()
            self._vocabulary = tokens.to(ids.device)
        if not self._draws:
            return self._vocabulary
        drawn = torch.randint(len(self._vocabulary), (self.cfg.token_negatives,), device=ids.device)
        return torch.cat([ids, self._vocabulary[drawn]]).sort().values

    # ---- logging -----------------------------------------------------------------------------------------------

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Logs means over all tokens (KL, cross-entropy, agreement) and utterances (loss, quantity)."""
        log_ratio(logging_outputs, "loss", "loss", "sample_size")
        for name in _PER_TOKEN:
            log_ratio(logging_outputs, name, f"{name}_sum", f"{name}_tokens")
        for name in ("response", "input"):
            log_ratio(logging_outputs, f"{name}_agreement", f"{name}_agree", f"{name}_kl_tokens")
        log_ratio(logging_outputs, "quantity", "quantity_sum", "counted")
        if total(logging_outputs, "counted"):
            tokens = max(1.0, total(logging_outputs, "transcript_tokens"))
            metrics.log_scalar("token_count_error", total(logging_outputs, "count_errors") / tokens, tokens, round=4)


_ALL_ZERO = "all weights of kl_distillation are 0: give one of --*-weight a value"
_SUMS = [
    *(f"{name}_{kind}" for name in _PER_TOKEN for kind in ("sum", "tokens")),
    "response_agree",
    "input_agree",
    "quantity_sum",
    "counted",
    "count_errors",
]


def _check(cfg: KlDistillationConfig, weights: dict[str, float]) -> None:
    if not any(weights.values()):
        raise ValueError(_ALL_ZERO)
    if min(weights.values()) < 0:
        raise ValueError(f"the weights of kl_distillation must not be negative, got {weights}")
    if cfg.kd_temperature <= 0:
        raise ValueError(f"--kd-temperature must be positive, got {cfg.kd_temperature}")
    if cfg.token_ce_scale < 0:
        raise ValueError(f"--token-ce-scale must not be negative, got {cfg.token_ce_scale}")
    if cfg.token_negatives < 0:
        raise ValueError(f"--token-negatives must not be negative, got {cfg.token_negatives}")
    if cfg.token_vocabulary not in ("all", "train"):
        raise ValueError(f"unknown --token-vocabulary {cfg.token_vocabulary!r}: choose from all, train")
