import pytest

from trl_extensions.codeclm.pipeline.metadata import Metadata
from trl_extensions.codeclm.pipeline.steps import Encode, Propose, Rubric, Rubrics
from trl_extensions.core.generation.replies import Unreadable


TRIP = Metadata("planning a trip", ("geography", "budgeting", "scheduling"))

ONE = {
    "as asked": "Use case: planning a trip\nSkills: geography, budgeting, scheduling",
    "preamble and closing": (
        "Sure! Here is what I found:\n\nUse case: planning a trip\nSkills: geography, budgeting, scheduling\n\n"
        "Let me know if you need more, such as a plan."
    ),
    "bold": "**Use case:** planning a trip\n**Skills:** geography, budgeting, scheduling",
    "bold, colon outside": "**Use Case**: planning a trip\n\n**Skills**: geography, budgeting, scheduling",
    "bullets": "- Use case: planning a trip\n- Skills: geography, budgeting, scheduling",
    "numbers": "1. Use case: planning a trip.\n2. Skills: geography, budgeting, and scheduling.",
    "skills as a list": "Use case: planning a trip\nSkills:\n- geography\n- budgeting\n- scheduling",
    "skills as a numbered list": "Use case: planning a trip\nSkills:\n1. geography\n2. budgeting\n3. scheduling",
    "skills numbered in the line": "Use case: planning a trip\nSkills: 1. geography 2. budgeting 3. scheduling",
    "a skill a line": "Use case: planning a trip\nSkill 1: geography\nSkill 2: budgeting\nSkill 3: scheduling",
    "explained skills": (
        "Use case: planning a trip\nSkills:\n- **geography**: to know places\n- **budgeting**: to know prices\n"
        "- **scheduling**: to know hours"
    ),
    "skills with examples": "Use case: planning a trip\nSkills: geography (Alps, Rome), budgeting, scheduling (days)",
    "more skills than asked for": (
        "Use case: planning a trip\nSkills: geography, budgeting, scheduling, patience, writing"
    ),
    "skills twice": "Use case: planning a trip\nSkills: geography, Geography, budgeting, scheduling",
    "headings": "## Use case\nplanning a trip\n\n## Skills\n- geography\n- budgeting\n- scheduling",
    "in one line": "Use case: planning a trip; Skills: geography, budgeting, scheduling",
    "in one line, bold": "**Use case:** planning a trip **Skills:** geography, budgeting, scheduling",
    "fence": "```\nUse case: planning a trip\nSkills: geography, budgeting, scheduling\n```",
    "thoughts": "<think>Use case: eggs</think>Use case: planning a trip\nSkills: geography, budgeting, scheduling",
    "quotes": 'Use case: "planning a trip"\nSkills: "geography", "budgeting", "scheduling"',
    "brackets": "Use case: [planning a trip]\nSkills: [geography, budgeting, scheduling]",
    "explained use case": (
        "Use case: planning a trip (the person wants to go abroad with two small children in the summer)\n"
        "Skills: geography, budgeting, scheduling"
    ),
    "longer labels": "Primary use case: planning a trip\nSkills required: geography; budgeting; scheduling",
    "JSON": '{"use_case": "planning a trip", "skills": ["geography", "budgeting", "scheduling"]}',
    "fenced JSON": '```json\n{"Use Case": "planning a trip", "Skills": "geography, budgeting, scheduling"}\n```',
    "JSON in a list": '[{"use_case": "planning a trip", "skills": ["geography", "budgeting", "scheduling"]}]',
    "table": ("| Use case | Skills |\n|---|---|\n| planning a trip | geography, budgeting, scheduling |"),
    "German": "Anwendungsfall: planning a trip\nFähigkeiten: geography, budgeting, scheduling",
    "French": "Cas d’utilisation : planning a trip\nCompétences requises : geography, budgeting et scheduling".replace(
        " et ", ", et "
    ),
    "Spanish": "Caso de uso: planning a trip\nHabilidades: geography, budgeting, scheduling",
    "Portuguese": "Caso de uso: planning a trip\nCompetências: geography, budgeting, scheduling",
    "Italian": "Caso d'uso: planning a trip\nCompetenze: geography, budgeting, scheduling",
    "Russian": "Вариант использования: planning a trip\nНавыки: geography, budgeting, scheduling",
    "Chinese": "用例：planning a trip\n技能：geography、budgeting、scheduling",
    "Japanese": "ユースケース：planning a trip\nスキル：geography、budgeting、scheduling",
    "Korean": "사용 사례: planning a trip\n기술: geography, budgeting, scheduling",
    "labels nobody knows": "Gwaith: planning a trip\nSgiliau: geography, budgeting, scheduling",
    "no label for the use case": "planning a trip\nSkills: geography, budgeting, scheduling",
    "no label for the skills": "Use case: planning a trip\ngeography, budgeting, scheduling",
    "no labels": "planning a trip\ngeography, budgeting, scheduling",
    "talks on": (
        "Use case: planning a trip\nSkills: geography, budgeting, scheduling\n\nUse case: frying eggs\nSkills: cooking"
    ),
}


