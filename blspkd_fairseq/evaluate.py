"""Answers, figures and one report for several systems on the same test sets.

    blspkd evaluate --out results \
        --translation data/test.tsv --asr data/test.tsv --qa data/questions.tsv \
        --checkpoint blsp_kd=checkpoints/checkpoint_best.pt --cascade openai/whisper-small --text \
        --cascade tuned=my-whisper --conditions white:20 white:10 babble:10 reverb:0.6 8khz

Systems: each --checkpoint; each --cascade (Whisper transcribes, the LLM reads that; a fine-tuned one stands fairly
beside systems that were trained on the same data); --text (the LLM reads the reference transcript: what a student can
reach). Answers go to OUT/answers/TASK/SYSTEM.jsonl as they come, and a run that was
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

from blspkd_fairseq.data.languages import find_language, is_same_language, language_key
from blspkd_fairseq.data.manifest import Manifest
from blspkd_fairseq.evaluation import voicebench
from blspkd_fairseq.evaluation.metrics import Measurement, whisper_spelling
from blspkd_fairseq.evaluation.report import Report, write_report
from blspkd_fairseq.evaluation.robustness import RANDOM_KINDS, Condition, known_conditions, parse_condition
from blspkd_fairseq.evaluation.row_scores import read_row_scores
from blspkd_fairseq.evaluation.scoring import TEXT, Answered, ScoringOptions, score_task
from blspkd_fairseq.evaluation.significance import SAMPLES, TRIALS
from blspkd_fairseq.generation.decoding import DecodingOptions
from blspkd_fairseq.hub import read_options
from blspkd_fairseq.modules.build import DTYPES, SpeechLlmConfig
from blspkd_fairseq.modules.quantized import QUANTIZATIONS
from blspkd_fairseq.systems.answers import CLEAN, Questions, answer_all
from blspkd_fairseq.systems.boundaries import calibrate, compare_boundaries
from blspkd_fairseq.systems.cost import measure_costs
from blspkd_fairseq.systems.systems import CascadeSystem, CheckpointSystem, System, TextSystem, WhisperTranscriber

logger = logging.getLogger("blspkd_fairseq.evaluate")

_LLM_OPTIONS = ("llm", "llm_dtype", "llm_quantization")
PROMPTS = {"asr": "repeat", "translation": "translate", "qa": "chat"}


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    systems, config = build_systems(args)
    baseline = args.baseline or next(iter(systems))
    if baseline not in systems:
        raise ValueError(f"--baseline {baseline!r} is no system: choose from {', '.join(systems)}")
    kinds = asked_kinds(args)
    report = Report(settings=settings(args, baseline) | {"llm_dtype": config.llm_dtype})
    extra = {kind: other_scores(args, kind, systems) for kind in kinds}  # what is wrong is said before hours of answers
    options = {kind: scoring_options(args, kind, baseline) for kind in kinds}
    answers = {kind: answer_task(args, kind, systems) for kind in kinds}
    for kind, given in answers.items():
        report.tasks[kind] = score_task(kind, given, options[kind], extra[kind])
        if kind == "qa":
            export_voicebench(args.out / "voicebench", given)
    if args.align:
        align(args, systems, report)
    if args.cost:
        report.costs = measure_costs(systems, questions(args, kinds[0]), args.cost)
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
    add(
        "--cascade",
        action="append",
        default=[],
        metavar="[NAME=]WHISPER",
        help="Whisper by name or directory, before the LLM; may be repeated, as with one that was fine-tuned",
    )
    add("--text", action="store_true", help="the LLM reads the reference transcript")
    add("--llm", default="", help="of --cascade and --text (default: the first checkpoint's), or in place of theirs")
    add("--llm-dtype", default="", choices=["", *DTYPES], help="(default: the first checkpoint's, or bfloat16)")
    add(
        "--llm-quantization",
        default="",
        choices=["", *QUANTIZATIONS],
        help="(default: the first checkpoint's, or none)",
    )
    add("--speech-encoder", default="", help="in place of the checkpoints'")
    add("--trust-remote-code", action="store_true", help="run code that comes with the LLM's files")
    add = parser.add_argument_group("decoding").add_argument
    add("--batch-size", type=int, default=16)
    add("--beam", type=int, default=1, help="of the LLM and of --cascade's Whisper (default: %(default)s)")
    add("--max-new-tokens", type=int, default=128)
    add("--length-penalty", type=float, default=1.0)
    add("--no-repeat-ngram-size", type=int, default=0)
    add = parser.add_argument_group("figures").add_argument
    add("--conditions", nargs="*", default=[], help=f"degraded speech besides clean: {known_conditions()}")
    add("--seed", type=int, default=1, help="of the degradations, the bootstrap and the randomisation")
    add("--noise-seeds", type=int, default=1, help="draws of the noise, the mean of which is shown (default: 1)")
    add("--babble", type=Path, help="manifest of the voices of babble (default: other speakers of the test set)")
    add("--baseline", default="", help="the system that others are compared with (default: the first)")
    add("--samples", type=int, default=SAMPLES, help="of the bootstrap (default: %(default)s)")
    add("--trials", type=int, default=TRIALS, help="of the randomisation (default: %(default)s)")
    add(
        "--clusters",
        default="speaker",
        metavar="COLUMN",
        help="column of the manifests whose rows are drawn together: speaker, talk, document (default: %(default)s)",
    )
    add(
        "--row-scores",
        action="append",
        default=[],
        metavar="[TASK/]NAME:METRIC=FILE",
        help="scores of a system's answers by another program (JSON lines: id, value or sums, signature)",
    )
    add("--align", action="store_true", help="CIF's boundaries against the word ends of --cascade's Whisper")
    add(
        "--cost",
        type=int,
        default=0,
        metavar="ROWS",
        help="time so many rows of the first test set: real-time factor, time to first token, peak memory",
    )
    add(
        "--judged",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="of a system: result file of VoiceBench's api_judge.py",
    )
    add("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    if not (args.asr or args.translation or args.qa):
        parser.error("give at least one of --asr, --translation, --qa")
    if args.language and find_language(args.language) is None:
        parser.error(f"--language {args.language} is unknown: give a code (ISO 639, BCP 47, FLORES) or an English name")
    if args.align and not args.cascade:
        parser.error("--align needs --cascade, whose Whisper tells when words end")
    if args.cost < 0:
        parser.error("--cost must be a number of rows")
    if args.judged and not args.qa:
        parser.error("--judged needs --qa, the questions whose answers were judged")
    if min(args.batch_size, args.beam, args.samples, args.trials, args.seed, args.noise_seeds) < 1:
        parser.error("--batch-size, --beam, --samples, --trials, --seed and --noise-seeds must be at least 1")
    return args


def asked_kinds(args: argparse.Namespace) -> list[str]:
    """The tasks that have a test set."""
    return [kind for kind in PROMPTS if getattr(args, kind)]


# ---- systems -------------------------------------------------------------------------------------------------------


def build_systems(args: argparse.Namespace) -> tuple[dict[str, System], SpeechLlmConfig]:
    """By name: checkpoints, cascade, text; and the LLM of the last two. Nothing is loaded yet.

    Raises:
        ValueError: no system, two of one name, or no LLM for cascade and text.
    """
    names = (*_LLM_OPTIONS, "speech_encoder")
    overrides = {name: getattr(args, name) for name in names if getattr(args, name)}
    systems: dict[str, System] = {}
    for given in args.checkpoint:
        name, path = named_path(given)
        if name in systems or name == TEXT:
            raise ValueError(f"two systems are named {name!r}: write --checkpoint OTHER_NAME={path}")
        systems[name] = CheckpointSystem(path, args.trust_remote_code, **overrides)
    config = text_config(args)
    for name, whisper in named_cascades(args):
        if name in systems or name == TEXT:
            raise ValueError(f"two systems are named {name!r}: write --cascade OTHER_NAME={whisper}")
        systems[name] = CascadeSystem(whisper, config)
    if args.text or args.qa:  # answers to speech are measured against those to the text
        systems[TEXT] = TextSystem(config)
    if not systems:
        raise ValueError("there is no system to evaluate: give --checkpoint, --cascade or --text")
    return systems, config


def named_path(given: str) -> tuple[str, Path]:
    """``NAME=PATH``, or a path whose folder and stem are its name."""
    name, equals, path = given.partition("=")
    if not equals:
        name, path = "-".join(Path(given).with_suffix("").parts[-2:]), given
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ValueError(f"{name!r} is no name of a system (letters, digits, - _ . +): write --checkpoint NAME={path}")
    return name, Path(path)


def named_cascades(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Name and Whisper of each: ``NAME=WHISPER``, or "cascade"."""
    named = []
    for given in args.cascade:
        name, equals, whisper = given.partition("=")
        named.append((named_path(given)[0], whisper) if equals else ("cascade", name))
    return named


