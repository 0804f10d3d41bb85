"""Command line interface. Heavy imports are inside the commands, so that `mmx --help` does not import torch.

Exit codes: 0 success; 1 some items failed (one line each on stderr); 2 wrong usage or configuration (one sentence).
"""
