"""How soon an answer begins and how fast it goes on: this project's streaming, transformers' generate, the cascade.

    python scripts/bench_inference.py --out scripts/bench_inference.csv
    python scripts/bench_inference.py --model checkpoints/checkpoint_best.pt --whisper openai/whisper-small

"stream" hears the speech and answers through `StreamingDecoder`; "generate" hears it in the same way and gives the same
prompt to transformers' `generate`; "cascade" transcribes with Whisper and gives the transcript to `generate`. All write
as many tokens. "feed" is "stream" of one utterance that was heard while it was spoken: its times begin with the last
tenth of a second of speech. Rounds alternate between the systems; medians. Seconds of the CPU stand beside those of the
clock, which other programs make longer.

"stream" hears and reads some of a batch at each step, so that its first rows answer while others are heard: the first
token is the earliest row's, `all_first_tokens_cpu_s` is when every row has one, and the rate of decoding is that of the
steps in which all rows get a token and nothing else is done.
"""

import argparse
import copy
import csv
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bench_modules import cpu_name
from transformers import LogitsProcessor, LogitsProcessorList

from blspkd_fairseq.base_models import PUBLISHED, load_published
from blspkd_fairseq.cache import default_cache
from blspkd_fairseq.data.audio import SAMPLE_RATE, load_audio
from blspkd_fairseq.data.conversation import one_turn
from blspkd_fairseq.data.windows import WindowCutter
from blspkd_fairseq.generation.decoding import build_prompts
from blspkd_fairseq.generation.hearing import hear_windows
from blspkd_fairseq.generation.streaming import Request, Sampling, StreamingDecoder
from blspkd_fairseq.hub import BlspKd
from blspkd_fairseq.session import WINDOW_SECONDS
from blspkd_fairseq.systems.systems import WhisperTranscriber

CHUNK = SAMPLE_RATE // 10


class Times(NamedTuple):
    """Seconds by the clock and of the CPU.

    Attributes:
        first, cpu_first: from the begin to the first token; last, cpu_last: to the last one.
        cpu_all: until every row has its first token.
        cpu_step: of a step in which every row gets a token; NaN where there was none.
    """

    first: float
    last: float
    cpu_first: float
    cpu_last: float
    cpu_all: float
    cpu_step: float


