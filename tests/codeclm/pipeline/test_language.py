"""A language and an audience: in every prompt, and what comes in another language is turned back and counted."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.codeclm.server import finished_calls
from trl_extensions.codeclm.config import CodecLMConfig
from trl_extensions.codeclm.export import export
from trl_extensions.codeclm.pipeline.codec import CodecLM
from trl_extensions.codeclm.pipeline.filters import InstructionFilters
from trl_extensions.codeclm.pipeline.seeds import make_metadata
from trl_extensions.codeclm.pipeline.steps import PromptTemplate, Rewrite, StepClient
from trl_extensions.core.generation.replies import Unreadable
from trl_extensions.core.generation.types import Generation
from trl_extensions.core.runs.jsonl import read_jsonl, write_jsonl


TEXTS = {
    "ja": (
        "大家さんに家賃の支払いを二週間待ってもらうための手紙を書いてください。",
        "大家様、いつもお世話になっております。",
    ),
    "de": (
        "Schreibe meinem Vermieter einen Brief, dass ich die Miete später bezahle.",
        "Sehr geehrter Herr Vermieter, ich schreibe.",
    ),
}  # fmt: skip
ENGLISH = (
    "Write a letter to my landlord that asks for two more weeks to pay the rent.",
    "Dear landlord, I am writing.",
)
METADATA = {"ja": ("手紙の作成", ["敬語"]), "de": ("Briefe schreiben", ["Höflichkeit"])}
AUDIENCE = {"ja": "大阪の学生", "de": "Studenten in Graz"}
LAST = {"ja": "理由も三つ挙げてください。", "de": "Nenne auch drei Gründe dafür, warum es länger dauert."}


class Bilingual:
    """Replies in a language, but for the first rewrite, the target's answers and one instruction: English."""

    def __init__(self, language, name):
        self.name, self.language, self.prompts, self.again = name, language, [], 0

    def generate(self, prompts, params, seeds=None):
        text, answer = TEXTS[self.language]
        use_case, skills = METADATA[self.language]
        for place, prompt in enumerate(prompts):
            self.prompts.append(prompt[0]["content"])
            first, schema = len(prompt) == 1, params.schema or ""
            reply = {"use_case": use_case, "skills": skills}
            if '"metadata"' in schema:
                reply = {"metadata": [reply]}
            elif '"instructions"' in schema:
                reply = {"instructions": [text, ENGLISH[0]]}
            elif '"rubrics"' in schema:
                reply = {"rubrics": [{"rubric": use_case, "action": LAST[self.language]}]}
            elif '"new_instruction"' in schema:
                reply = {"new_instruction": f"{ENGLISH[0]} Be brief." if first else f"{text}{LAST[self.language]}"}
            elif '"score_1"' in schema:
                reply = {"score_1": 9, "score_2": 9}
            elif not schema:
                reply = 2 * (ENGLISH[1] if self.name == "target" else answer)
            yield place, Generation(reply if isinstance(reply, str) else json.dumps(reply), "stop", 9, 9)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr("trl_extensions.codeclm.pipeline.codec.write_codeclm_report", lambda folder, **_: folder)


@pytest.mark.parametrize(("language", "name"), [("ja", "Japanese"), ("de", "German")])
def test_every_prompt_asks_for_it_and_other_languages_are_turned_back(tmp_path, language, name):
    pytest.importorskip("py3langid")
    (tmp_path / "seeds.jsonl").write_text(json.dumps({"instruction": "Ask my landlord for a new key."}) + "\n")
    settings = {"language": language, "audience": AUDIENCE[language]}
    config = CodecLMConfig(prompts=str(tmp_path / "seeds.jsonl"), num_instructions=2, **settings)
    strong, target = Bilingual(language, "strong"), Bilingual(language, "target")
    CodecLM(config, tmp_path / "run", strong=strong, target=target).run()
    for prompt in strong.prompts + target.prompts:
        assert name in prompt and AUDIENCE[language] in prompt
    steps = Counter(row["step"] for row in finished_calls(tmp_path / "run"))
    # One rewrite by the only action, asked for again; the target's answer is scored as it is
    assert (steps["rewrite"], steps["rewrite:again"], steps["answer"], steps["answer:again"]) == (1, 1, 2, 0)
    dropped = json.loads((tmp_path / "run" / "basics.json").read_text())["dropped"]
    assert dropped["language"] >= 1, dropped
    (row,) = read_jsonl(tmp_path / "run" / "items.jsonl")
    assert row["rounds"][1]["instruction"] == TEXTS[language][0] + LAST[language]
    assert row["rounds"][1]["answers"] == {"strong": TEXTS[language][1] * 2, "target": ENGLISH[1] * 2}
    # An answer to learn from is in the language, whoever gave it
    row |= {"outcome": "kept", "iteration": 2}
    for winner, reasons in (("strong", {}), ("target", {"language": 1})):
        write_jsonl(tmp_path / winner / "items.jsonl", [row | {"winner": winner}])
        assert export(tmp_path / winner, config).reasons == reasons


