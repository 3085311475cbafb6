"""The part of the task that fairseq-generate and fairseq-interactive use."""

from __future__ import annotations

import ast
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fairseq.tasks import FairseqTask
from torch import Tensor

from blspkd_fairseq.compat import generation as compat_generation
from blspkd_fairseq.data.audio import SAMPLE_RATE
from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.data.dataset import SpeechDataset, SpeechTextDataset
from blspkd_fairseq.data.prompts import resolve_prompt
from blspkd_fairseq.generation.decoding import DecodingOptions
from blspkd_fairseq.generation.fairseq_generator import LlmGenerator
from blspkd_fairseq.generation.fairseq_rows import LinesToAnswer, RowsToAnswer
from blspkd_fairseq.generation.results import Results


class AnsweringTask(FairseqTask):
    """Answers rows of manifests and lines of audio files.

    Attributes:
        command: options of the whole command, if it is one that generates (with --path); else None.
    """

    cfg: Any
    command: Any = None
    _loaded_split = ""
    _generator: LlmGenerator | None = None

    @property
    def chat(self) -> ChatFormat:
        """Chat format of the LLM."""
        raise NotImplementedError

    @property
    def max_samples(self) -> int | None:
        """What the model hears at once; None before there is one."""
        raise NotImplementedError

    @property
    def context(self) -> int | None:
        """Tokens that the LLM reads; None before there is one, or where it does not say."""
        raise NotImplementedError

    def dataset_class(self) -> tuple[Callable[..., SpeechTextDataset], dict[str, Any]]:
        """The data set of this command and its own options."""
        if self.command is None:  # what is trained on is heard at once
            most = math.inf if self.max_samples is None else self.max_samples / SAMPLE_RATE
            return SpeechTextDataset, {"max_seconds": min(self.cfg.max_audio_seconds, most), "context": self.context}
        shard, shards = self.command.dataset.shard_id, self.command.dataset.num_shards
        if not 0 <= shard < shards:
            raise ValueError(f"--shard-id must be between 0 and --num-shards - 1 = {shards - 1}, got {shard}")
        return RowsToAnswer, {
            "max_seconds": self.cfg.max_audio_seconds,
            "shard": (shard, shards),
            "scoring": self.command.scoring,
        }

    def get_batch_iterator(self, dataset: Any, *args: Any, **options: Any) -> Any:
        """No row is left out of it: fairseq's training skips what is longer than --max-tokens, and asserts elsewhere.

        Raises:
            ManifestError: a row is longer than --max-tokens.
        """
        if isinstance(dataset, SpeechTextDataset):
            options["max_positions"] = None  # in which fairseq's training puts --max-tokens
        batches = super().get_batch_iterator(dataset, *args, **options)
        if isinstance(dataset, RowsToAnswer):
            begin = batches.next_epoch_itr
            batches.next_epoch_itr = lambda **given: _ThenFinish(lambda: begin(**given), len(batches), self._finish)
        return batches

    def build_generator(self, models: Any, args: Any, *_: Any, **__: Any) -> LlmGenerator:
        """Maps fairseq's generation options to the LLM's decoding, and opens what is kept of an earlier run.

        Raises:
            ValueError: an option that has no counterpart there.
            StoreError: what is kept was made with other options.
        """
        options = decoding_options(args)
        if self.command is None:
            raise ValueError("fairseq-generate and fairseq-interactive generate answers, and BlspKd does in Python")
        rows = self.datasets.get(self._loaded_split)
        if rows is None:
            rows = self._lines()
            compat_generation.after_input(self._finish)
        seed = None if args.no_seed_provided else self.command.common.seed
        results = Results(self._results_path(), lambda: self._identity(options, seed))
        compat_generation.at_end(results.close)
        rows.known = results.known
        self._generator = LlmGenerator(self.chat, options, results, rows, seed)
        return self._generator

    def _lines(self) -> LinesToAnswer:
        """For fairseq-interactive, which has audio alone; rows of a manifest bring their prompts and languages."""
        root = Path(self.cfg.audio_root) if self.cfg.audio_root else None
        prompt, limit = resolve_prompt(self.cfg.prompt), self.command.dataset.max_tokens
        return LinesToAnswer(prompt, root, self.cfg.max_audio_seconds, limit)

    def _finish(self) -> None:
        """Writes the results when everything is answered.

        Raises:
            UnansweredError: rows have no answer.
        """
        assert self._generator is not None
        self._generator.results.finish(self._generator.source.records())
        if self._loaded_split and not self._generator.source.records():
            compat_generation.end_without_rows()

    def _results_path(self) -> Path | None:
        name = f"generate-{self._loaded_split}.jsonl" if self._loaded_split else "interactive.jsonl"
        shard, shards = self.command.dataset.shard_id, self.command.dataset.num_shards
        if self.cfg.results_jsonl:
            path = Path(self.cfg.results_jsonl)
            return path.parent / compat_generation.shard_folder(shard, shards) / path.name
        folder = self.command.common_eval.results_path  # already the shard's
        return Path(folder) / name if folder else None

    def _identity(self, options: DecodingOptions, seed: int | None) -> dict[str, Any]:
        """What answers depend on besides their rows."""
        overrides = ast.literal_eval(self.command.common_eval.model_overrides)
        template = self.chat.chat_template or self.chat.tokenizer.chat_template
        return {
            "checkpoint": _digest(self.command.common_eval.path),
            "model_overrides": {name: value for name, value in overrides.items() if name != "trust_remote_code"},
            "system": self.chat.system,
            "chat_template": hashlib.sha256(repr(template).encode()).hexdigest()[:16],
            "decoding": asdict(options),
            "seed": seed if options.sampling else None,
        }

    def get_interactive_tokens_and_lengths(
        self, lines: list[str], encode_fn: Callable[[str], str]
    ) -> tuple[list[Tensor], list[int]]:
        """Reads the audio files that the lines name."""
        waveforms = self._interactive.read(lines)
        return waveforms, [len(waveform) for waveform in waveforms]

    def build_dataset_for_inference(self, src_tokens: list[Tensor], src_lengths: list[int], **_: Any) -> SpeechDataset:
        return self._interactive.dataset(src_tokens, src_lengths)

    @property
    def _interactive(self) -> LinesToAnswer:
        assert self._generator is not None and isinstance(self._generator.source, LinesToAnswer)
        return self._generator.source