def text_config(args: argparse.Namespace) -> SpeechLlmConfig:
    """The LLM as the first checkpoint has it, unless options say otherwise."""
    options: Mapping[str, Any] = read_options(named_path(args.checkpoint[0])[1]) if args.checkpoint else {}
    names = (*_LLM_OPTIONS, "system_prompt", "chat_template")
    chosen = {name: options[name] for name in names if name in options}
    chosen["trust_remote_code"] = args.trust_remote_code
    chosen |= {name: getattr(args, name) for name in _LLM_OPTIONS if getattr(args, name)}
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
    babble = Manifest.load(args.babble) if args.babble else None
    return Questions(
        kind, manifest, getattr(args, f"{kind}_prompt"), args.audio_root, options, CLEAN, args.seed, babble
    )


def answer_task(
    args: argparse.Namespace, kind: str, systems: Mapping[str, System]
) -> dict[str, dict[str, list[list[Answered]]]]:
    """``[system][condition][draw of the noise]``: answers in the order of the manifest.

    One system is in memory at a time.
    """
    asked = questions(args, kind)
    for row in asked.manifest:
        asked.row_prompt(row)  # a prompt or language that is unknown is said before any model is loaded
    conditions = list(dict.fromkeys([CLEAN, *map(parse_condition, args.conditions)]))
    answers: dict[str, dict[str, list[list[Answered]]]] = {}
    for name, system in systems.items():
        if kind != "qa" and name == TEXT and not args.text:
            continue
        answers[name] = {}
        for condition in conditions if system.hears else [CLEAN]:
            draws = args.noise_seeds if condition.kind in RANDOM_KINDS else 1
            answers[name][str(condition)] = [
                answer(args, name, system, replace(asked, condition=condition, seed=args.seed + draw), draw)
                for draw in range(draws)
            ]
        system.unload()
    return answers


