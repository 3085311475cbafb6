"""Lets the LLM continue the transcripts of a manifest: adds the columns tgt_text and cut.

    blspkd responses --llm Qwen/Qwen2.5-7B-Instruct --input raw/train.tsv --output data/train.tsv

The answers are what the LLM itself says to the transcript (greedy, BLSP-Emo's prompt and length), so that distillation
teaches hearing and nothing else. They are kept in OUTPUT.responses.jsonl as they come: a run that was killed goes on
from there with the same command, and rows may be added to the input later. Another LLM, prompt or length is refused.

On a job array, give every member `--num-shards N --shard I`; then the same command without `--shard` joins them. On a
Ray cluster, `--engine ray --ray-address auto --workers 8 --gpus-per-worker 1`.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from blspkd_fairseq.data.manifest import Manifest, ManifestError, read_by_teacher, write_manifest
from blspkd_fairseq.data.prompts import resolve_prompt
from blspkd_fairseq.data.record_store import RecordStore
from blspkd_fairseq.generation.responses import (
    BACKENDS,
    Request,
    Response,
    ResponseSettings,
    answer_locally,
    answer_with_ray,
    is_refusal,
    plan_batches,
    shard_of,
)
from blspkd_fairseq.modules.build import DTYPES


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    settings = ResponseSettings(
        llm=args.llm,
        llm_dtype=args.llm_dtype,
        prompt=resolve_prompt(args.prompt),
        system_prompt=args.system_prompt,
        chat_template=args.chat_template,
        max_new_tokens=args.max_new_tokens,
        sampling=args.sampling,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        trust_remote_code=args.trust_remote_code,
    )
    manifest = load_input(args.input)
    if args.num_shards > 1 and args.shard is None:
        join_shards(args, settings, manifest)
        return
    with RecordStore(store_path(args, args.shard), settings.identity()) as store:
        fill(args, settings, manifest, store)
        if args.shard is None:
            write_output(args, settings, manifest, [store])
        else:
            print(f"{store.path}: shard {args.shard} of {args.num_shards} has its {len(store)} responses")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="manifest with src_text")
    parser.add_argument("--output", type=Path, required=True, help="the same manifest with tgt_text and cut")
    parser.add_argument("--llm", required=True, help="Hugging Face name or local directory")
    parser.add_argument("--llm-dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the LLM's files")
    parser.add_argument("--prompt", default="continue", help="name of a prompt or a text with {speech}")
    parser.add_argument("--system-prompt", default="")
    parser.add_argument("--chat-template", default="", help="file with a Jinja chat template")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--sampling", action="store_true", help="draw answers in place of the likeliest")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1, help="of --sampling")
    parser.add_argument("--batch-size", type=int, default=32, help="keep it when a run goes on: bytes may depend on it")
    parser.add_argument("--rows", type=int, default=0, help="only the first N rows (default: all)")
    parser.add_argument("--keep-refusals", action="store_true", help='keep answers such as "I\'m sorry, as an AI ..."')
    parser.add_argument("--num-shards", type=int, default=1, help="rows are split by a hash of their id")
    parser.add_argument("--shard", type=int, help="answer this shard only (0 to N - 1); without: join the shards")
    parser.add_argument("--backend", default="hf", choices=list(BACKENDS), help="what runs the LLM")
    parser.add_argument("--engine", default="local", choices=["local", "ray"], help="where: this machine, or Ray's")
    parser.add_argument(
        "--ray-address",
        default="local",
        help="local: a new Ray on this machine; auto: the cluster it belongs to; or HOST:PORT",
    )
    parser.add_argument("--workers", type=int, default=1, help="Ray workers, each of which holds the LLM")
    parser.add_argument("--gpus-per-worker", type=float, default=0)
    parser.add_argument("--cpus-per-worker", type=float, default=1)
    args = parser.parse_args(arguments)
    if args.num_shards < 1 or (args.shard is not None and not 0 <= args.shard < args.num_shards):
        parser.error(f"--shard must be between 0 and --num-shards - 1 = {args.num_shards - 1}, got {args.shard}")
    if min(args.batch_size, args.max_new_tokens, args.workers) < 1:
        parser.error("--batch-size, --max-new-tokens and --workers must be at least 1")
    if args.rows < 0:
        parser.error(f"--rows must be at least 1 (0: all), got {args.rows}")
    if args.temperature <= 0 or not 0 < args.top_p <= 1:
        parser.error("--sampling needs --temperature above 0 and --top-p above 0, at most 1")
    if args.output.resolve() == args.input.resolve():
        parser.error(f"--output {args.output} is the --input, which would be lost: give it another name")
    return args


def load_input(path: Path) -> Manifest:
    """The manifest whose transcripts are answered.

    Raises:
        ManifestError: it is missing or wrong, or a row is a conversation.
    """
    manifest = Manifest.load(path, ("src_text",))
    for index, row in enumerate(manifest if "conversation" in manifest.columns else ()):
        if row["conversation"]:
            raise ManifestError(
                f"{manifest.location(index)}: a conversation's response comes with it, as tgt_text: leave such rows "
                "out here, and bring them back with `blspkd merge`"
            )
    return Manifest.load(path, ("src_text",), ("src_text",))


def store_path(args: argparse.Namespace, shard: int | None) -> Path:
    part = "" if shard is None else f".shard-{shard}-of-{args.num_shards}"
    return Path(args.output.with_name(f"{args.output.name}{part}.responses.jsonl"))


def selected(args: argparse.Namespace, manifest: Manifest) -> range:
    return range(min(args.rows or len(manifest), len(manifest)))


def requests(args: argparse.Namespace, settings: ResponseSettings, manifest: Manifest) -> Iterator[Request]:
    """The rows of this shard in the order of the manifest; a row's own prompt comes before --prompt."""
    for index in selected(args, manifest):
        row = manifest[index]
        if args.shard is None or shard_of(row["id"], args.num_shards) == args.shard:
            yield request(settings, row)


