"""Questions of every suite, made up for tests."""

import gzip
import json

ROWS = {
    "gsm8k": [
        {"question": f"What is {n} plus {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"}
        for n in range(1, 7)
    ],
    "math": [
        {"problem": f"Simplify $\\frac{{{n}}}{{{2 * n}}}$.", "answer": "\\frac{1}{2}"}
        for n in range(1, 7)
    ],
    "mmlu_pro": [
        {"question": f"Which is {n}?", "options": [str(n), "no", "none"], "answer": "A"}
        for n in range(1, 7)
    ],
    "humaneval": [
        {
            "prompt": f'def plus_{n}(x: int) -> int:\n    """Adds {n}."""\n',
            "entry_point": f"plus_{n}",
            "test": f"def check(candidate):\n    assert candidate(1) == {1 + n}\n",
        }
        for n in range(1, 7)
    ],
    "babilong": [
        {
            "task": task,
            "facts": [f"{who} went to the {where}.", "John went to the garden."],
            "question": f"Where is {who}?",
            "answer": where,
        }
        for task in ("qa1", "qa4")
        for who in ("Mary", "Sandra")
        for where in ("kitchen", "office", "hallway")
    ],
}


def write_questions(folder, suites=tuple(ROWS)):
    """Files by suite, half of them compressed, as `--task-data` names them."""
    paths = {}
    for number, suite in enumerate(suites):
        lines = "".join(json.dumps(row) + "\n" for row in ROWS[suite])
        if number % 2:
            paths[suite] = folder / f"{suite}.jsonl"
            paths[suite].write_text(lines, encoding="utf-8")
        else:
            paths[suite] = folder / f"{suite}.jsonl.gz"
            paths[suite].write_bytes(gzip.compress(lines.encode()))
    return paths
