"""--help of fairseq's commands has all options of this package, each in the group where one looks for it."""

import dataclasses
import re
from pathlib import Path

import commands
import pytest

COMMANDS = ("train", "generate", "validate", "interactive")
GROUPS = {
    "Data": "--audio-root",
    "Augmentation": "--augment",
    "Evaluation": "--eval-wer",
    "Faults": "--max-oom",
    "Speech encoder": "--speech-encoder",
    "Adapter": "--adapter-heads",
    "Partial LoRA": "--lora-rank",
    "LLM": "--llm-quantization",
    "Every criterion": "--quantity-weight",
}


def sections(printed: str) -> dict[str, str]:
    """Text of each group by its title."""
    parts = re.split(r"^(\S[^\n]*):\n", printed, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def options_in(section: str) -> list[str]:
    return re.findall(r"^  (--[\w-]+)", section, re.M)


def shown(command: str, *options: str) -> dict[str, str]:
    return sections(commands.fairseq(command, Path("data"), *options, "--help"))


def names_of(config: type) -> set[str]:
    """Options that a dataclass declares or inherits."""
    return {
        f"--{option.name.replace('_', '-')}"
        for option in dataclasses.fields(config)
        if "help" in option.metadata and option.name != "data"
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_the_task_is_in_one_group(command: str) -> None:
    found = shown(command)
    from blspkd_fairseq.tasks.blsp_kd import BlspKdConfig

    everywhere = [option for section in found.values() for option in options_in(section)]
    for title in ("Data", "Augmentation", "Evaluation", "Faults"):
        assert GROUPS[title] in options_in(found[title])
    assert all(everywhere.count(option) == 1 for option in names_of(BlspKdConfig))
    assert "--num-workers" in everywhere  # fairseq's own


def test_model_and_criterion_have_theirs_in_training() -> None:
    found = shown("train")
    from blspkd_fairseq.criterions.kl_distillation import KlDistillationConfig
    from blspkd_fairseq.models.blsp_kd import BlspKdModelConfig

    for title, option in GROUPS.items():
        assert option in options_in(found[title])
    terms = options_in(found["Terms of --criterion kl_distillation"])
    assert "--input-kl-weight" in terms and "--quantity-weight" not in terms
    everywhere = [option for section in found.values() for option in options_in(section)]
    assert all(everywhere.count(name) == 1 for name in names_of(BlspKdModelConfig) | names_of(KlDistillationConfig))
    # Defaults are told, of the model's options, too, whose parser has none.
    assert "(default: 16)" in re.sub(r"\s+", " ", found["Partial LoRA"].partition("--lora-rank")[2])


def test_the_criterion_that_is_named_is_the_one_that_is_shown() -> None:
    found = shown("train", "--criterion", "on_policy_distillation")
    (own,) = [section for title, section in found.items() if "on_policy_distillation" in title]
    assert "--rollouts" in options_in(own) and "--quantity-weight" in options_in(found["Every criterion"])
    assert not any("kl_distillation" in title for title in found)


def test_without_help_options_are_read_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    import blspkd_fairseq

    blspkd_fairseq.register()
    from fairseq import options

    words = commands.arguments("train", Path("data"), "--arch", "blsp_kd", "--criterion", "kl_distillation")
    monkeypatch.setattr("sys.argv", ["fairseq-train", *words])
    args = options.parse_args_and_arch(options.get_training_parser(), [*words, "--lora-rank", "3"])
    assert (args.data, args.lora_rank, args.input_kl_weight, args.augment) == ("data", 3, 1.0, "")