def request(settings: ResponseSettings, row: dict[str, str]) -> Request:
    own = row.get("prompt", "")
    prompt = resolve_prompt(own, row.get("src_lang", ""), row.get("tgt_lang", "")) if own else settings.prompt
    return Request(row["id"], read_by_teacher(row), prompt)


def fill(args: argparse.Namespace, settings: ResponseSettings, manifest: Manifest, store: RecordStore) -> None:
    """Answers the rows that the store lacks; a batch of which a row is missing is answered as a whole."""
    planned = plan_batches(requests(args, settings, manifest), args.batch_size)
    missing = [batch for batch in planned if any(request.id not in store for request in batch)]
    if not missing:
        return
    if args.engine == "ray":
        answers = answer_with_ray(
            settings,
            missing,
            args.backend,
            args.ray_address,
            args.workers,
            args.gpus_per_worker,
            args.cpus_per_worker,
        )
    else:
        answers = answer_locally(settings, missing, args.backend)
    todo = sum(request.id not in store for batch in missing for request in batch)
    with tqdm(total=len(store) + todo, initial=len(store), desc="responses", unit="row", smoothing=0.05) as bar:
        for batch in answers:
            new = [answer._asdict() for answer in batch if answer.id not in store]
            store.add(new)
            bar.update(len(new))


def join_shards(args: argparse.Namespace, settings: ResponseSettings, manifest: Manifest) -> None:
    """Writes the output when every shard has all of its rows.

    Raises:
        ValueError: a shard is missing or not complete.
    """
    paths = [store_path(args, shard) for shard in range(args.num_shards)]
    absent = [str(path) for path in paths if not path.exists()]
    if absent:
        raise ValueError(f"{absent[0]} is missing: run --shard {paths.index(Path(absent[0]))} first")
    stores = [RecordStore(path, settings.identity(), read_only=True) for path in paths]
    for index in selected(args, manifest):
        shard = shard_of(manifest[index]["id"], args.num_shards)
        if manifest[index]["id"] not in stores[shard]:
            raise ValueError(
                f"{stores[shard].path} has no response to row {manifest[index]['id']!r}: let --shard {shard} end first"
            )
    write_output(args, settings, manifest, stores)


def write_output(
    args: argparse.Namespace, settings: ResponseSettings, manifest: Manifest, stores: list[RecordStore]
) -> None:
    """The manifest with its responses, and what was left out and why in OUTPUT.dropped.jsonl."""
    counts: Counter[str] = Counter()
    dropped: list[dict[str, str]] = []

    def kept() -> Iterator[dict[str, str]]:
        for index in selected(args, manifest):
            row = manifest[index]
            record = stores[shard_of(row["id"], len(stores))][row["id"]]
            answer = Response(**record)
            if answer.source != request(settings, row).digest():
                raise ValueError(
                    f"the transcript or prompt of row {row['id']!r} is not what was answered before: give the row a "
                    "new id, or choose another --output"
                )
            reason = "" if answer.tgt_text.strip() else "empty"
            if not reason and not args.keep_refusals and is_refusal(answer.tgt_text):
                reason = "refusal"
            counts[reason] += 1
            if reason:
                dropped.append({"id": row["id"], "reason": reason, "tgt_text": answer.tgt_text})
                continue
            counts["cut"] += answer.cut == "1"
            yield {**row, "tgt_text": answer.tgt_text, "cut": answer.cut}

    columns = [c for c in manifest.columns if c not in ("tgt_text", "cut")] + ["tgt_text", "cut"]
    written = write_manifest(args.output, kept(), columns)
    write_dropped(args.output, dropped)
    print(
        f"{args.output}: {written} rows ({counts['cut']} cut by the length limit); left out: {counts['refusal']} "
        f"refusals, {counts['empty']} empty"
    )


def write_dropped(output: Path, dropped: list[dict[str, str]]) -> None:
    path = output.with_name(output.name + ".dropped.jsonl")
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in dropped), encoding="utf-8")
