"""`python -m loraport.serve.tuning JSON`: search for what it asks, in the engine's Python; see tune.py.

JSON: {"groups": [["qkv", 4096, [4096, 1024, 1024]], ...], "rank": 16, "slots": 8, "out": "folder"}
Out: a line of JSON for each kernel, then the files that VLLM_TUNED_CONFIG_FOLDER wants.
"""

import json
import sys
import time
from pathlib import Path

from loraport.serve.tuning.bench import gpu_name
from loraport.serve.tuning.files import write
from loraport.serve.tuning.search import compile_all, plan_compiling, search
from loraport.serve.tuning.space import TOKENS, Group


def main() -> None:
    """Search and write."""
    asked = json.loads(sys.argv[1])
    groups = [Group(name, inner, tuple(outers)) for name, inner, outers in asked["groups"]]

    def tell(line: dict[str, object]) -> None:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    about = asked["rank"], asked["slots"], asked.get("tokens", TOKENS)
    work = plan_compiling(groups, *about)
    began = time.monotonic()
    tell({"kernels": len(work)})
    compile_all(work)
    tell({"kernels": len(work), "seconds": round(time.monotonic() - began, 1)})
    found = search(groups, *about, tell)
    tell({"seconds": round(time.monotonic() - began, 1)})
    write(found, gpu_name(), asked["slots"], Path(asked["out"]))


if __name__ == "__main__":
    main()
