"""`batchclf` with an account: python tests/cpu_by_thread.py OUT.json ARGUMENTS...

At its end OUT.json has the seconds of processor time of all threads that have ended, by their names
without numbers. The main thread, which also starts the program, is not among them.
"""

import atexit
import json
import re
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from batchclf.cli import main

spent: Counter[str] = Counter()
lock = threading.Lock()
run = threading.Thread.run


def counted(thread: threading.Thread) -> None:
    try:
        run(thread)
    finally:
        with lock:
            spent[re.sub(r"[-_]?\d+", "", thread.name)] += time.thread_time()


def write(path: Path) -> None:
    path.write_text(json.dumps({name: round(s, 3) for name, s in spent.most_common()}))


if __name__ == "__main__":
    atexit.register(write, Path(sys.argv.pop(1)))
    threading.Thread.run = counted  # type: ignore[method-assign]
    main()
