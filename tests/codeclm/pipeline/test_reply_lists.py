import random

import pytest

from trl_extensions.codeclm.pipeline.steps import Decode
from trl_extensions.core.generation.replies import Unreadable


@pytest.fixture(scope="module")
def decode():
    return Decode()


PAIR = ["Write a haiku about rain.", "Explain tides to a child."]

TWO = {
    "points": "1. Write a haiku about rain.\n2. Explain tides to a child.",
    "no space": "1.Write a haiku about rain.\n2.Explain tides to a child.",
    "brackets": "1) Write a haiku about rain.\n2) Explain tides to a child.",
    "two brackets": "(1) Write a haiku about rain.\n(2) Explain tides to a child.",
    "square brackets": "[1] Write a haiku about rain.\n[2] Explain tides to a child.",
    "colons": "1: Write a haiku about rain.\n2: Explain tides to a child.",
    "dashes": "1 - Write a haiku about rain.\n2 – Explain tides to a child.",
    "bold numbers": "**1.** Write a haiku about rain.\n**2.** Explain tides to a child.",
    "bold numbers, point outside": "**1**. Write a haiku about rain.\n**2**. Explain tides to a child.",
    "bold entries": "**1. Write a haiku about rain.**\n\n**2. Explain tides to a child.**",
    "bold texts": "1. **Write a haiku about rain.**\n2. **Explain tides to a child.**",
    "numbers twice": "1. 1. Write a haiku about rain.\n2. 2. Explain tides to a child.",
    "lazy numbers": "1. Write a haiku about rain.\n1. Explain tides to a child.",
    "numbers go on": "6. Write a haiku about rain.\n7. Explain tides to a child.",
    "one asterisk": "*1. Write a haiku about rain.\n*2. Explain tides to a child.",
    "italic entries": "*1. Write a haiku about rain.*\n*2. Explain tides to a child.*",
    "one line": "1. Write a haiku about rain. 2. Explain tides to a child.",
    "one line behind a preamble": "Here they are:\n\n1. Write a haiku about rain. 2. Explain tides to a child.",
    "full-width digits": "１．Write a haiku about rain.\n２．Explain tides to a child.",
    "enumeration commas": "1、Write a haiku about rain.\n2、Explain tides to a child.",
    "Chinese numerals": "一、Write a haiku about rain.\n二、Explain tides to a child.",
    "circled": "① Write a haiku about rain.\n② Explain tides to a child.",
    "letters": "a) Write a haiku about rain.\nb) Explain tides to a child.",
    "capitals": "A. Write a haiku about rain.\nB. Explain tides to a child.",
    "hyphens": "- Write a haiku about rain.\n- Explain tides to a child.",
    "asterisks": "* Write a haiku about rain.\n* Explain tides to a child.",
    "bullets": "• Write a haiku about rain.\n• Explain tides to a child.",
    "words": "Instruction 1: Write a haiku about rain.\nInstruction 2: Explain tides to a child.",
    "bold words": "**Instruction 1:** Write a haiku about rain.\n\n**Instruction 2:** Explain tides to a child.",
    "words with a hash": "Task #1: Write a haiku about rain.\nTask #2: Explain tides to a child.",
    "words below": "Prompt 1:\nWrite a haiku about rain.\n\nPrompt 2:\nExplain tides to a child.",
    "headings": "### Instruction 1\nWrite a haiku about rain.\n\n### Instruction 2\nExplain tides to a child.",
    "headings with titles": (
        "## 1. Weather Poem\nWrite a haiku about rain.\n\n## 2. The Sea\nExplain tides to a child."
    ),
    "titles": "1. **Weather Poem**: Write a haiku about rain.\n2. **The Sea:** Explain tides to a child.",
    "titles above": "**1. Weather Poem**\nWrite a haiku about rain.\n\n**2. The Sea**\nExplain tides to a child.",
    "labels without number": "Instruction: Write a haiku about rain.\nInstruction: Explain tides to a child.",
    "number and label": "1. Instruction: Write a haiku about rain.\n2. Instruction: Explain tides to a child.",
    "labels in German": "Aufgabe 1: Write a haiku about rain.\nAufgabe 2: Explain tides to a child.",
    "labels in Chinese": "指令1：Write a haiku about rain.\n指令2：Explain tides to a child.",
    "labels in Korean": "지시 1: Write a haiku about rain.\n지시 2: Explain tides to a child.",
    "quotes": '1. "Write a haiku about rain."\n2. "Explain tides to a child."',
    "typographic quotes": "1. “Write a haiku about rain.”\n2. „Explain tides to a child.“",
    "preamble": "Sure! Here are 2 instructions:\n\n1. Write a haiku about rain.\n2. Explain tides to a child.",
    "preamble in French": "Voici deux consignes :\n1. Write a haiku about rain.\n2. Explain tides to a child.",
    "closing": "1. Write a haiku about rain.\n2. Explain tides to a child.\n\nLet me know if you need more!",
    "closing after a rule": (
        "1. Write a haiku about rain.\n2. Explain tides to a child.\n\n---\nThese cover both skills."
    ),
    "thoughts": "<think>\n1. Should I?\n2. Yes.\n</think>\n1. Write a haiku about rain.\n2. Explain tides to a child.",
    "spaced": "1. Write a haiku about rain.\n\n\n2. Explain tides to a child.\n",
    "moved in": "  1. Write a haiku about rain.\n  2. Explain tides to a child.",
    "quoted in Markdown": "> 1. Write a haiku about rain.\n> 2. Explain tides to a child.",
    "fence around": "```\n1. Write a haiku about rain.\n2. Explain tides to a child.\n```",
    "fence after a preamble": (
        "Here they are:\n```markdown\n1. Write a haiku about rain.\n2. Explain tides to a child.\n```"
    ),
    "parts": "### Easy\n1. Write a haiku about rain.\n\n### Hard\n1. Explain tides to a child.",
    "parts that count on": "**Poems**\n\n1. Write a haiku about rain.\n\n**Science**\n\n2. Explain tides to a child.",
    "JSON": '["Write a haiku about rain.", "Explain tides to a child."]',
    "fenced JSON": (
        'Sure:\n```json\n[\n  "Write a haiku about rain.",\n  "Explain tides to a child."\n]\n```\nEnjoy!'
    ),
    "JSON objects": '[{"instruction": "Write a haiku about rain."}, {"instruction": "Explain tides to a child."}]',
    "JSON in an object": '{"instructions": ["Write a haiku about rain.", "Explain tides to a child."]}',
    "JSON with numbers": '{"1": "Write a haiku about rain.", "2": "Explain tides to a child."}',
    "JSON lines": '{"id": 1, "prompt": "Write a haiku about rain."}\n{"id": 2, "prompt": "Explain tides to a child."}',
    "a list as Python writes it": "['Write a haiku about rain.', 'Explain tides to a child.']",
    "no marks": "Write a haiku about rain.\nExplain tides to a child.",
    "paragraphs": "Here are two instructions:\n\nWrite a haiku about rain.\n\nExplain tides to a child.",
    "twice": "1. Write a haiku about rain.\n2. Explain tides to a child.\n3. write a haiku about rain",
    "placeholder": "1. Write a haiku about rain.\n2. Explain tides to a child.\n3. ...\n4. [Instruction 4]",
    "Windows": "1. Write a haiku about rain.\r\n2. Explain tides to a child.\r\n",
}


