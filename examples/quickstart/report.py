"""What training changed: the held-out sets before and after, as text, JSON and pictures.

    python examples/quickstart/report.py --data DIR --checkpoint FILE --generated DIR --out DIR

"before" is the same model with an adapter that has learned nothing, or what --before gives. The answers of the LLM to
the text are what its answers to the speech are compared with.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from tqdm import tqdm

from blspkd_fairseq import BlspKd
from blspkd_fairseq.data.dataset import SpeechTextDataset
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.data.prompts import resolve_prompt
from blspkd_fairseq.evaluation.metrics import word_errors
from blspkd_fairseq.evaluation.plots import plot_alignment, plot_before_after
from blspkd_fairseq.files import write_whole
from blspkd_fairseq.generation.decoding import DecodingOptions, answer_speech, answer_text
from blspkd_fairseq.generation.teacher_forced import collate, teacher_forced
from blspkd_fairseq.modules.build import build_speech_llm

SETS = {"test": "unseen sentences, the heard voice", "test_unheard": "unseen sentences, a voice never heard"}
MEASURES = {  # name: (heading, number format, whether less is better)
    "input_kl": ("input KL (nats)", ".3f", True),
    "response_kl": ("response KL (nats)", ".3f", True),
    "input_agreement": ("top-1 agreement with the teacher, input", ".1%", False),
    "response_agreement": ("top-1 agreement with the teacher, response", ".1%", False),
    "token_count_error": ("token-count error", ".1%", True),
    "repeat_wer": ("WER of \"repeat the sentence\"", ".1%", True),
    "self_bleu": ("corpus BLEU of answers to speech against answers to text", ".1f", False),
}  # fmt: skip
ANSWERS = DecodingOptions(max_new_tokens=16)
BATCH = 50
PICTURES = 3


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    after = BlspKd.from_pretrained(args.checkpoint)
    before = began_with(after, args.before)
    results: dict[str, Any] = {"checkpoint": str(args.checkpoint), "sets": {}}
    with tqdm(total=2 * len(SETS), desc="evaluation", unit="pass") as bar:
        for split in SETS:
            manifest = Manifest.load(args.data / f"{split}.tsv")
            data = SpeechTextDataset(manifest, after.chat_format, audio_root=args.audio_root)
            rows: dict[str, Any] = {"utterances": len(data)}
            for name, model in (("before", before), ("after", after)):
                rows[name] = measure(model, data)
                bar.update()
            rows["after"]["repeat_wer"] = wer_of_file(args.generated / f"generate-{split}.jsonl")
            rows["text"] = {"repeat_wer": wer(texts_repeated(after, data), data)}
            results["sets"][split] = rows
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(args.out / "report.json", json.dumps(results, indent=2) + "\n")
    manifest = Manifest.load(args.data / "test.tsv")
    for i in range(min(PICTURES, len(manifest))):
        audio = args.audio_root / manifest[i]["audio"]
        plot_alignment(after, audio, manifest[i]["src_text"], args.out / f"alignment-{i + 1}.png")
    plot_before_after(results["sets"], MEASURES, SETS, args.out / "before-after.png")
    write_whole(args.out / "report.md", markdown(results, args.generated))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with test.tsv and test_unheard.tsv")
    parser.add_argument("--audio-root", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="folder of save_pretrained that training began with")
    parser.add_argument("--generated", type=Path, required=True, help="--results-path of fairseq-generate")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(arguments)


def began_with(trained: BlspKd, folder: Path | None) -> BlspKd:
    """The model as training found it; it shares nothing with the trained one."""
    if folder:
        return BlspKd.from_pretrained(folder, llm=trained.config.llm, speech_encoder=trained.config.speech_encoder)
    torch.manual_seed(1)
    model, chat = build_speech_llm(trained.config)
    return BlspKd(model.to(trained.device), chat, trained.config)


# ---- measures ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(model: BlspKd, data: SpeechTextDataset) -> dict[str, float]:
    """All measures of one model on one set."""
    sums: dict[str, float] = {}
    repeated: list[str] = []
    answers: list[tuple[str, str]] = []
    count_errors = 0.0
    for batch in batches(data, model.device):
        inputs = batch["net_input"]
        measured = teacher_forced(model.model, batch)
        for name, values in measured.items():
            sums[name] = sums.get(name, 0.0) + sum(values)
        count_errors += sum(abs(a - b) for a, b in zip(measured["counted"], measured["tokens"], strict=True))
        speech = inputs["src_tokens"], inputs["src_lengths"]
        repeat = [resolve_prompt("repeat")] * batch["nsentences"]
        repeated += first(answer_speech(model.model, model.chat_format, *speech, repeat, REPEAT))
        transcripts = [row["src_text"] for row in batch["rows"]]
        to_speech = first(answer_speech(model.model, model.chat_format, *speech, batch["prompts"], ANSWERS))
        to_text = first(answer_text(model.model, model.chat_format, transcripts, batch["prompts"], ANSWERS))
        answers += zip(to_speech, to_text, strict=True)
    return {
        "input_kl": sums["input_kl"] / sums["input_tokens"],
        "response_kl": sums["response_kl"] / sums["response_tokens"],
        "input_agreement": sums["input_agree"] / sums["input_tokens"],
        "response_agreement": sums["response_agree"] / sums["response_tokens"],
        "token_count_error": count_errors / sums["tokens"],
        "repeat_wer": wer(repeated, data),
        "self_bleu": sacrebleu.corpus_bleu([a for a, _ in answers], [[b for _, b in answers]]).score,
    }


REPEAT = DecodingOptions(max_new_tokens=32)


def batches(data: SpeechTextDataset, device: torch.device) -> list[dict[str, Any]]:
    """The set in manifest order, on the model's device."""
    starts = range(0, len(data), BATCH)
    return [collate(data, range(start, min(start + BATCH, len(data))), device) for start in starts]


