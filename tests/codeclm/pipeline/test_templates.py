import pytest

from trl_extensions.codeclm.pipeline.metadata import Metadata
from trl_extensions.codeclm.pipeline.steps import Decode, Encode
from trl_extensions.codeclm.pipeline.templates import PROMPTS, load_template


NAMES = sorted(path.stem for path in PROMPTS.glob("*.jinja"))


def write(folder, text, name="encode"):
    (folder / f"{name}.jinja").write_text(text, encoding="utf-8")
    return folder


def test_there_is_a_prompt_for_each_step():
    assert NAMES == [
        "again", "answer", "decode", "encode", "evol", "propose", "rewrite", "rubrics", "score", "score_one",
    ]  # fmt: skip
    for name in NAMES:
        load_template(name)


def test_a_file_of_the_user_wins_and_the_others_stay(tmp_path):
    write(tmp_path, "\ufeffWofür ist das? {{ instruction }}\n")
    assert Encode(tmp_path).messages("Hallo")[0]["content"] == "Wofür ist das? Hallo"
    metadata = Metadata("greeting", ("tact",))
    assert Decode(str(tmp_path)).messages(metadata, 2) == Decode().messages(metadata, 2)


def test_a_file_of_the_user_may_include_one_that_comes_along(tmp_path):
    write(tmp_path, "{% include 'answer.jinja' %}!")
    assert load_template("encode", tmp_path).render(instruction="Hi", max_skills=3) == "Hi!"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("encode", "{{ instruktion }}", "unknown variable 'instruktion'; it may use instruction, max_skills"),
        ("encode", "{{ instruction }} {{ number }}", "unknown variable 'number'"),
        ("encode", "Describe it.", "does not depend on 'instruction'"),
        ("decode", "{{ use_case }}: {{ number }}", "does not depend on 'skills'"),
        ("score_one", "{{ instruction }} {{ first }} {{ second }}", "does not depend on 'which'"),
        ("encode", "\n{{ instruction }", "line 2: "),
        ("encode", "{% for x in instruction %}", "line 1: .*correct the file"),
        ("encode", "{{ instruction.words }}", "cannot be filled in .*words"),
        ("encode", "{{ instruction | nofilter }}", "nofilter"),
        ("encode", "{{ instruction }} {{ max_skills / 0 }}", "cannot be filled in .*zero"),
        ("encode", "{{ instruction }} {{ max_skills + '' }}", "cannot be filled in"),
        ("encode", "{{ instruction }}{% include 'missing.jinja' %}", "cannot be filled in .*missing"),
        ("encodes", "{{ instruction }}", "there is no prompt of that name; rename it to one of encode, decode"),
    ],
)
def test_bad_files_give_one_clear_line(tmp_path, name, text, message):
    write(tmp_path, text, name)
    with pytest.raises(ValueError, match=message) as error:
        load_template(name if name in NAMES else "encode", tmp_path)
    assert str(error.value).startswith(str(tmp_path / f"{name}.jinja")) and "\n" not in str(error.value)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "encode.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(ValueError, match=r"encode.jinja: cannot be read as UTF-8"):
        load_template("encode", tmp_path)


def test_values_are_not_templates():
    assert load_template("answer").render(instruction="{{ 7 * 7 }} <b>&</b>") == "{{ 7 * 7 }} <b>&</b>"
