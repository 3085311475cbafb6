"""Lets the LLM continue the transcripts of a manifest: adds the columns tgt_text and cut.

    python scripts/generate_responses.py --llm Qwen/Qwen2.5-7B-Instruct --input raw/train.tsv --output data/train.tsv

The answers are what the LLM itself says to the transcript (greedy, blsp-emo's prompt and length), so that distillation
teaches hearing and nothing else. They are kept in OUTPUT.responses.jsonl as they come; a killed run goes on from there.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.data.manifest import Manifest, write_manifest
from blspkd_fairseq.data.prompts import resolve_prompt
from blspkd_fairseq.modules.build import DTYPES, SpeechLlmConfig, load_chat_format, load_llm

if TYPE_CHECKING:  # at run time, this package comes before transformers and keeps a broken torchaudio from it
    from transformers import PreTrainedModel


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    manifest = Manifest.load(args.input, ("id", "audio", "n_frames", "src_text"), ("src_text",))
    settings = {
        "llm": args.llm,
        "dtype": args.llm_dtype,
        "prompt": resolve_prompt(args.prompt),
        "max_new_tokens": args.max_new_tokens,
        "system_prompt": args.system_prompt,
    }
    store = ResponseStore(args.output.with_name(args.output.name + ".responses.jsonl"), settings)
    count = min(args.rows or len(manifest), len(manifest))
    missing = [i for i in range(count) if manifest[i]["id"] not in store.responses]
    if missing:
        generate_missing(args, manifest, missing, store)
    rows = ({**manifest[i], **store.responses[manifest[i]["id"]]} for i in range(count))
    columns = [c for c in manifest.columns if c not in ("tgt_text", "cut")] + ["tgt_text", "cut"]
    kept = (row for row in rows if row["tgt_text"].strip())
    written = write_manifest(args.output, kept, columns)
    print(f"{args.output}: {written} rows, {count - written} left out because the LLM said nothing")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="manifest with src_text")
    parser.add_argument("--output", type=Path, required=True, help="the same manifest with tgt_text and cut")
    parser.add_argument("--llm", required=True, help="Hugging Face name or local directory")
    parser.add_argument("--llm-dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--prompt", default="continue", help="name of a prompt or a text with {speech}")
    parser.add_argument("--system-prompt", default="")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rows", type=int, default=0, help="only the first N rows (default: all)")
    return parser.parse_args(arguments)


class ResponseStore:
    """Responses by id in a file that only grows; its first line says what made them.

    Raises:
        ValueError: the file was made with another LLM, prompt or length.
    """

    def __init__(self, path: Path, settings: dict[str, object]) -> None:
        self.path = path
        self.responses: dict[str, dict[str, str]] = {}
        header = {"settings": settings, "hash": hashlib.sha256(json.dumps(settings).encode()).hexdigest()}
        if not path.exists() or b"\n" not in path.read_bytes():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(header, ensure_ascii=False) + "\n", encoding="utf-8")
            return
        content = path.read_bytes()
        whole = content[: content.rindex(b"\n") + 1]  # a killed run may have left half a line
        if len(whole) < len(content):
            path.write_bytes(whole)
        first, *lines = whole.decode().splitlines()
        if json.loads(first) != header:
            raise ValueError(
                f"{path} was made with other settings ({json.loads(first)['settings']}): delete it, or choose "
                "another --output"
            )
        for line in lines:
            record = json.loads(line)
            self.responses[record["id"]] = {"tgt_text": record["tgt_text"], "cut": record["cut"]}

    def add(self, records: list[dict[str, str]]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        for record in records:
            self.responses[record["id"]] = {"tgt_text": record["tgt_text"], "cut": record["cut"]}


def generate_missing(args: argparse.Namespace, manifest: Manifest, missing: list[int], store: ResponseStore) -> None:
    """Batches of similar length, longest first, with a progress bar."""
    config = SpeechLlmConfig(llm=args.llm, llm_dtype=args.llm_dtype, system_prompt=args.system_prompt)
    chat = load_chat_format(config)
    llm = load_llm(config, chat).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    before, after = chat.prompt_ids(resolve_prompt(args.prompt))
    prompts = [[*before, *chat.encode_text(manifest[i]["src_text"]), *after] for i in missing]
    order = sorted(range(len(missing)), key=lambda k: -len(prompts[k]))
    with tqdm(total=len(missing), desc="responses", unit="row") as bar:
        for batch in batches(order, args.batch_size):
            answers = continue_batch(llm, chat, [prompts[k] for k in batch], args.max_new_tokens)
            ids = [manifest[missing[k]]["id"] for k in batch]
            store.add(
                [
                    {"id": row_id, "tgt_text": text, "cut": "1" if cut else "0"}
                    for row_id, (text, cut) in zip(ids, answers, strict=True)
                ]
            )
            bar.update(len(batch))


def batches(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@torch.no_grad()
def continue_batch(
    llm: "PreTrainedModel", chat: ChatFormat, prompts: list[list[int]], max_new_tokens: int
) -> list[tuple[str, bool]]:
    """Greedy answers to token ids, each with whether the length limit cut it."""
    width = max(map(len, prompts))
    ids = torch.tensor([[chat.eos_ids[0]] * (width - len(p)) + p for p in prompts], device=llm.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=llm.device)
    out = llm.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, min_new_tokens=1, max_new_tokens=max_new_tokens
    )
    answers = []
    for row in out[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in chat.eos_ids), None)
        answers.append((chat.decode(row[:end]), end is None))
    return answers


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"generate_responses: {error}")
