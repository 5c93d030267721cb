"""The demo's requests: held-out task prompts and beginnings of code, shuffled.

tools/train_tiny.py writes them as demo_prompts.jsonl next to the checkpoints; a seed of their own
keeps the task prompts apart from the evaluation set's.
"""

from __future__ import annotations

import random

from tiny.tasks import evaluation_records

_PER_TASK = 4
_SEED = 2
_CODE_STARTS = (
    "import os\nimport sys\n",
    "def main():\n    parser = argparse.ArgumentParser(",
    "class Error(Exception):\n",
    'def read(self, size=-1):\n        """Read',
    "    def __init__(self, name, value=None):\n        self.name = name\n",
    "for line in lines:\n    if not line.startswith('#'):\n        ",
    "try:\n    import threading\nexcept ImportError:\n    ",
    "def get_default(self, key, default=None):\n"
    '    """Return the value of key, or default when there is none.\n\n'
    "    Raises TypeError if key is not a string.\n"
    '    """\n'
    "    if not isinstance(key, str):\n"
    "        raise TypeError(",
)


def demo_prompts() -> list[dict[str, str]]:
    """Return 24 requests, `id` and `prompt`; the id names the task."""
    rows = [
        {"id": f"{record.task}-{index % _PER_TASK}", "prompt": record.prompt}
        for index, record in enumerate(evaluation_records(_PER_TASK, _SEED))
    ]
    rows += [{"id": f"code-{index}", "prompt": prompt} for index, prompt in enumerate(_CODE_STARTS)]
    random.Random(_SEED).shuffle(rows)
    return rows