def test_metadata_for_a_description_too(tmp_path):
    engine = Bilingual("ja", "strong")
    config = CodecLMConfig(language="ja", audience="大阪の学生")
    make_metadata(engine, config, tmp_path / "m.yaml", description="手紙を書く", number=1)
    assert engine.prompts and all("Japanese" in own and "大阪の学生" in own for own in engine.prompts)
    assert "手紙の作成" in (tmp_path / "m.yaml").read_text(encoding="utf-8")


def test_without_them_prompts_say_nothing_of_it():
    plain = PromptTemplate("answer").render(instruction="Say it in Latin.")
    assert plain.strip() == "Say it in Latin."
    for name in ("decode", "rubrics", "rewrite", "evol"):
        values = {"use_case": "x", "skills": ["y"], "number": 2, "instruction": "i", "action": "a"}
        text = PromptTemplate(name).render(**values)
        assert "anguage" not in text and "None" not in text and "\n\n\n" not in text


def test_a_prompt_of_the_user_gets_them(tmp_path):
    (tmp_path / "answer.jinja").write_text("{{ instruction }} ({{ language }}; {{ audience }})")
    made = PromptTemplate("answer", tmp_path).render(instruction="i", language="Japanese", audience="大阪の学生")
    assert made == "i (Japanese; 大阪の学生)"


def test_prompts_that_say_nothing_of_them_are_named(tmp_path, caplog):
    """A file that does, and the note to ask again, are not."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "answer.jinja").write_text("{{ instruction }}")
    (tmp_path / "own" / "evol.jinja").write_text("{{ instruction }} {{ action }} {{ language }}")
    config = CodecLMConfig(metadata="-", prompt_folder=str(tmp_path / "own"), language="ja", audience="大阪の学生")
    CodecLM(config, tmp_path / "run", strong=Bilingual("ja", "x"), target=Bilingual("ja", "y"))._claim(started=False)
    told = [(record.args[0], [Path(path).name for path in record.args[1].split(", ")]) for record in caplog.records]
    assert told == [("language", ["answer.jinja"]), ("audience", ["answer.jinja", "evol.jinja"])]


@pytest.mark.parametrize(
    ("code", "name"),
    [("ja", "Japanese"), ("pt-BR", "Portuguese (pt-BR)"), ("zh_Hant", "Chinese (zh_Hant)"), ("DE", "German")],
)
def test_codes_with_a_region_or_a_script(code, name):
    pytest.importorskip("py3langid")
    config = CodecLMConfig(language=code)
    assert StepClient(None, config, 0).reader["language"] == name
    own = {"ja": TEXTS["ja"][0], "DE": TEXTS["de"][0]}.get(code)
    own = own or {"p": "Escreva uma carta ao meu senhorio.", "z": "請寫一封信給房東，請他寬限兩週。"}[code[0]]
    filters = InstructionFilters(config)
    assert filters.foreign(own) is None and filters.foreign(ENGLISH[0]) == "en"
    assert CodecLMConfig(language=code, languages=["en", code[:2].lower()]).languages[0] == "en"


@pytest.mark.parametrize(
    "text",
    [
        "Convert the number in Fahrenheit to Celsius.",  # German, it is guessed
        "Generate a recipe for a chili con carne dish.",
        "def quick_sort(arr):\n    if len(arr) < 2:\n        return arr\n    pivot = arr[0]",
        "https://example.com/1.jpg",
        "[1, 2, 3, 4, 5, 6, 7, 8]",
        "| 3 | 4 |\n|---|---|\n| 1001 | -3999 |\n| 85 | 1e6 |",
        "x^3 - 4x^2 + 6x - 24 = 0",
    ],
)
def test_code_tables_and_short_texts_are_in_no_other_language(text):
    pytest.importorskip("py3langid")
    assert InstructionFilters(CodecLMConfig(languages=["en"])).foreign(text) is None


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        ("はい、手紙を書きました。どうぞお使いください。", "answer"),
        ("元の指示に理由を付け加えてください。", "old instruction"),
        (LAST["ja"], "change was repeated"),
    ],
)
def test_japanese_rewrites_that_are_none(new, reason):
    reply = json.dumps({"new_instruction": new})
    with pytest.raises(Unreadable, match=reason):
        Rewrite().parse(reply, instruction=TEXTS["ja"][0], action=LAST["ja"])
    assert (
        Rewrite().parse(json.dumps({"new_instruction": "新しい指示：" + TEXTS["ja"][0]}), instruction="短い")
        == TEXTS["ja"][0]
    )


def test_settings_agree():
    assert CodecLMConfig(language="ja").languages == ["ja"]
    assert CodecLMConfig(language="ja", languages=["ja", "en"]).languages == ["ja", "en"]
    with pytest.raises(ValueError, match="`languages`") as error:
        CodecLMConfig(language="ja", languages=["en"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [("東京都庁舎見学会参加申込方法説明", None), ("请写一首关于秋天的诗歌并解释它的意思。", "zh")],
)
def test_japanese_without_kana(text, found):
    pytest.importorskip("py3langid")
    assert InstructionFilters(CodecLMConfig(languages=["ja"])).foreign(text) == found
    assert InstructionFilters(CodecLMConfig(languages=["en"])).foreign(text) == "zh"
