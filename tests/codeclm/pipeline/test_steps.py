import math

import pytest

from trl_extensions.codeclm.pipeline.metadata import Metadata
from trl_extensions.codeclm.pipeline.steps import (
    ACTIONS,
    Answer,
    Decode,
    Encode,
    Evol,
    Propose,
    Rewrite,
    Rubrics,
    Score,
    ScoreOne,
    again,
)
from trl_extensions.core.generation.replies import Unreadable


TRIP = Metadata("planning a trip", ("geography", "budgeting"))


def only_turn(messages):
    [message] = messages
    assert message["role"] == "user" and message["content"] == message["content"].strip()
    return message["content"]


def test_what_is_asked_holds_what_it_is_about():
    braces = "Fill in {{ name }} and {% this %} & <b>that</b>"
    assert braces in only_turn(Encode(max_skills=2).messages(braces))
    assert "one to 2" in only_turn(Encode(max_skills=2).messages("Hi"))
    for step in (Decode(), Rubrics()):
        text = only_turn(step.messages(TRIP, 7))
        assert "planning a trip" in text and "geography, budgeting" in text and "7" in text
    text = only_turn(Rewrite().messages(TRIP, braces, "Make it rhyme."))
    assert all(part in text for part in (braces, "Make it rhyme.", "planning a trip", "geography, budgeting"))
    text = only_turn(Evol().messages(braces, "Make it rhyme."))
    assert braces in text and "Make it rhyme." in text
    assert only_turn(Answer().messages(braces)) == braces
    text = only_turn(Score().messages("Q?", "one one", "two two"))
    assert text.index("Q?") < text.index("one one") < text.index("two two")
    text = only_turn(Propose(max_skills=2).messages("help in a kitchen", 4))
    assert "help in a kitchen" in text and "4 use cases" in text and "up to 2 skills" in text


def test_one_of_something_is_asked_for_in_the_singular():
    assert "write 1 instruction for" in only_turn(Decode().messages(TRIP, 1))
    assert "write 1 rubric with its action for" in only_turn(Rubrics().messages(TRIP, 1))
    assert "Write 1 use case," in only_turn(Propose().messages("help", 1))


def test_both_orders_of_answers_are_asked_alike():
    def swap(text):
        return text.replace("AAA", "CCC").replace("BBB", "AAA").replace("CCC", "BBB")

    one, two = (only_turn(Score().messages("Q?", *pair)) for pair in (("AAA", "BBB"), ("BBB", "AAA")))
    assert one != two and swap(one) == two
    one, two = (only_turn(ScoreOne().messages("Q?", "AAA", "BBB", which)) for which in ("first", "second"))
    assert one != two and one.replace("is the answer of assistant 1", "is the answer of assistant 2") == two


def test_a_model_that_hands_in_the_prompt_is_found_out():
    decode, rubrics = Decode(), Rubrics()
    shown = [line[3:] for line in only_turn(decode.messages(TRIP, 2)).splitlines() if line[:2] in ("1.", "2.")]
    assert len(shown) == 2
    assert decode.parse(f"1. {shown[0]}\n2. Where is Rome?\n3. {shown[1].upper()}", 2) == ["Where is Rome?"]
    with pytest.raises(Unreadable, match="repeats the question"):
        decode.parse(f"1. {shown[0]}\n2. {shown[1]}", 2)
    example = only_turn(rubrics.messages(TRIP, 2)).split("could be this:\n")[1].split("Now write")[0]
    with pytest.raises(Unreadable, match="repeats the question"):
        rubrics.parse(example, 2)
    [own] = rubrics.parse(example + "2. Rubric: How far it is\n   Action: Make it further away.", 2)
    assert own.action == "Make it further away."


