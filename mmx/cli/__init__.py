"""Command-line interface. Heavy imports stay inside the commands, so `mmx --help` does not import torch.

Exit codes: 0 success; 1 some items failed (one line each on stderr); 2 usage or configuration error (one sentence).
"""