class _ThenFinish:
    """Batches, and then ``finish``: before fairseq-generate gives a score."""

    n = 0  # for fairseq's progress bars

    def __init__(self, begin: Callable[[], Iterable[Any]], count: int, finish: Callable[[], None]) -> None:
        self.begin = begin
        self.count = count
        self.finish = finish

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        yield from self.begin()  # only now: what is answered already is known
        self.finish()


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def decoding_options(args: Any) -> DecodingOptions:
    """fairseq's generation options as the LLM's; see :meth:`BlspKdTask.build_generator`."""
    unsupported = {
        "--max-len-a": args.max_len_a != 0,
        "--prefix-size": args.prefix_size > 0,
        "--score-reference": args.score_reference,
        "--match-source-len": args.match_source_len,
        "--diverse-beam-groups": args.diverse_beam_groups > 0,
        "--constraints": bool(args.constraints),
        "--lm-path": bool(args.lm_path),
        "--print-alignment": bool(args.print_alignment),
        "--replace-unk": bool(args.replace_unk),
        "--temperature without --sampling": args.temperature != 1.0 and not args.sampling,
    }
    refused = [name for name, given in unsupported.items() if given]
    if refused:
        raise ValueError(f"{', '.join(refused)}: not supported by task blsp_kd, whose answers the LLM itself decodes")
    return DecodingOptions(
        beam=args.beam,
        n_best=args.nbest,
        sampling=args.sampling,
        temperature=args.temperature,
        top_k=max(0, args.sampling_topk),
        top_p=args.sampling_topp if args.sampling_topp > 0 else 1.0,
        max_new_tokens=args.max_len_b,
        min_new_tokens=min(args.min_len, args.max_len_b),
        length_penalty=0.0 if args.unnormalized else args.lenpen,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
    )