@pytest.mark.parametrize("name", TWO)
def test_styles(decode, name):
    assert decode.parse(TWO[name]) == PAIR


MANY_LINES = {
    "code block": (
        "1. Fix this:\n```python\n1. + x\n- y\n```\n2. Say hello.",
        ["Fix this:\n```python\n1. + x\n- y\n```", "Say hello."],
    ),
    "indented code block": (
        "1. Fix this:\n   ```\n   if x:\n       y\n   ```\n2. Say hello.",
        ["Fix this:\n```\nif x:\n    y\n```", "Say hello."],
    ),
    "list inside, moved in": (
        "1. Sort these:\n   1. pear\n   2. apple\n2. Say hello.",
        ["Sort these:\n1. pear\n2. apple", "Say hello."],
    ),
    "list inside, not moved in": (
        "1. Sort these:\n1. pear\n2. apple\n3. fig\n\n2. Say hello.",
        ["Sort these:\n1. pear\n2. apple\n3. fig", "Say hello."],
    ),
    "bullets inside": (
        "1. Sort these:\n- pear\n- apple\n2. Say hello.",
        ["Sort these:\n- pear\n- apple", "Say hello."],
    ),
    "choices inside": (
        "1. Which is a fruit?\n   a) pear\n   b) chair\n2. Say hello.",
        ["Which is a fruit?\na) pear\nb) chair", "Say hello."],
    ),
    "paragraphs": (
        "1. Sum up this text.\n\n   It rained.\n\n   It stopped.\n\n2. Say hello.",
        ["Sum up this text.\n\nIt rained.\n\nIt stopped.", "Say hello."],
    ),
    "text below, last": (
        "1. Say hello.\n2. Say goodbye.\n3. Sum up this text:\n\nIt rained. It stopped.",
        ["Say hello.", "Say goodbye.", "Sum up this text:\n\nIt rained. It stopped."],
    ),
    "quotation below, last": (
        '1. Say hello.\n2. Say goodbye.\n3. Sum up this text.\n\n"It rained. It stopped."',
        ["Say hello.", "Say goodbye.", 'Sum up this text.\n\n"It rained. It stopped."'],
    ),
    "talk of an unknown language, last": (
        "1. Say hello.\n2. Say goodbye.\n3. Say nothing.\n\nVoilà trois idées pour toi.",
        ["Say hello.", "Say goodbye.", "Say nothing."],
    ),
    "table": (
        "1. Who is older?\n\n| name | age |\n|---|---|\n| Ann | 3 |\n| Bob | 4 |\n\n2. Say hello.",
        ["Who is older?\n\n| name | age |\n|---|---|\n| Ann | 3 |\n| Bob | 4 |", "Say hello."],
    ),
    "numbers that are no marks": (
        "1. How much is it?\n3.5 kg cost 7 euros.\n10:30 is the time.\n2. Say hello.",
        ["How much is it?\n3.5 kg cost 7 euros.\n10:30 is the time.", "Say hello."],
    ),
    "JSON inside": ('1. Read this: {"a": [1]}\n2. Say hello.', ['Read this: {"a": [1]}', "Say hello."]),
    "JSON below": ('1. Read this:\n[\n"a", "b"\n]\n2. Say hello.', ['Read this:\n[\n"a", "b"\n]', "Say hello."]),
    "input of Alpaca": (
        '[{"instruction": "Translate.", "input": "Good day"}, {"instruction": "Say hello.", "input": ""}]',
        ["Translate.\n\nGood day", "Say hello."],
    ),
    "bold inside": (
        "1. **Translate** the word and **explain** it.\n2. Say hello.",
        ["**Translate** the word and **explain** it.", "Say hello."],
    ),
    "quotes inside": ('1. "To be" is what "verb"?\n2. Say hello.', ['"To be" is what "verb"?', "Say hello."]),
    "section that is no label": (
        "1. Shorten this.\nSection 2: It rained.\n2. Say hello.",
        ["Shorten this.\nSection 2: It rained.", "Say hello."],
    ),
}