@pytest.mark.parametrize("name", ONE)
def test_metadata_in_many_forms(name):
    assert Encode().parse(ONE[name]) == TRIP


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("I'm sorry, but I can't assist with that.", "refusal"),
        ("Use case: planning a trip\nSkills: none", "no skill"),
        ("Use case: planning a trip\nSkills: N/A", "no skill"),
        ("Use case: planning a trip\nSkills: ..., ..., ...", "no skill"),
        ("Use case: planning a trip\nSkills:", "no use case and skills"),
        ("Use case: ...\nSkills: geography", "no use case"),
        ("Use case: planning a trip", "no use case and skills"),
        ("Rome is lovely in the spring and has a lot of sights to offer to people of all ages.", "no use case"),
        (
            "Use case: the person asks for a plan of a trip that takes them to five towns in two weeks\nSkills: a",
            "the use case has 18 words",
        ),
    ],
)
def test_metadata_that_cannot_be_read_has_a_reason(text, reason):
    with pytest.raises(Unreadable, match=reason):
        Encode().parse(text)


def test_the_cut_off_skill_is_left_out():
    encode = Encode()
    text = "Use case: planning a trip\nSkills: geography, budg"
    assert encode.parse(text, truncated=True) == Metadata("planning a trip", ("geography",))
    with pytest.raises(Unreadable):
        encode.parse("Use case: planning a trip\nSkills: geogr", truncated=True)
    # What was cut off is talk behind it
    assert encode.parse(ONE["as asked"] + "\n\nThe trip goes to Ro", truncated=True) == TRIP


def test_a_skill_may_be_called_so():
    text = "Use case: planning a trip\nSkills:\n- negotiation skills\n- budgeting skills"
    assert Encode().parse(text).skills == ("negotiation skills", "budgeting skills")


def test_max_skills():
    assert Encode(max_skills=1).parse(ONE["as asked"]).skills == ("geography",)


