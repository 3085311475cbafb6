"""The fairseq task ``blsp_kd``: manifests in, answers out."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fairseq import utils
from fairseq.dataclass import FairseqDataclass
from fairseq.distributed.utils import get_data_parallel_world_size
from fairseq.logging import metrics
from fairseq.tasks import register_task
from omegaconf import II, MISSING
from torch import Tensor

from blspkd_fairseq import compat
from blspkd_fairseq.data.augment import Augmenter, parse_augmentation
from blspkd_fairseq.data.batch import SpeechLengths
from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.data.dataset import SpeechTextDataset, load_manifest, transcripts_of
from blspkd_fairseq.data.feature_store import FeatureStore, with_features
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.data.prompts import resolve_prompt
from blspkd_fairseq.evaluation.metrics import BleuCounts, bleu_counts, bleu_score, word_errors
from blspkd_fairseq.faults.errors import DoesNotFit, TrainingError, is_out_of_memory, listed, names_of
from blspkd_fairseq.faults.limits import FaultLimits, check_limits
from blspkd_fairseq.faults.update import UpdateGuard
from blspkd_fairseq.generation.decoding import DecodingOptions, answer_where_it_fits, context_of
from blspkd_fairseq.generation.fairseq_generator import LlmDictionary
from blspkd_fairseq.generation.hearing import hear, speech_of
from blspkd_fairseq.modules.build import adopt_options
from blspkd_fairseq.modules.fingerprint import identity
from blspkd_fairseq.modules.speech_llm import SpeechLLM
from blspkd_fairseq.modules.trained_state import deepen_adapter, load_trained_state_dict, read_trained
from blspkd_fairseq.modules.whisper_encoder import SAMPLES_PER_FRAME
from blspkd_fairseq.tasks.answering import AnsweringTask

logger = logging.getLogger(__name__)

_BLEU_ORDER = 4


@dataclass
class DataOptions:
    """Data."""

    data: str = field(
        default=MISSING,
        metadata={"help": "folder with train.tsv, valid.tsv, ...; a:b:c takes train.tsv of one folder each epoch"},
    )
    audio_root: str = field(default="", metadata={"help": "folder of relative audio paths (default: the manifest's)"})
    feature_store: str = field(
        default="",
        metadata={
            "help": "folder of --cache-encoder-features, which trainings on the same audio may share (default: "
            "encoder-features in --audio-root or the data folder)"
        },
    )
    prompt: str = field(
        default="continue",
        metadata={
            "help": "instruction for rows without a prompt: a name (continue, repeat, ...) or a text with {speech}"
        },
    )
    max_audio_seconds: float = field(
        default=30.0,
        metadata={"help": "longest utterance; training hears 30 s at most, generation any length, in windows"},
    )
    skip_bad_audio: bool = field(
        default=False,
        metadata={
            "help": "leave out training rows whose audio is too long, or else missing or unreadable, of which "
            "--max-bad-audio says how many, and say so"
        },
    )
    max_response_tokens: int = field(
        default=1024,
        metadata={
            "help": "longest response that is trained on, in tokens: the rest of a longer tgt_text is cut off, and "
            "that is said (0: never)"
        },
    )


@dataclass
class AugmentationOptions:
    """Augmentation."""

    augment: str = field(
        default="",
        metadata={
            "help": "change the sound of training speech anew in every epoch: all, or kinds with a probability, such "
            "as speed:0.5,reverb:0.25,noise:0.3,babble:0.3,band:0.15,gain:1 (which is all)"
        },
    )
    augment_variants: int = field(
        default=0,
        metadata={
            "help": "--augment makes so many versions of each utterance, which take turns, so that "
            "--cache-encoder-features hears each of them once (0: a new one in every epoch)"
        },
    )
    augment_seed: int = II("common.seed")


@dataclass
class EvaluationOptions:
    """Evaluation. In validation, and by fairseq-generate."""

    eval_wer: bool = field(
        default=False, metadata={"help": "validation: WER of repeating the transcript (wer, wer_raw)"}
    )
    eval_wer_prompt: str = field(default="repeat", metadata={"help": "instruction for --eval-wer"})
    eval_bleu: bool = field(default=False, metadata={"help": "validation: BLEU of the answer against tgt_text"})
    eval_bleu_prompt: str = field(
        default="", metadata={"help": "instruction for --eval-bleu (default: each row's own)"}
    )
    eval_max_tokens: int = field(default=128, metadata={"help": "longest answer in validation, in tokens"})
    results_jsonl: str = field(
        default="",
        metadata={
            "help": "file for fairseq-generate's answers with the manifest's ids, as lines of JSON "
            "(default: generate-SUBSET.jsonl in --results-path)"
        },
    )


@dataclass
class BlspKdConfig(FaultLimits, EvaluationOptions, AugmentationOptions, DataOptions, FairseqDataclass):
    """Options of ``--task blsp_kd``."""

    pretrained_model: str = field(
        default="",
        metadata={
            "help": "begin with the trained parts of this model: a folder of save_pretrained or a checkpoint; options "
            "of adapter, LoRA and base models that are not given are its own. Adapter layers beyond its own begin by "
            "adding nothing"
        },
    )


@register_task("blsp_kd", dataclass=BlspKdConfig)
class BlspKdTask(AnsweringTask):
    """Distils a text LLM into its own reading of speech; see the README."""

    cfg: BlspKdConfig

    def __init__(self, cfg: BlspKdConfig, **_: Any) -> None:
        super().__init__(cfg)
        self.dictionary = LlmDictionary()
        self.trust_remote_code = False  # of the user, for a teacher as for the student
        self._augmenter = _augmenter(cfg)
        self._needed_texts: tuple[str, ...] = ()
        self._reads_responses = True
        self._loaded_split = ""
        self._train_split = ""
        self._model: SpeechLLM | None = None  # that was built last
        self._keeps_features = False
        self._store: FeatureStore | None = None
        self._measured: SpeechTextDataset | None = None  # training data whose size in the store was said
        check_limits(cfg)
        self.guard = UpdateGuard(cfg, self._halve, self._trained_parameters)

    @classmethod
    def setup_task(cls, cfg: BlspKdConfig, from_checkpoint: bool = False, **_: Any) -> "BlspKdTask":
        """Begins a command.

        Raises:
            ValueError: an option of fairseq that does not go with what is trained here.
        """
        compat.attend_commands()
        compat.go_on_exactly()
        compat.refuse_precision_of_command(cfg, from_checkpoint)
        task = cls(cfg)
        command = cfg._get_parent() if hasattr(cfg, "_get_parent") and not from_checkpoint else None
        if command is not None and command.common_eval.path:
            task.command = command
        return task

    # ---- model, criterion --------------------------------------------------------------------------------------

    @property
    def chat(self) -> ChatFormat:
        """Chat format of the LLM; comes with the model."""
        return self.dictionary._chat

    @property
    def source_dictionary(self) -> None:
        """Speech has none."""
        return None

    @property
    def target_dictionary(self) -> LlmDictionary:
        return self.dictionary

    def max_positions(self) -> None:
        """As of the model."""
        return None

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        self._keeps_features = cfg.cache_encoder_features
        if self.cfg.feature_store and not self._keeps_features and not from_checkpoint:
            raise ValueError("--feature-store is the folder of --cache-encoder-features: give both or none of them")
        self.trust_remote_code = cfg.trust_remote_code
        endless = self._augmenter is not None and not self._augmenter.variants
        if endless and self._keeps_features and not from_checkpoint:
            raise ValueError(
                "--augment changes the sound in every epoch, and --cache-encoder-features has each utterance heard "
                "once: give --augment-variants, or leave out one of them"
            )
        begin = "" if from_checkpoint else self.cfg.pretrained_model
        trained = read_trained(Path(begin)) if begin else None
        if trained is not None:
            adopted = adopt_options(cfg, trained[0])
            options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in adopted.items())
            logger.info(f"of --pretrained-model: {options or 'no option'}")
        model = super().build_model(cfg, from_checkpoint)
        if trained is not None:
            load_trained_state_dict(model.speech_llm, deepen_adapter(model.speech_llm, trained[1]))
        self.dictionary.chat = model.chat
        self._model = model.speech_llm
        return model

    def build_criterion(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        criterion = super().build_criterion(cfg, from_checkpoint)
        if self._model is not None and hasattr(criterion, "check_model"):
            criterion.check_model(self._model)
        needs = getattr(criterion, "needs_responses", False)
        self._needed_texts = ("src_text", "tgt_text") if needs else ("src_text",)
        self._reads_responses = getattr(criterion, "reads_responses", needs)
        return criterion

    # ---- data --------------------------------------------------------------------------------------------------

    def load_dataset(self, split: str, combine: bool = False, task_cfg: Any = None, epoch: int = 1, **_: Any) -> None:
        """Reads ``<data>/<split>.tsv``.

        Raises:
            ManifestError: the manifest is missing or wrong; it names the row and the remedy.
        """
        paths = utils.split_paths(self.cfg.data)
        is_train = combine or split.startswith("train")  # fairseq combines what it trains on, whatever its name
        folder = Path(paths[(epoch - 1) % len(paths)] if is_train else paths[0])
        manifest = load_manifest(folder / f"{split}.tsv", self._needed_texts)
        dataset_class, options = self.dataset_class()
        self.datasets[split] = dataset_class(
            manifest,
            self.chat,
            prompt=self.cfg.prompt,
            audio_root=Path(self.cfg.audio_root) if self.cfg.audio_root else None,
            shuffle=is_train,
            skip_bad_audio=self.cfg.skip_bad_audio and is_train,
            lengths=SpeechLengths() if self._model is None else self._model.speech_lengths,
            with_response=self._reads_responses,
            share_prefix=self._model is None or self._model.share_prefix,
            max_response_tokens=self.cfg.max_response_tokens,
            augmenter=self._augmenter if is_train else None,
            **options,
        )
        self._loaded_split = split
        if is_train:
            self._train_split = split
            self.datasets[split].store = self._store  # from the second folder of the data on

    @property
    def max_samples(self) -> int | None:
        return None if self._model is None else self._model.speech_encoder.max_samples

    @property
    def context(self) -> int | None:
        return None if self._model is None else context_of(self._model)

    def training_tokens(self) -> Tensor:
        """Sorted ids of all tokens that occur in the training transcripts, in all folders of the data."""
        tokens: set[int] = set()
        split = self._train_split or "train"  # fairseq-validate loads none to train on
        for folder in utils.split_paths(self.cfg.data):
            for row in Manifest.load(Path(folder) / f"{split}.tsv"):
                for transcript in transcripts_of(row):
                    tokens.update(self.chat.encode_transcript(transcript))
        return torch.tensor(sorted(tokens), dtype=torch.long)

    def get_batch_iterator(self, *args: Any, **options: Any) -> Any:
        """As fairseq's, with a time limit for the processes that read."""
        iterator = super().get_batch_iterator(*args, **options)
        iterator.timeout = self.cfg.loader_timeout if iterator.num_workers else 0
        return iterator

    # ---- the encoder's frames ----------------------------------------------------------------------------------

    def begin_epoch(self, epoch: int, model: Any) -> None:
        """With --cache-encoder-features, the training data looks for frames in the store from here on.

        Raises:
            FeatureStoreError: the store cannot be written, or the frames do not fit.
        """
        super().begin_epoch(epoch, model)
        compat.refuse_lonely_processes()
        data = self.datasets[self._train_split]
        self.guard.left_out.begin_epoch(str(data.manifest.path), len(data))
        if not self._keeps_features:
            return
        if self._store is None:
            self._store = self._open_store(model.speech_llm)
        if data is not self._measured:
            versions = 1 if self._augmenter is None else self._augmenter.variants
            self._store.check_room(data.encoder_frames(SAMPLES_PER_FRAME) * self._store.frame_size * versions)
            self._measured = data
        self._store.refresh()  # what other ranks have heard, before workers are forked
        data.store = self._store

    def _open_store(self, model: SpeechLLM) -> FeatureStore:
        encoder = model.speech_encoder
        folder = self.cfg.feature_store or Path(
            self.cfg.audio_root or utils.split_paths(self.cfg.data)[0], "encoder-features"
        )
        return FeatureStore(Path(folder), identity(encoder, *encoder.settings), encoder.output_dim)

    def _with_features(self, sample: dict[str, Any], model: Any) -> dict[str, Any]:
        """Pieces of speech that the store has not are heard now, before any loss, and kept."""
        if self._store is None:
            return sample

        def encode(*speech: Any) -> Tensor:
            with torch.no_grad():
                frames: Tensor = model.speech_llm.encode(*speech).values
            return frames

        return with_features(sample, encode, self._store, SAMPLES_PER_FRAME)

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def get_checkpoint_dict(self) -> dict[str, Any]:
        """What fairseq saves beside its own state, and gives back to :meth:`set_checkpoint_dict`."""
        return {type(self).__name__: compat.training_state()}

    def set_checkpoint_dict(self, state: dict[str, Any]) -> None:
        compat.restore_training_state(state)

    # ---- steps -------------------------------------------------------------------------------------------------

    def train_step(
        self, sample: dict[str, Any], model: Any, criterion: Any, optimizer: Any, update_num: int,
        ignore_grad: bool = False,
    ) -> tuple[Tensor, int, dict[str, Any]]:  # fmt: skip
        """A batch that stands in for another (rows left out, a process that has none left) has no weight.

        Raises:
            DoesNotFit: there is no memory for it.
        """
        ignored = ignore_grad or sample["left_out"]

        def finite(*args: Any) -> tuple[Tensor, int, dict[str, Any]]:
            """What is no number becomes none in the gradient, too, which all processes see."""
            loss, sample_size, log = criterion(*args)
            if not ignored and not self.guard.saw_loss(sample, log["loss"]):
                loss = loss * math.nan
            return loss, sample_size, log

        try:
            ready = self._with_features(sample, model)
            loss, sample_size, log = super().train_step(ready, model, finite, optimizer, update_num, ignored)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            why = str(error).strip().partition("\n")[0]
        else:
            return (loss, 0, dict.fromkeys(log, 0)) if ignored else (loss, sample_size, log)
        raise DoesNotFit(names_of(sample), why)  # behind the exception, whose traceback holds the batch's tensors

    def valid_step(self, sample: dict[str, Any], model: Any, criterion: Any) -> tuple[Any, int, dict[str, Any]]:
        if not sample or not sample["nsentences"]:
            return torch.zeros(()), 0, {}
        sample = self._with_features(sample, model)  # if the training data is what is validated on
        loss, sample_size, log = super().valid_step(sample, model, criterion)
        if not math.isfinite(log["loss"]):
            raise TrainingError(
                f"validation has a loss of {log['loss']} in the batch of {listed(names_of(sample))}: look at these "
                "rows, or go on from an earlier checkpoint (--restore-file) with a smaller --lr"
            )
        if self.cfg.eval_wer:
            log |= self._wer_sums(sample, model)
        if self.cfg.eval_bleu:
            log |= self._bleu_sums(sample, model)
        return loss, sample_size, log

    def end_epoch(self, epoch: int) -> None:
        """Sums up what was left out of an epoch of training.

        Raises:
            TrainingError: it was too much.
        """
        self.guard.end_epoch(epoch, _of_all_processes)

    def _halve(self, sample: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows of a training batch, read again as two batches; none of a single row."""
        places, data = sample["id"].tolist(), self.datasets[self._train_split]
        middle = (len(places) + 1) // 2
        parts = (places[:middle], places[middle:]) if middle < len(places) else ()
        return [data.collater([data[place] for place in part]) for part in parts]

    def _trained_parameters(self) -> list[tuple[str, Tensor]]:
        named = [] if self._model is None else self._model.named_parameters()
        return [(name, parameter) for name, parameter in named if parameter.requires_grad]

    def _answers(self, sample: dict[str, Any], model: Any, prompt: str, rows: Sequence[int]) -> list[str]:
        """Greedy answers to rows of a batch: to ``prompt``, conversations to what they ask, all of them without one."""
        chosen = [sample["plan_rows"][row] for row in rows]
        prompts: list[Any] = [row.segments for row in chosen]
        for place, cells in enumerate(sample["rows"][row] for row in rows):
            if prompt and not cells.get("conversation"):
                prompts[place] = resolve_prompt(prompt, cells.get("src_lang", ""), cells.get("tgt_lang", ""))
        pieces = [piece for row in chosen for piece in row.pieces]
        speech = speech_of(sample["net_input"], pieces)
        options = DecodingOptions(max_new_tokens=self.cfg.eval_max_tokens)
        groups = answer_where_it_fits(model.speech_llm, self.chat, hear(model.speech_llm, **speech), prompts, options)
        for row, group in zip(rows, groups, strict=True):
            if isinstance(group, str):
                logger.warning(f"no answer to {sample['rows'][row]['id']} of the validation set: {group}")
        return ["" if isinstance(group, str) else group[0].text for group in groups]

    def _wer_sums(self, sample: dict[str, Any], model: Any) -> dict[str, float]:
        sums = dict.fromkeys(("_wer_errors", "_wer_words", "_wer_raw_errors", "_wer_raw_words"), 0.0)
        # Of several pieces of speech none is the one to repeat.
        rows = [i for i, row in enumerate(sample["rows"]) if not row.get("conversation")]
        answers = self._answers(sample, model, self.cfg.eval_wer_prompt, rows) if rows else []
        for row, answer in zip((sample["rows"][i] for i in rows), answers, strict=True):
            for name, normalize in (("wer", True), ("wer_raw", False)):
                count = word_errors(answer, row["src_text"], row.get("src_lang", ""), normalize)
                sums[f"_{name}_errors"] += count.errors
                sums[f"_{name}_words"] += count.words
        return sums

    def _bleu_sums(self, sample: dict[str, Any], model: Any) -> dict[str, float]:
        rows = sample["rows"]
        answers = self._answers(sample, model, self.cfg.eval_bleu_prompt, range(len(rows)))
        sums: Counter[str] = Counter()
        for language in dict.fromkeys(row.get("tgt_lang", "") for row in rows):
            own = [place for place, row in enumerate(rows) if row.get("tgt_lang", "") == language]
            references = [rows[place]["tgt_text"] for place in own]
            counts = bleu_counts([answers[place] for place in own], references, language)
            sums.update({"_bleu_hyp": counts.hypothesis_length, "_bleu_ref": counts.reference_length})
            for n in range(_BLEU_ORDER):
                sums.update({f"_bleu_correct_{n}": counts.correct[n], f"_bleu_total_{n}": counts.total[n]})
        return {name: float(count) for name, count in sums.items()}

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        super().reduce_metrics(logging_outputs, criterion)
        for key in {key for log in logging_outputs for key in log if key.startswith(("_wer", "_bleu"))}:
            metrics.log_scalar(key, float(sum(log.get(key, 0) for log in logging_outputs)))
        if any(log.get("_wer_words") for log in logging_outputs):  # else there was no row to repeat
            metrics.log_derived("wer", lambda meters: _rate(meters, "_wer_errors", "_wer_words"))
            metrics.log_derived("wer_raw", lambda meters: _rate(meters, "_wer_raw_errors", "_wer_raw_words"))
        if any("_bleu_ref" in log for log in logging_outputs):
            metrics.log_derived("bleu", _bleu_of_meters)


def _augmenter(cfg: BlspKdConfig) -> Augmenter | None:
    """What changes the sound of training speech, if anything does."""
    if cfg.augment_variants < 0:
        raise ValueError(f"--augment-variants must not be negative, got {cfg.augment_variants}")
    if cfg.augment_variants and not cfg.augment:
        raise ValueError("--augment-variants are versions that --augment makes: give both, or leave it out")
    if not cfg.augment:
        return None
    return Augmenter(parse_augmentation(cfg.augment), cfg.augment_seed, cfg.augment_variants)


def _of_all_processes(own: list[Any]) -> list[Any]:
    """The lists of all processes, one after another."""
    world_size = get_data_parallel_world_size()
    if world_size == 1:
        return own
    lists: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(lists, own)
    return [one for each in lists for one in each]


def _rate(meters: Any, errors: str, words: str) -> float:
    """Errors in percent of the words."""
    return round(100.0 * meters[errors].sum / max(1.0, meters[words].sum), 2)


def _bleu_of_meters(meters: Any) -> float:
    counts = BleuCounts(
        [int(meters[f"_bleu_correct_{n}"].sum) for n in range(_BLEU_ORDER)],
        [int(meters[f"_bleu_total_{n}"].sum) for n in range(_BLEU_ORDER)],
        int(meters["_bleu_hyp"].sum),
        int(meters["_bleu_ref"].sum),
    )
    return round(bleu_score(counts), 2)
