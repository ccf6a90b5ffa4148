"""Two workers of hf_lsam, and of other methods that average workers, for `peers.py` to run side by side."""
