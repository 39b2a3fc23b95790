"""Items and folders written by hand, for what reads them."""

import json


def version(instruction, action=None, scores=None, answers=None, truncated=(), orders=None):
    """A round: scored if it has (strong, target) scores."""
    row = {"instruction": instruction, "action": action}
    if scores:
        strong, target = scores
        row["orders"] = orders or [[strong, target], [strong, target]]
        row["scores"] = {"strong": strong, "target": target, "gap": strong - target}
        answers = answers or {"strong": f"Strong on: {instruction}", "target": f"Target on: {instruction}"}
    if answers:
        row["answers"] = answers
        row["truncated"] = {side: side in truncated for side in answers}
    return row


def item(id, *rounds, use_case="cooking", skills=("recipes",), seed=None, **more):
    """Kept in its last round, with the strong model's answer, unless something else is said."""
    return {
        "id": id,
        "metadata": {"use_case": use_case, "skills": list(skills)},
        "seed": seed,
        "rounds": list(rounds),
        "outcome": "kept",
        "reason": None,
        "raw": None,
        "winner": "strong",
        "iteration": len(rounds),
        "scoring": "text",
    } | more


def unkept(id, *rounds, outcome="dropped", reason="no gap", **more):
    more = {"winner": None, "iteration": None} | more
    return item(id, *rounds, outcome=outcome, reason=reason, **more)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
