"""Two workers of hf_lsam, and of what else averages workers: what `peers.py` lets run side by side."""
