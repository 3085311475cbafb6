"""Responses per second: scripts/generate_responses.py against transformers' text-generation pipeline.

    python scripts/bench_responses.py --llm DIR --manifest data/train.tsv --out scripts/bench_responses.csv

Both answer the same rows greedily with the same LLM, precision, batch size and length limit; they take turns, and the
medians over the rounds are reported, with how many answers agree. Not all can: the pipeline tokenises prompt and
transcript as one text, this project each by itself; and in bfloat16, padding may turn a near tie.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_modules import cpu_name

from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.data.prompts import SPEECH_SLOT, resolve_prompt
from blspkd_fairseq.generation.responses import HuggingFaceBackend, Request, ResponseSettings, plan_batches
from blspkd_fairseq.modules.build import DTYPES


def main() -> None:
    args = parse()
    settings = ResponseSettings(args.llm, args.llm_dtype, max_new_tokens=args.max_new_tokens)
    manifest = Manifest.load(args.manifest, ("src_text",))
    prompt = resolve_prompt("continue")
    rows = [Request(manifest[i]["id"], manifest[i]["src_text"], prompt) for i in range(min(args.rows, len(manifest)))]
    backend = HuggingFaceBackend(settings)
    contestants = {"blspkd_fairseq": ours(backend, args.batch_size), "transformers pipeline": pipeline(backend, args)}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    answers: dict[str, dict[str, str]] = {}
    for round_ in range(args.rounds + 1):
        for name, answer in contestants.items():
            begin = time.perf_counter()
            answers[name] = answer(rows if round_ else rows[: args.batch_size])
            if round_:  # round 0 warms up
                seconds[name].append(time.perf_counter() - begin)
                print(f"round {round_}: {name}: {len(rows) / seconds[name][-1]:.2f} rows/s")
    write(args, len(rows), seconds, answers)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--llm-dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--manifest", type=Path, required=True, help="rows with src_text")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="CSV")
    return parser.parse_args()


def ours(backend: HuggingFaceBackend, batch_size: int) -> Callable[[list[Request]], dict[str, str]]:
    def answer(rows: list[Request]) -> dict[str, str]:
        batches = plan_batches(rows, batch_size)
        return {one.id: one.tgt_text for batch in batches for one in backend.answer(batch)}

    return answer


def pipeline(backend: HuggingFaceBackend, args: argparse.Namespace) -> Callable[[list[Request]], dict[str, str]]:
    """As its documentation shows for batches of chats."""
    from transformers import pipeline as make_pipeline

    tokenizer = backend.chat.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    generator = make_pipeline("text-generation", model=backend.llm, tokenizer=tokenizer)
    options = {"do_sample": False, "max_new_tokens": args.max_new_tokens, "min_new_tokens": 1}

    def answer(rows: list[Request]) -> dict[str, str]:
        chats = [[{"role": "user", "content": row.prompt.replace(SPEECH_SLOT, row.text)}] for row in rows]
        out = generator(chats, batch_size=args.batch_size, return_full_text=False, **options)
        return {row.id: one[0]["generated_text"] for row, one in zip(rows, out, strict=True)}

    return answer


def write(
    args: argparse.Namespace, rows: int, seconds: dict[str, list[float]], answers: dict[str, dict[str, str]]
) -> None:
    ours_name, other_name = seconds
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    same = sum(answers[ours_name][i].strip() == text.strip() for i, text in answers[other_name].items())
    is_cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if is_cuda else f"{cpu_name()} ({torch.get_num_threads()} threads)"
    table = [
        {
            "implementation": name,
            "device": device,
            "llm": Path(args.llm).name,
            "dtype": args.llm_dtype,
            "rows": rows,
            "batch_size": args.batch_size,
            "max_new_tokens": args.max_new_tokens,
            "rows_per_second": f"{rows / median:.2f}",
            "speed_of_ours": f"{median / medians[ours_name]:.2f}",
            "same_answers": f"{same / rows:.3f}",
            "rounds": args.rounds,
            "torch": torch.__version__,
        }
        for name, median in medians.items()
    ]
    for row in table:
        print(f"{row['implementation']:24} {row['rows_per_second']:>8} rows/s  ours is {row['speed_of_ours']}x as fast")
    print(f"{same} of {rows} answers are the same")
    if args.out:
        with open(args.out, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
