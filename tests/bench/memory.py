"""Runs a command and samples the memory of its first process once a minute.

python tests/bench/memory.py RESULT.json python ppo_tuxkart.py --track scotland
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from processes import megabytes

PERIOD = 60  # seconds


def main():
    result, command = Path(sys.argv[1]), sys.argv[2:]
    started, samples = time.time(), []
    process = subprocess.Popen(command)
    while True:
        try:
            process.wait(PERIOD)
            break
        except subprocess.TimeoutExpired:
            minute = round((time.time() - started) / 60, 2)
            samples.append({"minute": minute, "rss_mb": round(megabytes(process.pid, "VmRSS"), 1)})
            result.write_text(json.dumps({"command": command, "samples": samples}, indent=1) + "\n")
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
