"""Answers, figures and one report for several systems on the same test sets.

    blspkd evaluate --out results \
        --translation data/test.tsv --asr data/test.tsv --qa data/questions.tsv \
        --checkpoint blsp_kd=checkpoints/checkpoint_best.pt --cascade openai/whisper-small --text \
        --conditions white:20 white:10 babble:10 reverb:0.6 8khz

Systems: each --checkpoint; --cascade (Whisper transcribes, the LLM reads that); --text (the LLM reads the reference
transcript: what a student can reach). Answers go to OUT/answers/TASK/SYSTEM.jsonl as they come, and a run that was
killed goes on with the same command; answers that are there already are not made again, only scored. OUT/report.md,
report.json and the pictures are written when all rows have all answers.
"""

import argparse
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.evaluation import voicebench
from blspkd_fairseq.evaluation.metrics import whisper_spelling
from blspkd_fairseq.evaluation.report import TEXT, Report, ScoringOptions, score_task, write_report
from blspkd_fairseq.evaluation.robustness import Condition, known_conditions, parse_condition
from blspkd_fairseq.evaluation.significance import bootstrap_interval
from blspkd_fairseq.generation.decoding import DecodingOptions
from blspkd_fairseq.hub import read_options
from blspkd_fairseq.modules.build import DTYPES, SpeechLlmConfig
from blspkd_fairseq.systems.answers import CLEAN, Questions, answer_all
from blspkd_fairseq.systems.boundaries import compare_boundaries
from blspkd_fairseq.systems.systems import CascadeSystem, CheckpointSystem, System, TextSystem, WhisperTranscriber

logger = logging.getLogger("blspkd_fairseq.evaluate")

