"""Publishes a trained model: half-precision weights, options, an example, and a model card with what was measured.

    python examples/open_vocabulary/publish.py --checkpoint MODEL --results DIR --example CLIP.flac --said "its text" \
        --training training.md --out blspkd_fairseq/pretrained/NAME [--readme README.md]

DIR has model.json, cascade.json and text.json of hear.py, and may have noise.json (--conditions); training.md says in
sentences what it was trained on. The README gets the figures that it shows, between two comments.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from write_report import TEXT, false_answers, scores_of

from blspkd_fairseq import BlspKd
from blspkd_fairseq.evaluation.significance import Interval
from blspkd_fairseq.evaluation.tables import format_score, markdown_table
from blspkd_fairseq.files import write_whole

CACHE = "~/.cache/blspkd_fairseq"  # where the package keeps the base models
WINDOW_SECONDS = 6.0  # it was trained on single sentences, and errs on more of them at once
SOUND = "sound"  # the model without what the LLM expects (hear.py --by-sound), where that was measured
MEASURED = {"model": "this model", "cascade": "Whisper tiny.en, then the LLM"}
TITLES = {
    "test": "heard voices, other sentences",
    "test_unheard": "four voices never heard",
    "phone": "telephone prompts (a person)",
    "game": "a game's actors",
    "book": "five sentences of an audio book",
    "nothing": "clips in which nobody speaks",
}
FRONT = ("test", "test_unheard", "phone", "game")  # what a README shows
FRONT_TITLES = (
    "",
    "utterances",
    "it hears",
    "Whisper tiny.en hears",
    "it repeats",
    "the cascade of Whisper and the LLM repeats",
)
BEGIN, END = "<!-- publish.py: measured -->", "<!-- publish.py: end -->"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "results", "example", "training", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--said", required=True, help="what is said in the example")
    parser.add_argument("--readme", type=Path, help="also write the figures that this file shows")
    args = parser.parse_args(arguments)
    results = {name: json.loads((args.results / f"{name}.json").read_text())["sets"] for name in (TEXT, *MEASURED)}
    if (args.results / f"{SOUND}.json").exists():
        results[SOUND] = json.loads((args.results / f"{SOUND}.json").read_text())["sets"]
    check_rows(results)
    shown = "" if args.readme is None else with_figures(args.readme.read_text(encoding="utf-8"), front(results))
    model = BlspKd.from_pretrained(args.checkpoint)
    for option in ("llm", "speech_encoder"):
        setattr(model.config, option, f"{CACHE}/{Path(getattr(model.config, option)).name}")
    model.config.window_seconds = WINDOW_SECONDS
    model.save_pretrained(args.out, dtype="float16")
    shutil.copy(args.example, args.out / "example.flac")
    megabytes = (args.out / "model.safetensors").stat().st_size / 1e6
    text = _CARD.format(
        name=args.out.name,
        path=args.out,
        said=args.said,
        cache=CACHE,
        megabytes=megabytes,
        before=model.config.adapter_pre_layers,
        after=model.config.adapter_post_layers,
        soft=" that gives out soft tokens" if model.config.adapter_soft_tokens else "",
        rank=model.config.lora_rank,
        training=args.training.read_text(encoding="utf-8").strip(),
        table=table(results),
        noise=noise_table(args.results / "noise.json"),
    )
    write_whole(args.out / "README.md", text)
    if args.readme is not None:
        write_whole(args.readme, shown)


def check_rows(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ValueError where systems that stand beside each other were measured on different rows."""
    for name in TITLES:
        rows = {system: sorted(results[system][name]["id"]) for system in results if name in results[system]}
        if len(set(map(tuple, rows.values()))) > 1:
            counts = ", ".join(f"{system} {len(ids)}" for system, ids in rows.items())
            raise ValueError(f"the set {name} has other rows in each result ({counts}): measure all on the same files")


def with_figures(text: str, figures: str) -> str:
    """A README whose part between two comments says these figures.

    Raises:
        ValueError: it has no such part.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no part for figures: write {BEGIN} and {END} where they belong")
    return f"{before}{BEGIN}\n\n{figures}\n{END}{after}"


def front(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Errors in hearing and repeating, a row per set, and what is answered to silence: what a README shows."""
    lines = []
    for name in FRONT:
        systems = [results[system][name] for system in MEASURED if name in results[system]]
        if len(systems) < len(MEASURED):
            continue
        scores = [scores_of(found, None) for found in systems]
        figures = [format_score(score[metric]) for metric in ("WER heard", "WER repeat") for score in scores]
        lines.append([TITLES[name], str(len(systems[0]["id"])), *figures])
    said = markdown_table(FRONT_TITLES, lines)
    by_sound = heard_by_sound(results)
    if by_sound:
        figures = ", ".join(f"{by_sound[name].score:.1f}" for name in FRONT if name in by_sound)
        said += f"\nBy the sound alone, without what the LLM expects after the words before, it hears with {figures}.\n"
    if "nothing" not in results["model"]:
        return said
    silent = false_answers(results["model"]["nothing"])
    return f"{said}\nOf clips of silence, hum, noise and babble it answers {silent} as if somebody spoke.\n"


