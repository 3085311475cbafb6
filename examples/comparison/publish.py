"""Publishes a trained model of the comparison: half-precision weights, options and a model card with what was measured.

    python examples/comparison/publish.py --checkpoint out/comparison/models/small-seed1/checkpoint_last.pt \
        --results examples/comparison/results --data out/comparison/data --out blspkd_fairseq/pretrained/NAME
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from report import Report, training_minutes
from systems import SETS
from texts import from_manifests

from blspkd_fairseq import BlspKd
from blspkd_fairseq.data.manifest import Manifest

CACHE = "~/.cache/blspkd_fairseq"  # where examples/quickstart/fetch_models.py puts the base models
ROW = "small"
COLUMNS = ("response_kl", "agreement", "wer", "self_bleu", "count", "boundary")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "results", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--example", type=int, default=0, help="row of heard.tsv whose audio goes with the model")
    args = parser.parse_args(arguments)
    model = BlspKd.from_pretrained(args.checkpoint)
    for option in ("llm", "speech_encoder"):
        setattr(model.config, option, f"{CACHE}/{Path(getattr(model.config, option)).name}")
    model.config.window_seconds = 6.0  # it was trained on single sentences, and errs on more of them at once
    model.save_pretrained(args.out, dtype="float16")
    heard = Manifest.load(args.data / "heard.tsv")[args.example]
    shutil.copy(args.data / heard["audio"], args.out / "example.flac")
    report = Report.load(args.results, args.data)
    hours = from_manifests(args.data).utterance_hours
    assert hours is not None
    (args.out / "README.md").write_text(card(report, args.out, heard["src_text"], hours), encoding="utf-8")


def card(report: Report, folder: Path, example: str, utterance_hours: float) -> str:
    """The model card."""
    run = report.first(ROW)
    utterances = run["utterances_before"] + run["updates"] * run["batch"]
    table = "\n".join(
        f"| {report.measure_title(column)} | " + " | ".join(report.cell(ROW, one, column) for one in SETS) + " |"
        for column in COLUMNS
    )
    return _CARD.format(
        name=folder.name,
        path=folder,
        example=example,
        cache=CACHE,
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        minutes=training_minutes(run),
        machine=run["machine"].replace(" for each row", ""),
        hours=utterances * utterance_hours,
        utterances=utterances,
        columns=" | ".join(SETS.values()),
        rules="|---" * (1 + len(SETS)) + "|",
        table=table,
        commands="\n".join(run["commands"]),
    )


_CARD = """---
license: mit
language: en
base_model: [openai/whisper-tiny.en, HuggingFaceTB/SmolLM2-135M-Instruct]
---

# {name}

A small model of BLSP-KD: SmolLM2-135M-Instruct hears through the encoder of Whisper tiny.en, a CFormer of one layer
before and one after CIF, and Partial LoRA of rank 4. The file ({megabytes:.1f} MB, fp16) holds what was trained; the
base models stay apart, as `python examples/quickstart/fetch_models.py` puts them into `{cache}`.

```python
from blspkd_fairseq import BlspKd

folder = "{path}"
model = BlspKd.from_pretrained(folder)
model.generate(f"{{folder}}/example.flac", "repeat")  # {example}
model.align(f"{{folder}}/example.flac")
```

The example was not trained on.

With the base models elsewhere: `BlspKd.from_pretrained(..., llm="DIR", speech_encoder="DIR")`. To train on from it:
`fairseq-train ... --pretrained-model FOLDER`, which takes the options of adapter and LoRA from there, or
`bash examples/quickstart/run.sh --pretrained FOLDER`.

## What it is for

Trying things out at once: it shows that an LLM hears, it is a start for further training, and it is small. It is no
speech recogniser. It knows the words of a grammar of 140 words and 32 countries in short English sentences; of anything
else it hears the sound and says something near.

## Training

{minutes:.0f} minutes of {machine}: {utterances} utterances ({hours:.1f} hours, with repetitions) of
`examples/comparison/data.py` in the voices joe (neural, CC0), slt and rms (CMU Arctic, by flite), speed varied. First a
warm-up on transcripts, then distillation of the LLM's own continuations, as
`bash examples/comparison/run.sh --only small --seeds 1` does both. The base models were frozen; no task was trained but
"Continue the following sentence":

```
{commands}
```

## What was measured

Sentences never trained on; 95 % intervals over utterances. The voice never heard is awb of flite, the real recordings
are a person's telephone prompts, whose words are mostly unknown to it.

| | {columns} |
{rules}
{table}

Text behaviour: the LLM reading text is bit for bit that of SmolLM2-135M-Instruct.
"""


if __name__ == "__main__":
    main()
