"""Criterion ``kl_distillation``: a weighted sum of BLSP-KD's losses, BLSP's cross-entropy and a warm-up.

Each term is a mean over the tokens of an utterance, and the update a mean over utterances. fairseq adds up gradients
over batches and processes and divides by the summed ``sample_size``; with a mean per utterance and ``sample_size`` =
utterances the update is the same however a batch is split. The logged figures are means over all tokens.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor

from blspkd_fairseq.modules.cif import check_alpha_sum, quantity_loss
from blspkd_fairseq.modules.distillation_loss import linear_cross_entropy, linear_kl_div_with_agreement
from blspkd_fairseq.modules.sequence import is_valid, mean_per_row
from blspkd_fairseq.modules.speech_llm import Distillation, SpeechLLM, SpeechLlmOutput


@dataclass
class KlDistillationConfig(FairseqDataclass):
    """Options of ``--criterion kl_distillation``. A weight of 0 switches a term off."""

    response_kl_weight: float = field(
        default=1.0, metadata={"help": "KL at the positions that predict the response (BLSP-KD)"}
    )
    input_kl_weight: float = field(
        default=1.0, metadata={"help": "KL between speech position i and transcript position i (BLSP-KD)"}
    )
    quantity_weight: float = field(
        default=1.0, metadata={"help": "|sum(alpha) / n - 1| (BLSP-KD); an adapter without CIF has none"}
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
    token_vocabulary: str = field(
        default="all",
        metadata={"help": "words that --token-ce-weight discerns: all, or train (those of the training transcripts)"},
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
    chunk_size: int = field(default=128, metadata={"help": "positions that go through the LLM's head at once"})


@register_criterion("kl_distillation", dataclass=KlDistillationConfig)
class KlDistillationCriterion(FairseqCriterion):
    """See the module. Without a term that has "response" in its name, manifests need no responses."""

    def __init__(self, cfg: KlDistillationConfig, task: Any) -> None:
        super().__init__(task)
        self.cfg = cfg
        self.weights = {
            "response_kl": cfg.response_kl_weight,
            "input_kl": cfg.input_kl_weight,
            "quantity": cfg.quantity_weight,
            "response_ce": cfg.response_ce_weight,
            "response_end_kl": cfg.end_of_turn_kl_weight,
            "response_l2": cfg.response_l2_weight,
            "token_ce": cfg.token_ce_weight,
            "token_mse": cfg.token_mse_weight,
        }
        _check(cfg, self.weights)
        self._vocabulary: tuple[Tensor, Tensor] | None = None

    @classmethod
    def build_criterion(cls, cfg: KlDistillationConfig, task: Any) -> "KlDistillationCriterion":
        return cls(cfg, task)

    @property
    def needs_responses(self) -> bool:
        """Whether the manifest must have ``tgt_text``."""
        return any(weight != 0 for name, weight in self.weights.items() if name.startswith("response"))

    def check_model(self, model: SpeechLLM) -> None:
        """Refuses what compares speech position i with token i, for an adapter that has no such positions.

        Raises:
            ValueError: names the options.
        """
        if model.adapter.one_to_one:
            return
        given = [name for name in _ONE_TO_ONE if self.weights[name]]
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}-weight" for name in given)
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
        positions = {name.split("_")[0] for name in terms if name.startswith(("input", "response"))}
        teacher = any(name.endswith(("_kl", "_l2")) for name in terms)
        output = model(**sample["net_input"], positions=positions, teacher=teacher)
        unused = [] if positions else [p for p in model.speech_llm.llm.parameters() if p.requires_grad]
        text = sample["net_input"]["text"]
        if output.adapter.alpha_sum is not None:
            check_alpha_sum(output.adapter.alpha_sum, [row["id"] for row in sample["rows"]])

        losses: dict[str, Tensor] = {}  # of each utterance, [B]
        sums: dict[str, Tensor] = {}  # to log
        for name in ("input", "response"):
            compared = getattr(output, name)
            if compared is None:
                continue
            if {f"{name}_kl", f"{name}_end_kl"} & terms:
                losses |= self._kl(name, compared, model, sample, sums)
            if f"{name}_l2" in terms:
                assert compared.teacher is not None
                distance = (compared.student.float() - compared.teacher.float()).square().mean(1)
                losses[f"{name}_l2"] = self._mean_per_utterance(f"{name}_l2", distance, compared.rows, sample, sums)
            if f"{name}_ce" in terms:
                weight, bias = model.speech_llm.head
                ce = linear_cross_entropy(compared.student, compared.targets, weight, bias, self.cfg.chunk_size)
                losses[f"{name}_ce"] = self._mean_per_utterance(f"{name}_ce", ce, compared.rows, sample, sums)
        losses |= self._token_terms(terms, output, model, sample, sums)
        if output.adapter.alpha_sum is not None:
            losses["quantity"] = quantity_loss(output.adapter.alpha_sum, text["transcript_lengths"])
            sums["quantity_sum"] = losses["quantity"].sum()
            sums["counted"] = torch.tensor(float(sample["nsentences"]), device=text["transcript"].device)
            counted = output.adapter.alpha_sum.detach().round().clamp(min=1)
            sums["count_errors"] = (counted - text["transcript_lengths"]).abs().sum()

        # What the warm-up leaves out still belongs to the loss: processes wait for the gradient of every parameter.
        zero = sum((parameter.sum() for parameter in unused), output.adapter.embeddings.sum()) * 0.0
        loss = zero + sum(self.weights[name] * values.sum() for name, values in losses.items() if self.weights[name])
        return loss, sample["nsentences"], self._log(loss, sums, sample)

    # ---- terms -------------------------------------------------------------------------------------------------

    def _terms(self, model: Any, sample: dict[str, Any]) -> set[str]:
        """What to compute for this batch."""
        terms = {name for name, weight in self.weights.items() if weight}
        if self.cfg.log_all_terms and not model.training:
            terms |= {*_ONE_TO_ONE, "quantity"} if model.speech_llm.adapter.one_to_one else set()
            if bool((sample["net_input"]["text"]["response_lengths"] > 0).all()):
                terms |= {"response_kl", "response_ce"}
        return terms

    def _kl(
        self, name: str, compared: Distillation, model: Any, sample: dict[str, Any], sums: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        cfg = self.cfg
        weight, bias = model.speech_llm.head
        assert compared.teacher is not None
        kl, agrees = linear_kl_div_with_agreement(
            compared.student, compared.teacher, weight, bias, cfg.kd_temperature, cfg.reverse_kl, cfg.chunk_size
        )
        sums[f"{name}_agree"] = agrees.sum()
        if cfg.scale_by_squared_temperature:
            kl = kl * cfg.kd_temperature**2
        losses = {f"{name}_kl": self._mean_per_utterance(f"{name}_kl", kl, compared.rows, sample, sums)}
        if name == "response" and cfg.end_of_turn_kl_weight:
            ends = compared.targets == self.task.chat.end_of_turn_id
            term = "response_end_kl"
            losses[term] = self._mean_per_utterance(term, kl[ends], compared.rows[ends], sample, sums)
        return losses

    def _token_terms(
        self, terms: set[str], output: SpeechLlmOutput, model: Any, sample: dict[str, Any], sums: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The warm-up's: speech embeddings against the embeddings of the transcript's tokens."""
        wanted = terms & {"token_ce", "token_mse"}
        if not wanted:
            return {}
        text = sample["net_input"]["text"]
        valid = is_valid(text["transcript"], text["transcript_lengths"])
        ids, hidden, rows = text["transcript"][valid], output.adapter.embeddings[valid], valid.nonzero()[:, 0]
        losses = {}
        if "token_ce" in wanted:
            table, labels = self._token_table(model, ids)
            losses["token_ce"] = linear_cross_entropy(
                hidden, labels, table.to(hidden.dtype), chunk_size=self.cfg.chunk_size
            )
        if "token_mse" in wanted:
            distance = (hidden.float() - model.speech_llm.embed(ids).float()) / model.speech_llm.adapter.output_scale
            losses["token_mse"] = distance.square().mean(1)
        return {name: self._mean_per_utterance(name, loss, rows, sample, sums) for name, loss in losses.items()}

    def _token_table(self, model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings ``[V', D]`` of the words to discern, and the place of each id among them."""
        if self._vocabulary is None:
            size = model.speech_llm.llm.get_input_embeddings().num_embeddings
            words = torch.arange(size) if self.cfg.token_vocabulary == "all" else self.task.training_words()
            words = words.to(ids.device)
            self._vocabulary = words, model.speech_llm.embed(words).float()
        words, table = self._vocabulary
        places = torch.searchsorted(words, ids).clamp(max=len(words) - 1)
        # Validation may hold words that training does not; they count as the nearest one, which is always an error.
        return table, places

    @staticmethod
    def _mean_per_utterance(
        name: str, values: Tensor, rows: Tensor, sample: dict[str, Any], sums: dict[str, Tensor]
    ) -> Tensor:
        """``[B]`` means of per-token values ``[N]``; utterance ``rows[i]`` owns ``values[i]``."""
        sums[f"{name}_sum"] = values.detach().sum()
        sums[f"{name}_tokens"] = torch.tensor(float(len(values)), device=values.device)
        return mean_per_row(values, rows, sample["nsentences"])

    # ---- logging -----------------------------------------------------------------------------------------------

    def _log(self, loss: Tensor, sums: dict[str, Tensor], sample: dict[str, Any]) -> dict[str, float]:
        """Python floats: a tensor or numpy scalar in a meter cannot be loaded again with ``weights_only``."""
        names = ["loss", *sums]
        values = torch.stack([loss.detach().double(), *(value.detach().double() for value in sums.values())]).tolist()
        log = dict.fromkeys(_SUMS, 0.0) | dict(zip(names, values, strict=True))
        log["ntokens"] = sample["ntokens"]
        log["nsentences"] = log["sample_size"] = sample["nsentences"]
        log["transcript_tokens"] = float(sample["net_input"]["text"]["transcript_lengths"].sum())
        return log

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Logs means over all tokens (KL, cross-entropy, agreement) and utterances (loss, quantity)."""

        def total(name: str) -> float:
            return float(sum(log.get(name, 0) for log in logging_outputs))

        utterances = total("sample_size")
        if utterances:
            metrics.log_scalar("loss", total("loss") / utterances, utterances, round=4)
        for name in _TOKEN_TERMS:
            tokens = total(f"{name}_tokens")
            if tokens:
                metrics.log_scalar(name, total(f"{name}_sum") / tokens, tokens, round=4)
        for name in ("response", "input"):
            tokens = total(f"{name}_kl_tokens")
            if tokens:
                metrics.log_scalar(f"{name}_agreement", total(f"{name}_agree") / tokens, tokens, round=4)
        counted = total("counted")
        if counted:
            metrics.log_scalar("quantity", total("quantity_sum") / counted, counted, round=4)
            tokens = max(1.0, total("transcript_tokens"))
            metrics.log_scalar("token_count_error", total("count_errors") / tokens, tokens, round=4)


_ALL_ZERO = "all weights of kl_distillation are 0: give one of --*-weight a value"
_ONE_TO_ONE = ("input_kl", "token_ce", "token_mse")
_TOKEN_TERMS = (
    "response_kl",
    "input_kl",
    "response_ce",
    "response_end_kl",
    "response_l2",
    "token_ce",
    "token_mse",
)
_SUMS = [
    *(f"{name}_{kind}" for name in _TOKEN_TERMS for kind in ("sum", "tokens")),
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
    if cfg.token_vocabulary not in ("all", "train"):
        raise ValueError(f"unknown --token-vocabulary {cfg.token_vocabulary!r}: choose from all, train")
