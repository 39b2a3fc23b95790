"""Rows as CodecLM exports them, for the tests of training."""

ANSWERS = [
    ("How long does an egg boil?", "Seven minutes.", "cooking", ["timing"], 4.0),
    ("Why is the sky blue?", "The air scatters blue light more than red light.", "science", ["optics"], -5.0),
    ("Be brief.", "Yes.", "cooking", ["timing"], 8.0),
    ("Name an animal.", "A quick brown fox, which jumps over lazy dogs.", "science", ["zoology"], 3.5),
    ("Count to three.", "1, 2, 3.", "cooking", ["timing"], 3.5),
    ("What is tea?", "Leaves in boiling water.", "cooking", ["drinks"], 5.0),
    ("And coffee?", "Beans, ground and put into boiling water.", "cooking", ["drinks"], -4.5),
    ("Say nothing.", "No.", "science", ["optics"], 9.0),
]


def exported_rows(number: int = 8) -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
            "metadata": {"use_case": use_case, "skills": skills},
            "scores": {"strong": 5.0 + gap / 2, "target": 5.0 - gap / 2, "gap": gap},
            "winner": "strong" if gap > 0 else "target",
            "iteration": 1 + place % 3,
            "lineage": {"id": f"m{place % 3:03}-i{place:04}", "seed": None, "gaps": [gap]},
        }
        for place, (prompt, completion, use_case, skills, gap) in enumerate(ANSWERS[:number])
    ]
