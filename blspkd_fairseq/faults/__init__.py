"""What training does when a batch does not fit, holds NaN, cannot be read, or never comes; free of fairseq."""
