"""Work-arounds for fairseq, torch, torchaudio and transformers, each with its reason, and nowhere else.

Importing this package imports none of them: `blspkd_fairseq.check` runs where they are missing or broken.
"""

from blspkd_fairseq.compat.checkpoints import (
    allow_safe_checkpoint_globals,
    read_whole_checkpoints,
    write_checkpoints_whole,
)
from blspkd_fairseq.compat.commands import (
    attend_commands,
    refuse_precision,
    refuse_precision_of_command,
)
from blspkd_fairseq.compat.distributed import refuse_lonely_processes, share_checkpoints, sum_gradients_as_they_are
from blspkd_fairseq.compat.errors import end_in_one_sentence
from blspkd_fairseq.compat.fairseq_build import (
    INSTALL_FAIRSEQ,
    FairseqDistribution,
    FairseqError,
    Problem,
    fairseq_distributions,
    fairseq_problem,
    fairseq_warning,
    require_fairseq,
    silence_fairseq,
)
from blspkd_fairseq.compat.generation import attend_generation
from blspkd_fairseq.compat.help import show_all_options
from blspkd_fairseq.compat.llm import (
    CPU_ATTENTION,
    cache_argument,
    cache_of,
    checkpoint_activations,
    use_fast_cpu_attention,
    without_progress_bars,
)
from blspkd_fairseq.compat.product_cache import bound_product_cache
from blspkd_fairseq.compat.quantizer import import_bitsandbytes, silence_bitsandbytes
from blspkd_fairseq.compat.torchaudio import block_broken_torchaudio, guard_transformers
from blspkd_fairseq.compat.trainer import guard_updates
from blspkd_fairseq.compat.training import go_on_exactly, restore_training_state, training_state
from blspkd_fairseq.compat.untrusted import distrust_checkpoints

__all__ = [
    "CPU_ATTENTION",
    "INSTALL_FAIRSEQ",
    "FairseqDistribution",
    "FairseqError",
    "Problem",
    "allow_safe_checkpoint_globals",
    "attend_commands",
    "attend_generation",
    "block_broken_torchaudio",
    "bound_product_cache",
    "cache_argument",
    "cache_of",
    "checkpoint_activations",
    "distrust_checkpoints",
    "end_in_one_sentence",
    "fairseq_distributions",
    "fairseq_problem",
    "fairseq_warning",
    "go_on_exactly",
    "guard_transformers",
    "guard_updates",
    "import_bitsandbytes",
    "read_whole_checkpoints",
    "refuse_lonely_processes",
    "refuse_precision",
    "refuse_precision_of_command",
    "require_fairseq",
    "restore_training_state",
    "share_checkpoints",
    "show_all_options",
    "silence_bitsandbytes",
    "silence_fairseq",
    "sum_gradients_as_they_are",
    "training_state",
    "use_fast_cpu_attention",
    "without_progress_bars",
    "write_checkpoints_whole",
]