EGGS = Metadata("frying eggs", ("cooking",))
SEVERAL = {
    "as asked": (
        "1. Use case: planning a trip\n   Skills: geography, budgeting, scheduling\n"
        "2. Use case: frying eggs\n   Skills: cooking"
    ),
    "bold with blank lines": (
        "Here are two:\n\n**1. Use case:** planning a trip\n**Skills:** geography, budgeting, scheduling\n\n"
        "**2. Use case:** frying eggs\n**Skills:** cooking\n\nI hope this helps!"
    ),
    "colons": "1. planning a trip: geography, budgeting, scheduling\n2. frying eggs: cooking",
    "bold names": "- **planning a trip** - geography, budgeting, scheduling\n- **frying eggs** - cooking",
    "brackets": "1. planning a trip (geography, budgeting, scheduling)\n2. frying eggs (cooking)",
    "below": "1. planning a trip\n   - Skills: geography, budgeting, scheduling\n2. frying eggs\n   - Skills: cooking",
    "sub-lists": (
        "1. **Use case: planning a trip**\n   - Skills:\n     - geography\n     - budgeting\n     - scheduling\n"
        "2. **Use case: frying eggs**\n   - Skills:\n     - cooking"
    ),
    "table": (
        "| # | Use case | Skills |\n|--|:--|:--|\n| 1 | planning a trip | geography, budgeting, scheduling |\n"
        "| 2 | frying eggs | cooking |"
    ),
    "JSON": (
        '{"metadata": [{"use_case": "planning a trip", "skills": ["geography", "budgeting", "scheduling"]}, '
        '{"use_case": "frying eggs", "skills": ["cooking"]}]}'
    ),
    "mapping": '{"planning a trip": ["geography", "budgeting", "scheduling"], "frying eggs": ["cooking"]}',
    "one bad, one twice": (
        "1. Use case: planning a trip\nSkills: geography, budgeting, scheduling\n2. Use case: sleeping\nSkills: none\n"
        "3. Use case: frying eggs\nSkills: cooking\n4. Use case: Frying eggs.\nSkills: patience"
    ),
    "German": (
        "1. Anwendungsfall: planning a trip\n   Fähigkeiten: geography, budgeting, scheduling\n"
        "2. Anwendungsfall: frying eggs\n   Fähigkeiten: cooking"
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_metadata(name):
    assert Propose().parse(SEVERAL[name], 5) == [TRIP, EGGS]


def test_several_are_cut_and_the_cut_off_one_left_out():
    assert Propose().parse(SEVERAL["as asked"], 1) == [TRIP]
    text = SEVERAL["as asked"].removesuffix("king")
    assert Propose().parse(text, 5, truncated=True) == [TRIP]


RUBRICS = [Rubric("How many limits there are", "Add two limits."), Rubric("How rare it is", "Choose a rarer topic.")]
FORMS = {
    "as asked": (
        "1. Rubric: How many limits there are\n   Action: Add two limits.\n"
        "2. Rubric: How rare it is\n   Action: Choose a rarer topic."
    ),
    "bold": (
        "Here you go:\n\n1. **Rubric:** How many limits there are\n   **Action:** Add two limits.\n\n"
        "2. **Rubric:** How rare it is\n   **Action:** Choose a rarer topic.\n\nThese make it harder."
    ),
    "numbered labels": (
        "Rubric 1: How many limits there are\nAction 1: Add two limits.\n\n"
        "Rubric 2: How rare it is\nAction 2: Choose a rarer topic."
    ),
    "all of one first": (
        "Rubric 1: How many limits there are\nRubric 2: How rare it is\n"
        "Action 1: Add two limits.\nAction 2: Choose a rarer topic."
    ),
    "two lists": (
        "**Rubrics:**\n1. How many limits there are\n2. How rare it is\n\n"
        "**Actions:**\n1. Add two limits.\n2. Choose a rarer topic."
    ),
    "two lists under headings": (
        "## Rubrics\n\n- How many limits there are\n- How rare it is\n\n"
        "## Actions\n\n- Add two limits.\n- Choose a rarer topic."
    ),
    "in one line": (
        "1. Rubric: How many limits there are Action: Add two limits.\n"
        "2. Rubric: How rare it is Action: Choose a rarer topic."
    ),
    "actions as items": (
        "1. Rubric: How many limits there are\n   - Action: Add two limits.\n"
        "2. Rubric: How rare it is\n   - Action: Choose a rarer topic."
    ),
    "arrows": "1. How many limits there are → Add two limits.\n2. How rare it is -> Choose a rarer topic.",
    "lines": "1. How many limits there are\n   Add two limits.\n2. How rare it is\n   Choose a rarer topic.",
    "no label for the rubric": (
        "1. How many limits there are\n   Action: Add two limits.\n2. How rare it is\n   Action: Choose a rarer topic."
    ),
    "over two lines": (
        "1. Rubric: How many\n   limits there are\n   Action: Add two\n   limits.\n"
        "2. Rubric: How rare it is\n   Action: Choose a rarer topic."
    ),
    "table": (
        "| Rubric | Action |\n|---|---|\n| How many limits there are | Add two limits. |\n"
        "| How rare it is | Choose a rarer topic. |"
    ),
    "JSON": (
        '[{"rubric": "How many limits there are", "action": "Add two limits."}, '
        '{"rubric": "How rare it is", "action": "Choose a rarer topic."}]'
    ),
    "JSON of two lists": (
        '{"rubrics": ["How many limits there are", "How rare it is"], '
        '"actions": ["Add two limits.", "Choose a rarer topic."]}'
    ),
    "French": (
        "1. Critère : How many limits there are\n   Action : Add two limits.\n"
        "2. Critère : How rare it is\n   Action : Choose a rarer topic."
    ),
    "Chinese": (
        "1、评分标准：How many limits there are\n行动：Add two limits.\n"
        "2、评分标准：How rare it is\n行动：Choose a rarer topic."
    ),
    "Spanish": (
        "1. Rúbrica: How many limits there are\n   Acción: Add two limits.\n"
        "2. Rúbrica: How rare it is\n   Acción: Choose a rarer topic."
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_rubrics_in_many_forms(name):
    assert Rubrics().parse(FORMS[name], 4) == RUBRICS


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("1. Rubric: How many limits there are", "no rubric with an action"),
        ("1. Rubric: ...\n   Action: ...", "no rubric with an action"),
        ("I cannot help with that.", "refusal"),
    ],
)
def test_rubrics_that_cannot_be_read_have_a_reason(text, reason):
    with pytest.raises(Unreadable, match=reason):
        Rubrics().parse(text, 4)


def test_rubrics_are_cut_and_the_cut_off_one_left_out():
    assert Rubrics().parse(FORMS["as asked"], 1) == RUBRICS[:1]
    assert Rubrics().parse(FORMS["as asked"].removesuffix(" topic."), 4, truncated=True) == RUBRICS[:1]
    assert Rubrics().parse(FORMS["as asked"] + "\n3. Rubric: How lo", 4, truncated=True) == RUBRICS
