"""The command line: parse, one call, print. Heavy imports stand inside the commands, so that help is instant.

Exit codes: 0 all well; 1 some items failed, named one a line on stderr; 2 wrong usage or configuration, one sentence.
"""

from mmx.cli.main import main

__all__ = ["main"]