@pytest.mark.parametrize("name", MANY_LINES)
def test_an_entry_keeps_its_lines(decode, name):
    text, expected = MANY_LINES[name]
    assert decode.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("１．写一首关于雨的诗。\n２．解释潮汐。", ["写一首关于雨的诗。", "解释潮汐。"]),
        ("以下是两个指令：\n1、写一首诗。\n2、解释潮汐。", ["写一首诗。", "解释潮汐。"]),
        ("1. Écris un poème.\n2. Explique les marées.", ["Écris un poème.", "Explique les marées."]),
        ("- اكتب قصيدة.\n- اشرح المد.", ["اكتب قصيدة.", "اشرح المد."]),
        ("はい、以下です。\n1. 詩を書いてください。\n2. 潮を説明して。", ["詩を書いてください。", "潮を説明して。"]),
    ],
)
def test_languages(decode, text, expected):
    assert decode.parse(text) == expected


def test_more_than_asked_for_are_cut_and_fewer_returned(decode):
    text = "1. One thing.\n2. Two things.\n3. Three things."
    assert decode.parse(text, 2) == ["One thing.", "Two things."]
    assert decode.parse(text, 9) == ["One thing.", "Two things.", "Three things."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write a haiku.", "Write a haiku."),
        ("1. Write a haiku.", "Write a haiku."),
        ("1. Write a haiku.\n2. Explain tides.", "Write a haiku."),
        ("Here is one:\n\nSum up this text.\n\nIt rained.", "Sum up this text.\n\nIt rained."),
        ("Put these in order:\n1. boil\n2. peel", "Put these in order:\n1. boil\n2. peel"),
        ("Sure, here is one:\n1. Write a haiku.\n2. Explain tides.", "Write a haiku."),
    ],
)
def test_one_that_was_asked_for_needs_no_marks(decode, text, expected):
    assert decode.parse(text, 1) == [expected]