def answer(args: argparse.Namespace, name: str, system: System, asked: Questions, draw: int) -> list[Answered]:
    """One system under one condition, with one draw of the noise."""
    path = answers_path(args.out, asked.kind, name, asked.condition, draw)
    return [Answered.of(record) for record in answer_all(system, asked, path, name, args.batch_size)]


def answers_path(out: Path, kind: str, system: str, condition: Condition, draw: int = 0) -> Path:
    """``OUT/answers/asr/cascade.jsonl``, ``.../cascade.white-10.jsonl``, ``.../cascade.white-10.draw-2.jsonl``."""
    suffix = "" if condition == CLEAN else f".{str(condition).replace(':', '-')}"
    suffix += f".draw-{draw + 1}" if draw else ""
    return out / "answers" / kind / f"{system}{suffix}.jsonl"


# ---- figures -------------------------------------------------------------------------------------------------------


def scoring_options(args: argparse.Namespace, kind: str, baseline: str) -> ScoringOptions:
    """Languages and clusters come from the manifest: all rows must have the same language.

    Raises:
        ValueError: several languages in one manifest, whose figures would mean nothing.
    """
    manifest = Manifest.load(getattr(args, kind))
    language = common_language(args, manifest, "tgt_lang" if kind == "translation" else "src_lang")
    speech = {language_key(row.get("src_lang", "")) for row in manifest}
    whisper = named_cascades(args)[0][1] if args.cascade else ""
    return ScoringOptions(
        language=language,
        baseline=baseline,
        samples=args.samples,
        trials=args.trials,
        seed=args.seed,
        spelling=scoring_spelling(whisper, language),
        speech_language=speech.pop() if len(speech) == 1 else "",
        blocks=clusters(args, manifest),
        unit=args.clusters,
    )


