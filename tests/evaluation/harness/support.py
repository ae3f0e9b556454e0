"""Small files in the schemas of AIME24 and MMLU-Pro."""

import json

AIME24 = [
    {"ID": "2024-I-1", "Problem": "What is 2 + 3?", "Solution": "Add.", "Answer": 5},
    {"ID": "2024-I-2", "Problem": "What is 7 + 7?", "Solution": "Add.", "Answer": 14},
    {"ID": "2024-II-1", "Problem": "What is 4 + 4?", "Solution": "Add.", "Answer": 8},
]


def mmlu_pro(number, category="math"):
    return {
        "question_id": number,
        "question": f"What is {number} + 1?",
        "options": [str(number + step) for step in (1, 2, 3)],
        "answer": "A",
        "answer_index": 0,
        "cot_content": f"A: Let's think step by step. It is {number + 1}. The answer is (A).",
        "category": category,
        "src": "by hand",
    }


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def aime24_file(folder):
    return write_lines(folder / "aime24.jsonl", AIME24)


def mmlu_pro_folder(folder):
    folder = folder / "mmlu_pro"
    folder.mkdir()
    write_lines(folder / "test.jsonl", [mmlu_pro(1), mmlu_pro(2), mmlu_pro(3, "law")])
    write_lines(folder / "validation.jsonl", [mmlu_pro(number) for number in range(10, 15)])
    return folder