def test_the_last_entry_of_a_truncated_reply_is_left_out(decode):
    assert decode.parse("1. Write a haiku.\n2. Explain ti", truncated=True) == ["Write a haiku."]
    assert decode.parse('["Write a haiku.", "Explain ti', truncated=True) == ["Write a haiku."]
    assert decode.parse("Write a haiku.\nExplain ti", truncated=True) == ["Write a haiku."]
    with pytest.raises(Unreadable, match="token limit"):
        decode.parse("1. Explain ti", truncated=True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("<think>I wonder", "empty"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("1. ...\n2. ...", "no list entry"),
        ("[]", "no list entry"),
        ("[1, 2]", "no list entry"),
    ],
)
def test_what_cannot_be_read_has_a_reason(decode, text, reason):
    with pytest.raises(Unreadable, match=reason):
        decode.parse(text)


FIRST_LINES = [
    "Write a poem about {}.", "Which is larger: {} or a house?", "Translate '{}' into French", "解释{}。",
    "Name 3 kinds of {}; say why.", "What does {} cost (in euros)?", "**Never** use {} in this answer.",
]  # fmt: skip
MORE_LINES = [
    "```\n1. a\n2. b\n```", "Text: It rained.\nThen it stopped.", "| a | b |\n|---|---|\n| 1 | 2 |",
    '{"a": 1}', "x = 3.5\nif x:\n    print(x)", "- one\n- two",
]  # fmt: skip
MARKS = [
    "{0}. ", "{0}) ", "({0}) ", "**{0}.** ", "Instruction {0}: ", "**Instruction {0}:** ", "### Task {0}\n", "{0}、",
]  # fmt: skip


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("gap", ["\n", "\n\n"])
@pytest.mark.parametrize("indented", [False, True])
def test_what_is_rendered_in_a_style_is_read_again(decode, mark, gap, indented):
    for seed in range(25):
        generator = random.Random(seed)
        instructions = []
        for number in range(generator.randint(1, 12)):
            lines = generator.choice(FIRST_LINES).format(f"thing{number}")
            if generator.random() < 0.4:
                lines += ":" + generator.choice(["\n", "\n\n"]) + generator.choice(MORE_LINES)
            instructions.append(lines)
        rendered = [
            mark.format(number) + (text.replace("\n", "\n   ") if indented and mark[-1] != "\n" else text)
            for number, text in enumerate(instructions, start=1)
        ]
        reply = "Sure, here they are:\n\n" + gap.join(rendered) + "\n\nLet me know if these help!"
        assert decode.parse(reply) == instructions
        assert decode.parse(reply, len(instructions)) == instructions
