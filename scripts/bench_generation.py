"""Tokens per second of answers to batches of speech, against transformers' own generate on the same embeddings.

    python scripts/bench_generation.py --preset 0.5b --device cuda --out scripts/bench_generation.csv
    python scripts/bench_generation.py --llm DIR --speech-encoder DIR

"ours" is what fairseq-generate does with a batch: embeddings in, answers and the log-probability of every token out.
"transformers" is `llm.generate` on these embeddings, which gives ids alone. Both make as many tokens. Turns alternate;
medians. Prompts have different lengths, and their texts are the same or all different. Rates are by the clock on a GPU,
and by the CPU's on a CPU, which other programs make less longer.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench_modules import cpu_name
from bench_training import PRESETS, from_files, from_preset, synchronize
from transformers import GenerationConfig

from blspkd_fairseq.data.conversation import Speech
from blspkd_fairseq.generation.decoding import DecodingOptions, Prompts, answer_prompts, build_prompts
from blspkd_fairseq.generation.hearing import Heard
from blspkd_fairseq.modules.speech_llm import SpeechLLM

PREFIX, SPEECH, AFTER = 30, 20, 6  # tokens of a prompt, on average


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    torch.manual_seed(0)
    made = from_preset(PRESETS[args.preset], device, args.quick) if args.preset else from_files(args)
    model = made.to(device).eval()
    # No token ends an answer, so that both write as many.
    model.llm.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    rows = []
    for size in args.batch_size:
        prompts = make_prompts(model, size, args.own_texts)
        rows += [row for beam in args.beams for row in measure(model, prompts, beam, args)]
    for row in rows:
        rate = f"{row['tokens_per_second']:>10} tokens/s {row['ratio']:>6}"
        print(f"beam {row['beam']} {row['who']:14} {rate}  batch {row['batch']}")
    if args.out:
        with open(args.out, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), help="random weights of these shapes, in place of files")
    parser.add_argument("--llm")
    parser.add_argument("--speech-encoder")
    parser.add_argument("--llm-dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[32])
    parser.add_argument("--own-texts", action="store_true", help="every prompt has another text around its speech")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few layers, narrow: tries that it runs")
    parser.add_argument("--out", type=Path, help="CSV, replaced")
    args = parser.parse_args()
    if not args.preset and not (args.llm and args.speech_encoder):
        parser.error("give --preset, or --llm and --speech-encoder")
    return args


def make_prompts(model: SpeechLLM, size: int, own_texts: bool) -> Prompts:
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(10, 1000, (size, PREFIX + AFTER), generator=generator).tolist()
    counts = [SPEECH * 2 // 3 + i % (SPEECH * 2 // 3) for i in range(size)]
    width = model.llm.get_input_embeddings().embedding_dim
    speech = torch.randn(size, max(counts), width, generator=generator).to(model.device, model.llm.dtype) * 0.02
    chosen = texts if own_texts else texts[:1] * size
    heard = Heard(speech, counts, torch.zeros(speech.shape[:2], dtype=torch.bool))
    return build_prompts(model, [[one[:PREFIX], Speech(0), one[PREFIX:]] for one in chosen], heard)


@torch.no_grad()
def measure(model: SpeechLLM, prompts: Prompts, beam: int, args: argparse.Namespace) -> list[dict[str, str]]:
    size = len(prompts.embeds)
    options = DecodingOptions(beam=beam, max_new_tokens=args.tokens)
    chat: Any = SimpleNamespace(eos_ids=[], end_of_turn_id=0, decode_answer=lambda ids: "")

    def ours() -> None:
        answer_prompts(model, chat, prompts, options, with_scores=True)

    def theirs() -> None:
        model.llm.generate(
            inputs_embeds=prompts.embeds, attention_mask=prompts.valid, **options.as_generate_arguments()
        ).tolist()

    is_cuda = model.device.type == "cuda"
    now = time.perf_counter if is_cuda else time.process_time
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    for round_ in range(args.rounds + 1):
        for who, run in (("ours", ours), ("transformers", theirs)):
            synchronize(model.device)
            begin = now()
            run()
            synchronize(model.device)
            if round_:
                seconds[who].append(now() - begin)
    name = torch.cuda.get_device_name() if is_cuda else f"{cpu_name()} ({torch.get_num_threads()} threads)"
    base = statistics.median(seconds["transformers"])
    return [
        {
            "models": args.preset or "quickstart",
            "device": name,
            "batch": str(size),
            "beam": str(beam),
            "texts": "different" if args.own_texts else "the same",
            "tokens": str(args.tokens),
            "who": who,
            "tokens_per_second": f"{size * args.tokens / statistics.median(times):.1f}",
            "ratio": f"{base / statistics.median(times):.2f}",
        }
        for who, times in seconds.items()
    ]


if __name__ == "__main__":
    main()