class Clock:
    """Notes when tokens are there."""

    def __init__(self) -> None:
        self.begin = self.now()
        self.first: tuple[float, float] | None = None
        self.steps: list[float] = []  # CPU seconds at which every row had a token more

    @staticmethod
    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def token(self, of_every_row: bool = True) -> None:
        now = self.now()
        self.first = self.first or now
        if of_every_row:
            self.steps.append(now[1])

    def times(self) -> Times:
        (wall, cpu), (first, cpu_first), (last, cpu_last) = self.begin, self.first or self.now(), self.now()
        steps = self.steps or [cpu_last]
        step = (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 1 else math.nan
        return Times(first - wall, last - wall, cpu_first - cpu, cpu_last - cpu, steps[0] - cpu, step)


class FirstToken(LogitsProcessor):
    """Tells the clock that the logits of a token are there."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.clock.token()
        return scores


class Bench:
    """A model whose answers do not end, and Whisper."""

    def __init__(self, model: BlspKd, whisper: str, tokens: int) -> None:
        self.model = model
        self.chat: Any = copy.copy(model.chat_format)
        self.chat.eos_ids = []
        self.tokens = tokens
        self.segments = model.chat_format.render(one_turn("{speech}"))
        self.transcriber = WhisperTranscriber(whisper)

    def stream(self, speech: list[np.ndarray]) -> Times:
        decoder = StreamingDecoder(self.model.model, self.chat, kept_bytes=0)
        clock = Clock()
        for waveform in speech:
            windows = self.model.windows((waveform, SAMPLE_RATE))
            decoder.add(Request(self.segments, [windows], Sampling(max_new_tokens=self.tokens)))
        return self._steps(decoder, clock)

    def feed(self, speech: list[np.ndarray]) -> Times:
        (waveform,) = speech
        decoder = StreamingDecoder(self.model.model, self.chat)
        cutter, windows = WindowCutter(min(WINDOW_SECONDS, self.model.window_seconds)), []
        last = len(waveform) - CHUNK
        for begin in range(0, last, CHUNK):
            complete = cutter.feed(waveform[begin : min(begin + CHUNK, last)])
            windows += complete
            if complete:
                decoder.read_ahead(Request(self.segments, [windows]))
        clock = Clock()
        windows += [*cutter.feed(waveform[last:]), *cutter.flush()]
        decoder.add(Request(self.segments, [windows], Sampling(max_new_tokens=self.tokens)))
        return self._steps(decoder, clock)

    def generate(self, speech: list[np.ndarray]) -> Times:
        clock = Clock()
        model = self.model.model
        heard = hear_windows(model, [self.model.windows((one, SAMPLE_RATE)) for one in speech])
        prompts = build_prompts(model, [self.segments] * len(speech), heard)
        return self._generate(clock, inputs_embeds=prompts.embeds, attention_mask=prompts.valid)

    def cascade(self, speech: list[np.ndarray]) -> Times:
        clock = Clock()
        texts = self.transcriber.transcribe(speech, ["en"] * len(speech))
        conversations = [self.segments] * len(speech)
        ids = [self.chat.encode_text(text) for text in texts]
        prompts = build_prompts(self.model.model, conversations, transcripts=ids, student=False)
        return self._generate(clock, inputs_embeds=prompts.embeds, attention_mask=prompts.valid)

    def _steps(self, decoder: StreamingDecoder, clock: Clock) -> Times:
        rows = decoder.active
        while decoder.active:
            decoder.step()
            if answering := sum(row.answered > 0 for group in decoder._groups for row in group.rows):
                clock.token(of_every_row=answering == rows)
        return clock.times()

    @torch.no_grad()
    def _generate(self, clock: Clock, **prompts: torch.Tensor) -> Times:
        self.model.model.llm.generate(
            **prompts,
            do_sample=False,
            max_new_tokens=self.tokens,
            min_new_tokens=self.tokens,
            logits_processor=LogitsProcessorList([FirstToken(clock)]),
        )
        return clock.times()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    model = load_published() if args.model is None else BlspKd.from_pretrained(args.model)
    bench = Bench(model, args.whisper, args.tokens)
    rows = []
    for run in (bench.stream, bench.feed, bench.generate, bench.cascade):
        run([recording(3.0, 0)])  # what is made at a first time is not counted
    for batch in args.batch:
        for seconds in args.seconds:
            systems = {name: getattr(bench, name) for name in ("stream", "generate", "cascade")}
            if batch == 1:
                systems["feed"] = bench.feed
            rows += measure(systems, seconds, batch, args)
            for row in rows[-len(systems) :]:
                print(*(f"{name} {value}" for name, value in row.items()), sep="  ", flush=True)
            if args.out:
                write(args.out, rows)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the model that the package carries")
    parser.add_argument("--whisper", default=str(default_cache() / "whisper-tiny.en"), help="of the cascade")
    parser.add_argument("--seconds", type=float, nargs="+", default=[3, 10, 30], help="of speech, 30 at most")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="CSV, replaced")
    return parser.parse_args()


def measure(
    systems: dict[str, Callable[[list[np.ndarray]], Times]], seconds: float, batch: int, args: argparse.Namespace
) -> list[dict[str, str]]:
    speech = [recording(seconds, number) for number in range(batch)]
    found: dict[str, list[Times]] = {name: [] for name in systems}
    for _ in range(args.rounds):
        for name, run in systems.items():
            found[name].append(run(speech))
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{cpu_name()} ({torch.get_num_threads()} threads)"
    medians = {name: Times(*map(statistics.median, zip(*times, strict=True))) for name, times in found.items()}

    def first_of(times: Times) -> float:
        return times.first if cuda else times.cpu_first  # which other programs make no longer

    return [
        {
            "model": Path(args.model or PUBLISHED).name,
            "device": device,
            "seconds": f"{seconds:g}",
            "batch": str(batch),
            "system": name,
            "first_token_s": f"{times.first:.3f}",
            "first_token_cpu_s": f"{times.cpu_first:.3f}",
            "all_first_tokens_cpu_s": f"{times.cpu_all:.3f}",
            "tokens_per_s": f"{batch * args.tokens / times.last:.1f}",
            "tokens_per_cpu_s": f"{batch * args.tokens / times.cpu_last:.1f}",
            "decoding_tokens_per_cpu_s": f"{batch / times.cpu_step:.1f}",
            "first_token_ratio": f"{first_of(times) / first_of(medians['stream']):.2f}",
        }
        for name, times in medians.items()
    ]


def recording(seconds: float, number: int) -> np.ndarray:
    """The published model's example again and again with short pauses, from another place each time."""
    sentence = np.concatenate([load_audio(PUBLISHED / "example.flac"), np.zeros(SAMPLE_RATE // 3, np.float32)])
    samples = int(seconds * SAMPLE_RATE)
    whole = np.tile(sentence, 2 + samples // len(sentence))
    begin = number * 1999 % len(sentence)
    return whole[begin : begin + samples]


if __name__ == "__main__":
    main()