OLD = "Write a packing list for a weekend in Rome."
NEW = "Write a packing list for a weekend in Rome in January, for two people who share one small bag."
GOOD = {
    "as asked": f"New instruction: {NEW}",
    "bare": NEW,
    "preamble": f"Sure! Here is the rewritten instruction:\n\n{NEW}",
    "bold label": f"**New instruction:** {NEW}",
    "bold label, colon outside": f"**New Instruction**:\n\n{NEW}",
    "heading": f"## Rewritten instruction\n{NEW}",
    "label of another method": f"#Rewritten Prompt#: {NEW}",
    "other label": f"Instruction: {NEW}",
    "old and new": f"Old instruction: {OLD}\nNew instruction: {NEW}",
    "quotes": f'"{NEW}"',
    "bold": f"**{NEW}**",
    "fence": f"```\n{NEW}\n```",
    "label and fence": f"New instruction:\n```text\n{NEW}\n```",
    "tags": f"<instruction>\n{NEW}\n</instruction>",
    "tags and talk": f"Here it is.\n<new instruction>{NEW}</new instruction>\nI added two conditions.",
    "JSON": f'{{"new_instruction": "{NEW}"}}',
    "closing": f"New instruction: {NEW}\n\nThis version adds a month and a limit.",
    "explanation": f"New instruction: {NEW}\n\n**Explanation:** I added a month.",
    "changes": f"New instruction: {NEW}\nChanges: a month.",
    "answered": f"New instruction: {NEW}\n\nAnswer: A coat, two scarves.",
    "note after a rule": f"{NEW}\n\n---\n\nWould you like another one?",
    "thoughts": f"<think>New instruction: what?</think>New instruction: {NEW}",
    "thoughts begun before the reply": f"Add a month.</think>\n{NEW}",
    "German": f"Neue Anweisung: {NEW}",
    "French": f"Nouvelle instruction : {NEW}",
    "Spanish": f"Nueva instrucción: {NEW}",
    "Chinese": f"新指令：{NEW}",
    "Japanese": f"新しい指示：{NEW}",
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("step", [Rewrite(), Evol()], ids=["rewrite", "evol"])
def test_the_new_instruction_is_found(step, name):
    assert step.parse(GOOD[name], OLD, "Add a limit.") == NEW


@pytest.mark.parametrize(
    "text",
    [
        "Fix this function, and say what it costs:\n\n```python\ndef f(x):\n    return x\n```",
        "Who is older?\n\n| name | age |\n|---|---|\n| Ann | 3 |",
        "Sort these:\n1. pear\n2. apple\n\nGive a reason for each.",
        "写一首关于雨的诗，不超过二十个字。",
        "Dear assistant, plan my weekend.",
        'Explain what "to be or not to be" means to "you".',
        "Here is a riddle. Solve it twice: what has keys but no locks?".replace("Here is a", "Below is a"),
    ],
)
def test_instructions_of_any_shape_stay_as_they_are(text):
    assert Rewrite().parse(text, OLD) == text
    assert Rewrite().parse(f"New instruction: {text}", OLD) == text


ACTION = "Add a limit that the answer has to keep to."
BAD = [
    ("", "empty"),
    ("<think>Hm", "empty"),
    ("New instruction:", "no new instruction"),
    ("New instruction: ...", "no new instruction"),
    (OLD, "unchanged"),
    (f"New instruction: “{OLD.upper()}”", "unchanged"),
    (f"{OLD}\n\nAnswer: Shirts, socks and a map.", "unchanged"),
    (ACTION, "the change was repeated"),
    ("I'm sorry, but I can't help with that.", "refusal"),
    ("Make the given instruction harder by adding a limit.", "talks about the old instruction"),
    ("```python\nprint('shirt')\n```", "looks like an answer"),
    ("Once upon a time there was a bag.", "looks like an answer"),
    ("Sure, you will need a coat.", "looks like an answer"),
    ("word " * 400, "400 words are too many for an instruction made of 9"),
]


@pytest.mark.parametrize(("text", "reason"), BAD)
@pytest.mark.parametrize("step", [Rewrite(), Evol()], ids=["rewrite", "evol"])
def test_what_is_no_new_instruction_has_a_reason(step, text, reason):
    with pytest.raises(Unreadable, match=reason) as error:
        step.parse(text, OLD, ACTION)
    assert "\n" not in str(error.value)


def test_a_new_instruction_that_was_cut_off():
    with pytest.raises(Unreadable, match="token limit"):
        Rewrite().parse(f"New instruction: {NEW}", OLD, truncated=True)
    # What was cut off is talk behind it
    assert Rewrite().parse(f"New instruction: {NEW}\n\nExplanation: I ad", OLD, truncated=True) == NEW


def test_evol_actions_are_distinct_sentences():
    assert len(set(ACTIONS)) == 6 and Evol.ACTIONS is ACTIONS
    assert all(action.endswith(".") and action[0].isupper() for action in ACTIONS)


@pytest.mark.parametrize("text", ["4", " Yes.\n", "```\nx\n```", "I'm sorry for your loss. Here is a letter: ..."])
def test_answers(text):
    assert Answer().parse(text) == text.strip()


def test_an_answer_has_no_thoughts_and_may_be_cut_off():
    assert Answer().parse("<think>2 + 2</think>\n\n4") == "4"
    assert Answer().parse("It is a long", truncated=True) == "It is a long"


def test_a_refusal_with_an_answer_is_an_answer():
    text = "I'm sorry, but I can't see your list. " + "Here is how you can sort one by yourself, step by step. " * 8
    assert Answer().parse(text) == text.strip()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the answer is empty"),
        ("<think>so</think> ", "the answer is empty"),
        ("I'm sorry, but I can't assist with that.", "refusal"),
        ("I’m really sorry, but I cannot help you with this request.", "refusal"),
        ("As an AI language model, I don't have personal opinions.", "refusal"),
        ("I cannot fulfill this request.", "refusal"),
        ("Es tut mir leid, aber dabei kann ich nicht helfen.", "refusal"),
        ("Lo siento, no puedo ayudar con eso.", "refusal"),
        ("对不起，我无法帮助您。", "refusal"),
    ],
)
def test_no_answer_has_a_reason(text, reason):
    with pytest.raises(Unreadable, match=reason):
        Answer().parse(text)


