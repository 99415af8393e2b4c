"""Runs several commands one after another in this share of several processes.

``python commands_in_turn.py COMMANDS.json``: a list of a free port and words each. The first that
fails ends it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from fastscarce.cli import main

# A process group that is made again finds the old one's addresses in a store they would share.
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
for port, words in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    os.environ["MASTER_PORT"] = str(port)
    if main(words) != 0:
        sys.exit(f"failed: {' '.join(words)}")
