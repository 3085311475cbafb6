"""fairseq criterions; importing this folder registers them."""

from blspkd_fairseq import compat

compat.require_fairseq()  # one sentence instead of a missing module

from blspkd_fairseq.criterions.kl_distillation import KlDistillationCriterion  # noqa: E402
from blspkd_fairseq.criterions.on_policy_distillation import OnPolicyDistillationCriterion  # noqa: E402

__all__ = ["KlDistillationCriterion", "OnPolicyDistillationCriterion"]
