"""Criterion ``on_policy_distillation``: X-OPD (arXiv 2603.24596). The student answers, the text teacher scores it.

Roll-outs y are sampled from the student hearing speech S (and reading text T). With the teacher phi reading T:

    A_im = log p_phi(y_t | T, y_<t) - log p_theta(y_t | T, y_<t)     roll-outs of the student reading     (eq. 1)
    A_cm = log p_phi(y_t | T, y_<t) - log p_theta(y_t | S, y_<t)     roll-outs of the student hearing     (eq. 2)
    L    = lambda L_im + (1 - lambda) L_cm,   L_x = -E[ 1/m sum_j 1/|y_j| sum_t r_jt A_x ]                (eq. 3-5)

with r = p_theta / p_old, which is 1 when roll-outs are fresh: this is the reverse KL at the sampled prefixes, estimated
from one token each. The paper writes L as what is maximised; here it is minimised. ``--estimator exact`` takes the KL
over the whole vocabulary at the same prefixes. Without LoRA on all positions the student reading text *is* the teacher
(or has nothing to train), so that L_im is 0 and no text roll-outs are drawn.

Roll-outs are drawn without dropout. For the sampled estimator, which is unbiased for tokens of the student's own
distribution, train without it, too (``--adapter-dropout 0 --lora-dropout 0``), at temperature 1 and top-p 1.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.distributed.utils import get_data_parallel_world_size
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor, nn

from blspkd_fairseq.criterions.sums import (
    DistillationConfig,
    Sums,
    anchor,
    chunk_size_on,
    log_ratio,
    mean_per_row,
    pieces_of,
    total,
)
from blspkd_fairseq.data.batch import Batch, plan_batch
from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.generation.decoding import build_prompts
from blspkd_fairseq.generation.hearing import hear, speech_of
from blspkd_fairseq.generation.rollouts import RolloutOptions, roll_out, rollout_seed
from blspkd_fairseq.modules.build import DTYPES, SpeechLlmConfig, load_llm, load_tokenizer
from blspkd_fairseq.modules.distillation_loss import linear_cross_entropy, linear_jensen_shannon
from blspkd_fairseq.modules.quantized import QUANTIZATIONS
from blspkd_fairseq.modules.speech_llm import ChatLLM, Distillation, SpeechLLM

ESTIMATORS = ("sampled", "exact")
logger = logging.getLogger(__name__)


@dataclass
class OnPolicyDistillationConfig(DistillationConfig):
    """Options of ``--criterion on_policy_distillation``. Defaults are X-OPD's where it has them."""

    rollouts: int = field(default=4, metadata={"help": "roll-outs of each utterance (X-OPD: 4)"})
    rollout_temperature: float = field(
        default=1.0, metadata={"help": "temperature of roll-outs (GKD: 0.9); not 1, it biases the sampled estimator"}
    )
    rollout_top_p: float = field(
        default=1.0,
        metadata={
            "help": "draw from the likeliest tokens that make up this share of the probability; below 1, it biases the "
            "sampled estimator"
        },
    )
    rollout_max_tokens: int = field(default=128, metadata={"help": "longest roll-out, the end of turn included"})
    rollout_lifetime: int = field(
        default=1,
        metadata={
            "help": "times that an utterance's roll-outs are trained on, an epoch after another, before new ones are "
            "drawn; 1 is purely on-policy, more is cheaper, in one process. The sampled estimator weights them by the "
            "importance ratio, the exact one takes them as prefixes. They are lost when training is resumed"
        },
    )
    seed: int = II("common.seed")  # of the roll-outs
    im_weight: float = field(
        default=0.5, metadata={"help": "lambda: share of the student reading text; hearing has the rest (X-OPD: 0.5)"}
    )
    estimator: str = field(
        default="sampled",
        metadata={
            "help": "divergence at each prefix: sampled (from the drawn token, X-OPD), or exact (whole vocabulary)"
        },
    )
    beta: float = field(
        default=1.0,
        metadata={"help": "exact estimator and off-policy batches: 1 reverse KL, 0 forward KL, between them JSD (GKD)"},
    )
    off_policy_share: float = field(
        default=0.0,
        metadata={"help": "share of updates trained on tgt_text in place of roll-outs (1 - lambda of GKD)"},
    )
    off_policy_cross_entropy: bool = field(
        default=False,
        metadata={"help": "... by its cross-entropy, as an anchor in the tokens of tgt_text, not by the divergence"},
    )
    teacher_llm: str = field(
        default="", metadata={"help": "another, larger LLM with the same tokenizer as teacher (default: the student's)"}
    )
    teacher_llm_dtype: str = field(default="bfloat16", metadata={"help": "its precision: float32, bfloat16 or float16"})
    teacher_llm_quantization: str = field(
        default="none", metadata={"help": "hold its linear layers in fewer bits: int8 or nf4, by bitsandbytes"}
    )