def first(groups: list[list[Any]]) -> list[str]:
    return [group[0].text for group in groups]


def texts_repeated(model: BlspKd, data: SpeechTextDataset) -> list[str]:
    """What the LLM repeats of the text: no student can do better."""
    texts = [data.manifest[i]["src_text"] for i in range(len(data))]
    answers: list[str] = []
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        repeat = [resolve_prompt("repeat")] * len(part)
        answers += first(answer_text(model.model, model.chat_format, part, repeat, REPEAT))
    return answers


def wer(hypotheses: list[str], data: SpeechTextDataset) -> float:
    counts = [word_errors(text, data.manifest[i]["src_text"]) for i, text in enumerate(hypotheses)]
    return sum(c.errors for c in counts) / sum(c.words for c in counts)


def wer_of_file(path: Path) -> float:
    """Word error rate of fairseq-generate's answers."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    counts = [word_errors(row["hypothesis"], row["transcript"]) for row in rows]
    return sum(c.errors for c in counts) / sum(c.words for c in counts)


# ---- report --------------------------------------------------------------------------------------------------------


def markdown(results: dict[str, Any], generated: Path) -> str:
    """Tables, examples and pictures."""
    lines = ["# What training changed", ""]
    for split, rows in results["sets"].items():
        lines += [
            f"## {SETS[split]} ({rows['utterances']} utterances)",
            "",
            "| measure | before | after |",
            "|---|---|---|",
        ]
        for name, (heading, form, _) in MEASURES.items():
            lines.append(f"| {heading} | {rows['before'][name]:{form}} | {rows['after'][name]:{form}} |")
        text = rows["text"]["repeat_wer"]
        lines += ["", f"The LLM itself repeats the *text* of these sentences with a WER of {text:.1%}.", ""]
    lines += ["## What it repeats", "", "| said | heard |", "|---|---|"]
    for line in (generated / "generate-test.jsonl").read_text(encoding="utf-8").splitlines()[:8]:
        row = json.loads(line)
        lines.append(f"| {row['transcript']} | {' '.join(row['hypothesis'].split())} |")
    lines += ["", "![before and after](before-after.png)", ""]
    lines += [f"![spectrogram, CIF weights and token boundaries](alignment-{i + 1}.png)" for i in range(PICTURES)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
