import pytest

from trl_extensions.core.generation.types import Generation
from trl_extensions.sami.filters import REASONS, ResponseFilters, is_echo, is_evasive, rejection_reason


CONSTITUTIONS = ["1. Be brief.\n2. Answer like a pirate would do.", "1. Answer like a judge would do.\n2. Be long."]


def reason(*texts, filters=None, finish="stop", tokens=3, constitutions=CONSTITUTIONS):
    responses = [Generation(text=text, finish_reason=finish, num_tokens=tokens) for text in texts]
    return rejection_reason(responses, constitutions, filters or ResponseFilters())


def test_good_responses_pass():
    assert reason("Arr, seven minutes.", "The court finds that seven minutes suffice.") is None


@pytest.mark.parametrize("blank", ["", "  \n", "...", "**"])
def test_a_response_without_a_letter_is_empty(blank):
    assert reason("Fine.", blank) == "empty"


def test_equal_up_to_case_and_white_space():
    assert reason("Seven  minutes.\n", "seven minutes.") == "equal"
    assert reason("Seven minutes.", "Seven minutes!") is None
    assert reason("Seven.", "seven.", filters=ResponseFilters(drop_equal=False)) is None


def test_equal_looks_at_every_pair():
    three = [*CONSTITUTIONS, "1. Be kind.\n2. Be odd."]
    assert reason("a", "b", "A", constitutions=three) == "equal"
    assert reason("a", "b", "c", constitutions=three) is None


@pytest.mark.parametrize(
    ("text", "evasive"),
    [
        ("I'm sorry, but no.", True),
        ("I’m  SORRY to say", True),
        ('"I cannot do that."', True),
        ("As an AI language model, I think", True),
        ("**Sorry**, no.", True),
        ("Sorrysburg is a town.", False),
        ("You could say: I'm sorry.", False),
        ("I cannotate text.", False),
        ("As an aide, I help.", False),
    ],
)
def test_evasive_openings_match_whole_words_at_the_start(text, evasive):
    assert is_evasive(text) is evasive
    assert (reason("Fine.", text) == "evasive") is evasive


def test_evasive_openings_can_be_set():
    assert reason("Nope, never.", "Yes.", filters=ResponseFilters(evasive_openings=("nope",))) == "evasive"
    assert reason("I'm sorry.", "Yes.", filters=ResponseFilters(evasive_openings=())) is None


def test_too_long():
    assert reason("a", "b", finish="length") == "too_long"
    assert reason("a", "b", finish="length", filters=ResponseFilters(drop_truncated=False)) is None
    assert reason("a", "b", tokens=9, filters=ResponseFilters(max_tokens=9)) is None
    assert reason("a", "b", tokens=10, filters=ResponseFilters(max_tokens=9)) == "too_long"


@pytest.mark.parametrize(
    ("text", "echo"),
    [
        ("Sure:\n1. Be brief.\nSeven.", True),  # a numbered line
        ("be  brief. Seven.", True),  # starts with an instruction
        ("I will answer like a pirate would do: arr.", True),  # a long instruction anywhere
        ("It pays to be brief. Seven.", False),  # a short one inside ordinary speech
        ("Like a judge, I say seven.", False),
    ],
)
def test_echo(text, echo):
    assert is_echo(text, CONSTITUTIONS[0]) is echo
    assert (reason(text, "A fine answer.") == "echo") is echo


def test_echo_is_about_the_responses_own_constitution():
    assert reason("Answer like a judge would do.", "Answer like a pirate would do.") is None
    assert reason("Fine.", "Answer like a judge would do.") == "echo"
    assert reason("Fine.", "Answer like a judge would do.", filters=ResponseFilters(drop_echo=False)) is None


def test_the_first_reason_counts():
    assert REASONS == ("empty", "equal", "evasive", "too_long", "echo")
    assert reason("", "", finish="length") == "empty"
    assert reason("I'm sorry", "I'm sorry", finish="length") == "equal"
    assert reason("I'm sorry", "1. Be brief.", finish="length") == "evasive"
    assert reason("1. Be brief.", "Fine.", finish="length") == "too_long"


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="`max_tokens` is 0"):
        ResponseFilters(max_tokens=0)
    with pytest.raises(ValueError, match="empty opening"):
        ResponseFilters(evasive_openings=("I'm sorry", " "))
    with pytest.raises(TypeError, match="list of openings"):
        ResponseFilters(evasive_openings="I'm sorry")
    with pytest.raises(ValueError, match="1 responses for 2 constitutions"):
        reason("alone")