PROMPTS = {"asr": "repeat", "translation": "translate", "qa": "chat"}


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    systems = build_systems(args)
    baseline = args.baseline or next(iter(systems))
    if baseline not in systems:
        raise ValueError(f"--baseline {baseline!r} is no system: choose from {', '.join(systems)}")
    report = Report(settings=settings(args, baseline))
    report.judgements = read_judgements(args)  # a file that is missing is said before hours of answers
    answers: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {}
    for kind in PROMPTS:
        if getattr(args, kind):
            answers[kind] = answer_task(args, kind, systems)
    for kind, given in answers.items():
        options = scoring_options(args, kind, baseline)
        report.tasks[kind] = score_task(kind, given, options)
        if kind == "qa":
            export_voicebench(args.out / "voicebench", given)
    if args.align:
        align(args, systems, report)
    write_report(report, args.out)
    print((args.out / "report.md").read_text(encoding="utf-8"))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="blspkd evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("test sets (manifests)").add_argument
    add("--asr", type=Path, help="speech recognition: src_text is what was said")
    add("--translation", type=Path, help="speech translation: tgt_text is the reference, tgt_lang its language")
    add("--qa", type=Path, help="spoken questions: answers against the LLM's own to the text; tgt_text: right answers")
    add("--audio-root", type=Path, help="folder of relative audio paths (default: the manifest's)")
    for kind, prompt in PROMPTS.items():
        add(f"--{kind}-prompt", default=prompt, help="name or text (default: %(default)s), for rows without their own")
    add("--language", default="", help="code of the answers' language (default: the manifest's tgt_lang or src_lang)")
    add = parser.add_argument_group("systems").add_argument
    add("--checkpoint", action="append", default=[], metavar="[NAME=]PATH", help="a trained model; may be repeated")
    add("--cascade", default="", metavar="WHISPER", help="Whisper by name or directory, before the LLM")
    add("--text", action="store_true", help="the LLM reads the reference transcript")
    add("--llm", default="", help="of --cascade and --text (default: the first checkpoint's), or in place of theirs")
    add("--llm-dtype", default="", choices=["", *DTYPES], help="(default: the first checkpoint's, or bfloat16)")
    add("--speech-encoder", default="", help="in place of the checkpoints'")
    add = parser.add_argument_group("decoding").add_argument
    add("--batch-size", type=int, default=16)
    add("--beam", type=int, default=1)
    add("--max-new-tokens", type=int, default=128)
    add("--length-penalty", type=float, default=1.0)
    add("--no-repeat-ngram-size", type=int, default=0)
    add = parser.add_argument_group("figures").add_argument
    add("--conditions", nargs="*", default=[], help=f"degraded speech besides clean: {known_conditions()}")
    add("--seed", type=int, default=1, help="of the degradations, the bootstrap and the randomisation")
    add("--baseline", default="", help="the system that others are compared with (default: the first)")
    add("--samples", type=int, default=1000, help="of the bootstrap")
    add("--trials", type=int, default=10_000, help="of the randomisation")
    add("--align", action="store_true", help="CIF's boundaries against the word ends of --cascade's Whisper")
    add("--judged", action="append", default=[], metavar="NAME=PATH", help="result file of VoiceBench's api_judge.py")
    add("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    if not (args.asr or args.translation or args.qa):
        parser.error("give at least one of --asr, --translation, --qa")
    if args.align and not args.cascade:
        parser.error("--align needs --cascade, whose Whisper tells when words end")
    if min(args.batch_size, args.samples, args.trials, args.seed) < 1:
        parser.error("--batch-size, --samples, --trials and --seed must be at least 1")
    return args


# ---- systems -------------------------------------------------------------------------------------------------------


def build_systems(args: argparse.Namespace) -> dict[str, System]:
    """By name: checkpoints, cascade, text. Nothing is loaded yet.

    Raises:
        ValueError: no system, two of one name, or no LLM for cascade and text.
    """
    overrides = {name: getattr(args, name) for name in ("llm", "llm_dtype", "speech_encoder") if getattr(args, name)}
    systems: dict[str, System] = {}
    for given in args.checkpoint:
        name, path = named_path(given)
        if name in systems or name in (TEXT, "cascade"):
            raise ValueError(f"two systems are named {name!r}: write --checkpoint OTHER_NAME={path}")
        systems[name] = CheckpointSystem(path, **overrides)
    config = text_config(args)
    if args.cascade:
        systems["cascade"] = CascadeSystem(args.cascade, config)
    if args.text or args.qa:  # answers to speech are measured against those to the text
        systems[TEXT] = TextSystem(config)
    if not systems:
        raise ValueError("there is no system to evaluate: give --checkpoint, --cascade or --text")
    return systems


def named_path(given: str) -> tuple[str, Path]:
    """``NAME=PATH``, or a path whose folder and stem are its name."""
    name, equals, path = given.partition("=")
    if not equals:
        name, path = "-".join(Path(given).with_suffix("").parts[-2:]), given
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ValueError(f"{name!r} is no name of a system (letters, digits, - _ . +): write --checkpoint NAME={path}")
    return name, Path(path)


def text_config(args: argparse.Namespace) -> SpeechLlmConfig:
    """The LLM as the first checkpoint has it, unless options say otherwise."""
    options: Mapping[str, Any] = read_options(named_path(args.checkpoint[0])[1]) if args.checkpoint else {}
    names = ("llm", "llm_dtype", "system_prompt", "chat_template", "trust_remote_code")
    chosen = {name: options[name] for name in names if name in options}
    chosen |= {name: getattr(args, name) for name in ("llm", "llm_dtype") if getattr(args, name)}
    return SpeechLlmConfig(**chosen)


# ---- answers -------------------------------------------------------------------------------------------------------


def questions(args: argparse.Namespace, kind: str) -> Questions:
    """One task on clean speech."""
    needed = ["src_text", "tgt_text"] if kind == "translation" else ["src_text"]
    options = DecodingOptions(
        beam=args.beam,
        max_new_tokens=args.max_new_tokens,
        length_penalty=args.length_penalty,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
    )
    manifest = Manifest.load(getattr(args, kind), needed, needed)
    if not len(manifest):
        raise ValueError(f"{manifest.path} has no rows: there is nothing to evaluate")
    return Questions(kind, manifest, getattr(args, f"{kind}_prompt"), args.audio_root, options, CLEAN, args.seed)


def answer_task(
    args: argparse.Namespace, kind: str, systems: Mapping[str, System]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """``[system][condition]``: records in the order of the manifest. One system is in memory at a time."""
    asked = questions(args, kind)
    for row in asked.manifest:
        asked.row_prompt(row)  # a prompt or language that is unknown is said before any model is loaded
    conditions = list(dict.fromkeys([CLEAN, *map(parse_condition, args.conditions)]))
    answers: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, system in systems.items():
        if kind != "qa" and name == TEXT and not args.text:
            continue
        answers[name] = {
            str(condition): answer_all(
                system,
                replace(asked, condition=condition),
                answers_path(args.out, kind, name, condition),
                name,
                args.batch_size,
            )
            for condition in (conditions if system.hears else [CLEAN])
        }
        system.unload()
    return answers


def answers_path(out: Path, kind: str, system: str, condition: Condition) -> Path:
    """``OUT/answers/asr/cascade.jsonl``, ``.../cascade.white-10.jsonl``."""
    suffix = "" if condition == CLEAN else f".{str(condition).replace(':', '-')}"
    return out / "answers" / kind / f"{system}{suffix}.jsonl"


# ---- figures -------------------------------------------------------------------------------------------------------


def scoring_options(args: argparse.Namespace, kind: str, baseline: str) -> ScoringOptions:
    """The language comes from the manifest: all rows must have the same.

    Raises:
        ValueError: several languages in one manifest, whose figures would mean nothing.
    """
    column = "tgt_lang" if kind == "translation" else "src_lang"
    manifest = Manifest.load(getattr(args, kind))
    languages = {row.get(column, "") for row in manifest}
    if len(languages) > 1 and not args.language:
        raise ValueError(
            f"{manifest.path} has rows in several languages ({', '.join(sorted(languages))}): score them one by one, "
            "or give --language"
        )
    language = args.language or languages.pop()
    if not language:
        logger.warning(f"{manifest.path} has no {column}: give --language for a tokenizer that suits the answers")
    return ScoringOptions(
        language, baseline, args.samples, args.trials, args.seed, scoring_spelling(args.cascade, language)
    )


def scoring_spelling(whisper: str, language: str) -> dict[str, str]:
    """British to American words, which come with a Whisper's tokenizer."""
    if not whisper or not language.startswith("en"):
        return {}
    from transformers import AutoTokenizer

    return whisper_spelling(AutoTokenizer.from_pretrained(whisper))


def export_voicebench(folder: Path, answers: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> None:
    """Answers to questions as VoiceBench's judges read them, a file per system."""
    folder.mkdir(parents=True, exist_ok=True)
    for system, conditions in answers.items():
        rows = [
            {"id": r["id"], "prompt": r["transcript"], "response": r["hypothesis"], "reference": r["reference"] or None}
            for r in conditions["clean"]
        ]
        voicebench.write_answers(folder / f"{system}.jsonl", rows)


def read_judgements(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """VoiceBench's scores of each ``NAME=PATH``, with intervals."""
    judged: dict[str, dict[str, Any]] = {}
    for given in args.judged:
        name, path = named_path(given)
        try:
            one = voicebench.read_judgements(path)
        except OSError as error:
            raise ValueError(f"--judged {name}={path} cannot be read: {error.strerror}") from error
        interval = bootstrap_interval(one.statistics, one.score_of, args.samples, args.seed)
        judged.setdefault(name, {})[one.name] = interval
    return judged


def align(args: argparse.Namespace, systems: Mapping[str, System], report: Report) -> None:
    """Boundaries of every checkpoint with CIF, on the first test set."""
    kind = next(kind for kind in PROMPTS if getattr(args, kind))
    whisper = WhisperTranscriber(args.cascade)
    for name, system in systems.items():
        if isinstance(system, CheckpointSystem):
            system.load()
            result = compare_boundaries(
                system.model,
                whisper,
                questions(args, kind),
                args.out / f"alignment-{name}.png",
                args.samples,
                args.seed,
            )
            system.unload()
            if result is None:
                logger.warning(f"{name} has no CIF and so no boundaries: left out of the alignment")
            else:
                report.alignment[name] = result


def settings(args: argparse.Namespace, baseline: str) -> dict[str, Any]:
    """What was asked for, as far as it was given."""
    given = {name: value for name, value in vars(args).items() if value not in ("", None, [], False)}
    return {**{name: value if isinstance(value, (int, float)) else str(value) for name, value in given.items()}} | {
        "baseline": baseline
    }


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    transformers_logging.set_verbosity_error()  # what it says of Whisper's own decoding is for its authors
    try:
        main()
    except ValueError as error:
        sys.exit(f"evaluate: {error}")
