"""Faults of training: batches that do not fit, hold NaN, cannot be read, or never come. Free of fairseq."""