def common_language(args: argparse.Namespace, manifest: Manifest, column: str) -> str:
    """Of a whole manifest, or --language."""
    languages = {language_key(row.get(column, "")) for row in manifest}
    if len(languages) > 1 and not args.language:
        raise ValueError(
            f"{manifest.path} has rows in several languages ({', '.join(sorted(languages))}): score them one by one, "
            "or give --language"
        )
    language: str = args.language or languages.pop()
    if not language:
        logger.warning(f"{manifest.path} has no {column}: give --language for a tokenizer that suits the answers")
    return language


def clusters(args: argparse.Namespace, manifest: Manifest) -> list[str]:
    """What is drawn together: a speaker, a talk; "" where there is none.

    Raises:
        ValueError: there is no such column, and it is not the usual one.
    """
    if args.clusters not in manifest.columns and args.clusters != "speaker":
        raise ValueError(f"{manifest.path} has no column {args.clusters!r}: it has {', '.join(manifest.columns)}")
    return [row.get(args.clusters, "") for row in manifest]


def scoring_spelling(whisper: str, language: str) -> dict[str, str]:
    """British to American words, which come with a Whisper's tokenizer."""
    if not whisper or not is_same_language(language, "en"):
        return {}
    from transformers import AutoTokenizer

    try:
        return whisper_spelling(AutoTokenizer.from_pretrained(whisper, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise ValueError(f"there is no model {whisper!r}: give a Whisper by Hugging Face name or directory") from error


def export_voicebench(folder: Path, answers: Mapping[str, Mapping[str, Sequence[Sequence[Answered]]]]) -> None:
    """Answers to questions as VoiceBench's judges read them, a file per system."""
    folder.mkdir(parents=True, exist_ok=True)
    for system, conditions in answers.items():
        rows = [
            {"id": row.id, "prompt": row.transcript, "response": row.hypothesis, "reference": row.reference or None}
            for row in conditions["clean"][0]
        ]
        voicebench.write_answers(folder / f"{system}.jsonl", rows)


def other_scores(args: argparse.Namespace, kind: str, systems: Mapping[str, System]) -> dict[str, list[Measurement]]:
    """What other programs say of the answers, by system: --row-scores, and --judged of questions.

    Raises:
        ValueError: a file of other rows, or of no system or task.
    """
    ids = [row["id"] for row in Manifest.load(getattr(args, kind))]
    scores: dict[str, list[Measurement]] = {}
    for given in args.row_scores:
        names, equals, path = given.partition("=")
        task, slash, rest = names.rpartition("/")
        system, colon, metric = rest.partition(":")
        if not (equals and colon and metric) or (slash and task not in asked_kinds(args)):
            raise ValueError(f"--row-scores {given} should be [TASK/]NAME:METRIC=FILE, with a task that has a test set")
        if not slash and len(asked_kinds(args)) > 1:
            raise ValueError(f"--row-scores {given} names no task: write one of {', '.join(asked_kinds(args))} and a /")
        if slash and task != kind:
            continue
        scores.setdefault(known_system(system, systems, given), []).append(read_row_scores(path, metric, ids))
    for given in args.judged if kind == "qa" else []:
        name, judged = named_path(given)
        try:
            found = voicebench.read_judgements(judged, ids)
        except OSError as error:
            raise ValueError(f"--judged {name}={judged} cannot be read: {error.strerror}") from error
        scores.setdefault(known_system(name, systems, given), []).append(found)
    return scores


def known_system(name: str, systems: Mapping[str, System], given: str) -> str:
    if name not in systems:
        raise ValueError(f"{given} is of {name!r}, which is no system: choose from {', '.join(systems)}")
    return name


def align(args: argparse.Namespace, systems: Mapping[str, System], report: Report) -> None:
    """Boundaries of every checkpoint with CIF, on the first test set."""
    kind = next(kind for kind in PROMPTS if getattr(args, kind))
    whisper = WhisperTranscriber(named_cascades(args)[0][1])
    whisper_itself = calibrate(whisper, questions(args, kind))
    for name, system in systems.items():
        if isinstance(system, CheckpointSystem):
            system.load()
            result = compare_boundaries(
                system.model,
                whisper,
                questions(args, kind),
                args.out / f"alignment-{name}.png",
                whisper_itself,
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
