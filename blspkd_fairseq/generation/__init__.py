"""Decoding: what :class:`blspkd_fairseq.BlspKd` and fairseq's command-line tools drive."""