def test_thoughts_that_were_cut_off_are_no_answer():
    with pytest.raises(Unreadable, match="cut off before the answer"):
        Answer().parse("<think>2 + 2 is", truncated=True)


def test_scores():
    assert Score().parse("8 6.5") == (8, 6.5)
    with pytest.raises(Unreadable):
        Score().parse("Both are great.")
    with pytest.raises(Unreadable):
        Score().parse("9 1", truncated=True)  # a 10, perhaps


def test_the_score_of_one_is_expected_over_digits():
    logprobs = [-math.inf] * 10
    logprobs[3], logprobs[8] = math.log(0.2), math.log(0.6)
    score, mass = ScoreOne().parse(logprobs)
    assert score == pytest.approx(1 + (3 * 0.2 + 8 * 0.6) / 0.8) and mass == pytest.approx(0.8)


def test_asking_again_adds_two_turns():
    messages = Encode().messages("Say hello.")
    more = again(messages, "<think>hm</think> Hello!", Unreadable("there are no use case and skills"))
    assert more[:1] == messages and len(messages) == 1
    assert more[1] == {"role": "assistant", "content": "Hello!"}
    assert more[2]["role"] == "user" and "there are no use case and skills." in more[2]["content"]


def test_asking_again_after_nothing_keeps_to_one_turn():
    messages = Encode().messages("Say hello.")
    [turn] = again(messages, "<think>hm", "the reply is empty")
    assert turn["content"].startswith(messages[0]["content"]) and "the reply is empty." in turn["content"]
    assert "empty" not in messages[0]["content"]


def test_asking_again_quotes_the_beginning_of_a_long_reply():
    [_, quoted, _] = again(Encode().messages("Say hello."), "word " * 5000, "no")
    assert quoted["content"].startswith("word word") and len(quoted["content"]) < 2100


def test_asking_again_in_the_words_of_the_user(tmp_path):
    (tmp_path / "again.jinja").write_text("Noch einmal: {{ reason }}!", encoding="utf-8")
    assert again(Encode().messages("Say hello."), "Hello!", "leer", tmp_path)[-1]["content"] == "Noch einmal: leer!"