def heard_by_sound(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Interval]:
    """The WER in hearing of each spoken set without what the LLM expects, of those that were measured."""
    sets = {name: found for name, found in results.get(SOUND, {}).items() if name != "nothing"}
    return {name: scores_of(found, None)["WER heard"] for name, found in sets.items()}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row per figure and system, a column per set."""
    sets = [name for name in TITLES if name in results["model"]]
    spoken = [name for name in sets if name != "nothing"]
    rows: dict[tuple[str, str], dict[str, str]] = {("WER heard", "model"): {}}
    by_sound = {name: format_score(score, 1) for name, score in heard_by_sound(results).items()}
    if by_sound:  # below what they compare with
        rows["WER heard, by the sound alone", "model"] = by_sound
    for system in MEASURED:
        for name in spoken:
            if name in results[system]:
                for metric, score in scores_of(results[system][name], results[TEXT].get(name)).items():
                    digits = 2 if metric.endswith(" KL") else 1  # nats
                    rows.setdefault((metric, system), {})[name] = format_score(score, digits)
        if "nothing" in results[system]:
            answers = {"nothing": false_answers(results[system]["nothing"])}
            rows["answered as if somebody spoke", system] = answers
    metrics = list(dict.fromkeys(metric for metric, _ in rows))
    lines = [
        [metric, MEASURED[system], *(rows[metric, system].get(name, "–") for name in sets)]
        for metric in metrics
        for system in MEASURED
        if (metric, system) in rows
    ]
    return markdown_table(["measure", "system", *(TITLES[name] for name in sets)], lines)


def noise_table(path: Path) -> str:
    """What is heard of a set in noise, a column per condition; nothing where that was not measured."""
    if not path.exists():
        return ""
    sets = json.loads(path.read_text())["sets"]
    figures = [format_score(scores_of(found, None)["WER heard"]) for found in sets.values()]
    heading = [name.partition(" ")[2] or "clean" for name in sets]
    first = next(iter(sets))
    return (
        f"\nWER heard of the {TITLES.get(first, first)}, under noise (dB) and of a telephone's band:\n\n"
        + markdown_table(heading, [figures])
    )


_CARD = """---
license: mit
language: en
library_name: blspkd_fairseq
pipeline_tag: audio-text-to-text
base_model: [openai/whisper-tiny.en, HuggingFaceTB/SmolLM2-135M-Instruct]
tags: [speech, speech-llm, cif, blsp-kd]
---

# {name}

A small model of BLSP-KD: SmolLM2-135M-Instruct hears everyday English through the encoder of Whisper tiny.en, a
CFormer of {before} layers before and {after} after CIF{soft}, and Partial LoRA of rank {rank}. The
file ({megabytes:.1f} MB, fp16) holds what was trained; the base models stay apart, as `python
examples/quickstart/fetch_models.py` puts them into `{cache}`.

```python
from blspkd_fairseq import BlspKd

folder = "{path}"
model = BlspKd.from_pretrained(folder)
model.generate(f"{{folder}}/example.flac", "repeat")  # said was: {said}
model.align(f"{{folder}}/example.flac")
```

The example was not trained on, and its voice was never heard in training.

With the base models elsewhere: `BlspKd.from_pretrained(..., llm="DIR", speech_encoder="DIR")`. To train on from
it: `fairseq-train ... --pretrained-model FOLDER`, which takes the options of adapter and LoRA from there, or
`bash examples/quickstart/run.sh --pretrained FOLDER`.

## What it is for

Trying things out at once, and a start for further training. It is no speech recogniser, and far from the
cascade of the same Whisper and the same LLM, as the table says: it mistakes rarer words for frequent ones, and
real people more often than synthetic voices. What the LLM answers is that of a chat LLM of 135 million
parameters, which is often wrong when it reads, too.

## Training

{training}

## What was measured

Sentences never trained on; 95 % intervals over utterances. "WER heard" is that of the tokens nearest to the
speech embeddings, in which what the LLM expects after the words before has its part; "WER repeat" that of what the
LLM says when asked to repeat it; answers are those to the speech alone, against those of the same LLM to the text.
`bash examples/open_vocabulary/evaluate.sh` measures the real speech anew.

{table}{noise}
Text behaviour: the LLM reading text is bit for bit that of SmolLM2-135M-Instruct.
"""


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"publish: {error}")