@register_criterion("on_policy_distillation", dataclass=OnPolicyDistillationConfig)
class OnPolicyDistillationCriterion(FairseqCriterion):
    """See the module. Manifests need no responses unless ``--off-policy-share`` is above 0."""

    def __init__(self, cfg: OnPolicyDistillationConfig, task: Any) -> None:
        super().__init__(task)
        _check(cfg)
        self.cfg = cfg
        self.options = RolloutOptions(cfg.rollouts, cfg.rollout_temperature, cfg.rollout_top_p, cfg.rollout_max_tokens)
        self._kept: dict[tuple[str, int], _Rollouts] = {}
        # In a list, since a module of this module would be saved with every checkpoint.
        self._teacher = [_load_teacher(cfg, task)] if cfg.teacher_llm else []

    @classmethod
    def build_criterion(cls, cfg: OnPolicyDistillationConfig, task: Any) -> "OnPolicyDistillationCriterion":
        return cls(cfg, task)

    @property
    def needs_responses(self) -> bool:
        """Whether the manifest must have ``tgt_text``."""
        return self.cfg.off_policy_share > 0

    def check_model(self, model: SpeechLLM) -> None:
        """Refuses options that leave nothing to train, and says what makes the gradient another than X-OPD's.

        Raises:
            ValueError: names the options.
        """
        if self.cfg.im_weight == 1 and model.lora_scope != "all":
            raise ValueError(
                f"--im-weight 1 trains the student reading text alone, which is the teacher itself with --lora-scope "
                f"{model.lora_scope}: give a smaller weight, or --lora-scope all"
            )
        biases = {
            "--adapter-dropout or --lora-dropout above 0": any(
                isinstance(module, nn.Dropout) and module.p > 0
                for part, module in model.named_modules()
                if part.startswith("adapter.") or "lora_dropout" in part
            ),
            f"--rollout-temperature {self.cfg.rollout_temperature}": self.cfg.rollout_temperature != 1,
            f"--rollout-top-p {self.cfg.rollout_top_p}": self.cfg.rollout_top_p != 1,
        }
        found = [option for option, is_biased in biases.items() if is_biased]
        if found and self.cfg.estimator == "sampled":
            logger.warning(
                f"{' and '.join(found)} biases the sampled estimator, whose tokens must be drawn by the student that "
                "is trained: --estimator exact is free of that"
            )

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True

    def forward(self, model: Any, sample: dict[str, Any], reduce: bool = True) -> tuple[Tensor, int, dict[str, float]]:
        """Returns the summed loss of the batch's utterances, their number, and sums to log."""
        off_policy = self._is_off_policy(model)
        if not off_policy and torch.cuda.is_available():  # what an earlier micro-batch left running is no roll-out
            torch.cuda.synchronize()
        begin = time.perf_counter()
        rolled = {} if off_policy else self._roll_out(model, sample)
        rollout_seconds = time.perf_counter() - begin
        inputs = dict(sample["net_input"])
        if rolled:
            device = inputs["plan"].device
            plan, inputs["spec"] = self._with_responses(model, sample, rolled["speech"]).flatten()
            inputs["plan"] = plan.to(device, non_blocking=True)
        if "text" in self._paths(model):
            inputs["text_replies"] = (
                self._with_responses(model, sample, rolled["text"]).to(device)
                if rolled
                else inputs["spec"].build(inputs["plan"])
            )
        output = model(**inputs, positions=("response",), teacher=not self._teacher)

        sums = Sums(sample["nsentences"])
        loss = anchor(output.adapter)
        for path, compared, batch, weight in (
            ("speech", output.response, output.batch, 1 - self.cfg.im_weight),
            ("text", output.text_response, inputs.get("text_replies", output.batch), self.cfg.im_weight),
        ):
            if compared is not None:
                values = self._divergence(path, compared, batch, model, rolled.get(path), sums)
                means = mean_per_row(values, compared.rows, compared.counts, batch.nrows)
                loss = loss + weight * means.sum() * sums.rows / batch.nrows
        quantity = sums.quantity(output)
        if quantity is not None:
            loss = loss + self.cfg.quantity_weight * quantity.sum()
        sums.add("loss", loss)
        log = sums.read(_SUMS, pieces_of(sample)) | self._rollout_figures(rolled, rollout_seconds)
        log["ntokens"] = int(log["rollout_tokens"]) or sample["ntokens"]
        log |= {"nsentences": sums.rows, "sample_size": sums.rows}
        return loss, sums.rows, log

    # ---- roll-outs ---------------------------------------------------------------------------------------------

    def _is_off_policy(self, model: Any) -> bool:
        """Drawn for the whole update, in every process alike; in validation always on-policy."""
        if self.cfg.off_policy_share == 0 or not model.training:
            return False
        seed = rollout_seed(self.cfg.seed, "off-policy", model.num_updates)
        draw = torch.rand((), generator=torch.Generator().manual_seed(seed))
        return float(draw) < self.cfg.off_policy_share

    def _roll_out(self, model: Any, sample: dict[str, Any]) -> dict[str, "list[_Rollouts]"]:
        """Roll-outs of each utterance, for the paths that are trained: kept ones while they live, then new ones."""
        speech_llm = model.speech_llm
        was_training, prior = speech_llm.training, speech_llm.prior
        speech_llm.eval()
        if was_training and not speech_llm.hears_in_training:
            speech_llm.prior = None  # the student whose answers are trained on hears by the sound alone
        try:
            return {path: self._rollouts_of(path, model, sample, was_training) for path in self._paths(model)}
        finally:
            speech_llm.train(was_training)
            speech_llm.prior = prior

    def _paths(self, model: Any) -> list[str]:
        """Of the student, those that differ from the teacher."""
        reads = model.speech_llm.lora_scope == "all" and self.cfg.im_weight > 0
        return ["speech", "text"] if reads else ["speech"]

    def _rollouts_of(self, path: str, model: Any, sample: dict[str, Any], training: bool) -> "list[_Rollouts]":
        # An utterance has the key of its first piece of speech.
        keys = [sample["keys"][row.pieces[0]] for row in sample["plan_rows"]]
        # A batch that stands in for another is not trained on.
        lifetime = self.cfg.rollout_lifetime if training and not sample["left_out"] else 1
        if lifetime == 1:
            return self._draw(path, model, sample, list(range(len(keys))), training)
        new = [row for row, key in enumerate(keys) if (path, key) not in self._kept]
        drawn = dict(zip(new, self._draw(path, model, sample, new, training), strict=True))
        used = [drawn[row] if row in drawn else self._kept[path, key] for row, key in enumerate(keys)]
        for key, rollouts in zip(keys, used, strict=True):
            rollouts.uses += 1
            if rollouts.uses < lifetime:
                self._kept[path, key] = rollouts
            else:
                self._kept.pop((path, key), None)
        return used

    def _draw(
        self, path: str, model: Any, sample: dict[str, Any], rows: list[int], training: bool
    ) -> "list[_Rollouts]":
        """New roll-outs of these rows of the batch."""
        if not rows:
            return []
        chosen = [sample["plan_rows"][row] for row in rows]
        conversations = [row.segments for row in chosen]
        if path == "speech":
            pieces = [piece for row in chosen for piece in row.pieces]
            heard = hear(model.speech_llm, **speech_of(sample["net_input"], pieces))
            counts, prompts = heard.counts, build_prompts(model.speech_llm, conversations, heard)
        else:
            transcripts = [transcript for row in chosen for transcript in row.read]
            counts = [len(transcript) for transcript in transcripts]
            prompts = build_prompts(model.speech_llm, conversations, transcripts=transcripts)
        update, copies = model.num_updates if training else -1, self.cfg.rollouts
        names = [sample["rows"][row]["id"] for row in rows]
        seeds = [rollout_seed(self.cfg.seed, path, update, name, j) for name in names for j in range(copies)]
        ids = roll_out(model.speech_llm, self.task.chat, prompts, seeds, self.options)
        remaining = iter(counts)
        return [
            _Rollouts(ids[i * copies : (i + 1) * copies], list(islice(remaining, len(row.pieces))))
            for i, row in enumerate(chosen)
        ]

    def _with_responses(self, model: Any, sample: dict[str, Any], rolled: "Sequence[_Rollouts]") -> Batch:
        """The batch, each conversation with its roll-outs for responses, and as many speech embeddings as then."""
        pairs = list(zip(sample["plan_rows"], rolled, strict=True))
        rows = [replace(row, response=ids) for row, rollouts in pairs for ids in rollouts.ids]
        counts = [count for rollouts in rolled for count in rollouts.counts]
        return plan_batch(rows, counts, share_prefix=model.speech_llm.share_prefix)

    # ---- losses ------------------------------------------------------------------------------------------------

    def _divergence(
        self,
        path: str,
        compared: Distillation,
        batch: Batch,
        model: Any,
        rolled: "list[_Rollouts] | None",
        sums: Sums,
    ) -> Tensor:
        """``[N]`` what is minimised at each position, and sums to log."""
        speech_llm = model.speech_llm
        weight, bias = speech_llm.head
        chunk = chunk_size_on(self.cfg, weight.device)
        transforms = (speech_llm.logit_transform, speech_llm.logit_transform)
        teacher, head = compared.teacher, None
        if self._teacher:
            own = self._teacher[0]
            if own.device != weight.device:
                own.to(weight.device)
            teacher, head = own.teach(batch.teacher).index_select(0, batch.teacher.response), own.head
            transforms = (speech_llm.logit_transform, own.logit_transform)
        assert teacher is not None
        if rolled is None and self.cfg.off_policy_cross_entropy:
            values = linear_cross_entropy(compared.student, compared.targets, weight, bias, chunk, transforms[0])
            divergence = values.sum()
        elif self.cfg.estimator == "exact" or rolled is None:
            values, agrees = linear_jensen_shannon(
                compared.student, teacher, weight, bias, self.cfg.beta, 1.0, chunk, head, *transforms
            )
            divergence = values.sum()
            sums.add(f"{path}_agree", agrees.sum())
            sums.add(f"{path}_compared", float(len(values)))
        else:
            student_log = -linear_cross_entropy(compared.student, compared.targets, weight, bias, chunk, transforms[0])
            with torch.no_grad():
                own_head, own_bias = head or (weight, bias)
                teacher_log = -linear_cross_entropy(teacher, compared.targets, own_head, own_bias, chunk, transforms[1])
            advantage = teacher_log - student_log.detach()
            values = -importance_ratio(student_log, rolled) * advantage
            divergence = -advantage.sum()
        name = path if rolled is not None else f"{path}_off_policy"
        sums.add(f"{name}_divergence_sum", divergence)
        sums.add(f"{name}_tokens", float(len(values)))
        return values

    # ---- logging -----------------------------------------------------------------------------------------------

    def _rollout_figures(self, rolled: "dict[str, list[_Rollouts]]", seconds: float) -> dict[str, float]:
        ids = [one for rollouts in rolled.values() for each in rollouts for one in each.ids]
        ends = set(self.task.chat.eos_ids)
        return {
            "rollouts": float(len(ids)),
            "rollout_tokens": float(sum(map(len, ids))),
            "rollouts_finished": float(sum(one[-1] in ends for one in ids)),
            "rollout_seconds": seconds,
        }

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Logs divergences per token, and what roll-outs are like and cost."""
        logs = logging_outputs
        log_ratio(logs, "loss", "loss", "sample_size")
        log_ratio(logs, "quantity", "quantity_sum", "counted")
        for name in _DIVERGENCES:
            log_ratio(logs, f"{name}_divergence", f"{name}_divergence_sum", f"{name}_tokens")
        for path in _PATHS:
            log_ratio(logs, f"{path}_agreement", f"{path}_agree", f"{path}_compared")
        log_ratio(logs, "rollout_length", "rollout_tokens", "rollouts", round=2)
        log_ratio(logs, "rollout_finished", "rollouts_finished", "rollouts", round=3)
        # Beside fairseq's train_wall, which holds roll-outs and updates.
        workers = get_data_parallel_world_size()
        metrics.log_scalar_sum("rollout_wall", total(logs, "rollout_seconds") / workers, round=1)


_PATHS = ("speech", "text")
# What roll-outs give is one quantity, and the divergence on the manifest's responses another.
_DIVERGENCES = (*_PATHS, *(f"{path}_off_policy" for path in _PATHS))
_SUMS = [
    *(f"{name}_{kind}" for name in _DIVERGENCES for kind in ("divergence_sum", "tokens")),
    *(f"{path}_{kind}" for path in _PATHS for kind in ("agree", "compared")),
    "quantity_sum",
    "counted",
    "count_errors",
]


class _Rollouts:
    """Roll-outs of one utterance.

    Attributes:
        ids: of each.
        counts: embeddings of each of its pieces of speech, as the adapter counted when they were drawn.
        old: log-probabilities [tokens] of each when it was first trained on.
        uses: how often it was trained on.
    """

    def __init__(self, ids: list[list[int]], counts: list[int]) -> None:
        self.ids = ids
        self.counts = counts
        self.old: list[Tensor] | None = None
        self.uses = 0


def importance_ratio(student_log: Tensor, rolled: "Sequence[_Rollouts]") -> Tensor:
    """``[N]`` p_theta / p_old of each token; 1, with the gradient of log p_theta, the first time."""
    parts = student_log.detach().split([len(ids) for rollouts in rolled for ids in rollouts.ids])
    old, start = [], 0
    for rollouts in rolled:
        if rollouts.old is None:
            rollouts.old = list(parts[start : start + len(rollouts.ids)])
        old += rollouts.old
        start += len(rollouts.ids)
    return (student_log - torch.cat(old)).exp()


def _load_teacher(cfg: OnPolicyDistillationConfig, task: Any) -> ChatLLM:
    """Another LLM as teacher.

    Raises:
        ValueError: it cannot be loaded, or has not the student's tokens and ends of turn.
    """
    trusts = getattr(task, "trust_remote_code", False)  # by what the user said of the student
    config = SpeechLlmConfig(
        llm=cfg.teacher_llm,
        llm_dtype=cfg.teacher_llm_dtype,
        llm_quantization=cfg.teacher_llm_quantization,
        trust_remote_code=trusts,
    )
    chat = ChatFormat(load_tokenizer(config, "teacher-llm"), task.chat.system, task.chat.chat_template)
    if chat.tokenizer.get_vocab() != task.chat.tokenizer.get_vocab():
        raise ValueError(
            f"--teacher-llm {cfg.teacher_llm} has another tokenizer than the student's LLM: their tokens cannot be "
            "compared; take a larger model of the same family"
        )
    if chat.eos_ids != task.chat.eos_ids:
        ends = [" ".join(one.tokenizer.convert_ids_to_tokens(one.eos_ids)) for one in (chat, task.chat)]
        raise ValueError(
            f"--teacher-llm {cfg.teacher_llm} ends a turn with {ends[0]}, the student's LLM with {ends[1]}: take two "
            "chat models of the same family (a base model ends otherwise)"
        )
    return ChatLLM(load_llm(config, chat, "teacher-llm")).eval().requires_grad_(False)


def _check(cfg: OnPolicyDistillationConfig) -> None:
    if cfg.estimator not in ESTIMATORS:
        raise ValueError(f"unknown --estimator {cfg.estimator!r}: choose from {', '.join(ESTIMATORS)}")
    if cfg.teacher_llm_dtype not in DTYPES:
        raise ValueError(f"unknown --teacher-llm-dtype {cfg.teacher_llm_dtype!r}: choose from {', '.join(DTYPES)}")
    if cfg.teacher_llm_quantization not in QUANTIZATIONS:
        raise ValueError(
            f"unknown --teacher-llm-quantization {cfg.teacher_llm_quantization!r}: choose from "
            f"{', '.join(QUANTIZATIONS)}"
        )
    for option in ("im_weight", "beta", "off_policy_share"):
        if not 0 <= getattr(cfg, option) <= 1:
            raise ValueError(f"--{option.replace('_', '-')} must be between 0 and 1, got {getattr(cfg, option)}")
    if cfg.estimator == "sampled" and cfg.beta != 1 and cfg.off_policy_share == 0:
        raise ValueError("--beta needs --estimator exact: the sampled estimator is one of the reverse KL (beta 1)")
    if cfg.off_policy_cross_entropy and cfg.off_policy_share == 0:
        raise ValueError("--off-policy-cross-entropy needs updates on tgt_text: give --off-policy-share above 0")
    if cfg.rollout_lifetime < 1:
        raise ValueError(f"--rollout-lifetime must be at least 1, got {cfg.rollout_lifetime}")
    if cfg.rollout_lifetime > 1 and get_data_parallel_world_size() > 1:
        raise ValueError(
            "--rollout-lifetime above 1 needs a single process: each keeps its own roll-outs, and shuffling moves the "
            "utterances from one to another"
        )
    if cfg.quantity_weight < 0:
        raise ValueError(f"--quantity-weight must not be negative, got {cfg.quantity_weight}")
