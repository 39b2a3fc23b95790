"""Old names of fields."""

import warnings
from dataclasses import asdict, dataclass, fields, replace

import pytest

from trl_extensions.core.options import check_least, old_names, redacted, renamed


@renamed(form="task", workers="lanes")
@dataclass
class Arguments:
    task: str = "classification"
    lanes: int = 1

    def __post_init__(self):
        self.checked = self.task


def test_old_names_work_with_a_warning_each():
    with pytest.warns(FutureWarning, match="`form` is now called `task`") as seen:
        arguments = Arguments(form="reward", lanes=2)
    assert len(seen) == 1
    assert (arguments.task, arguments.lanes, arguments.checked) == ("reward", 2, "reward")
    with pytest.warns(FutureWarning, match="`workers` is now called `lanes`"):
        assert arguments.workers == 2
    with pytest.warns(FutureWarning):
        arguments.workers = 3
    assert arguments.lanes == 3


def test_new_names_are_silent_and_fields_stay_as_they_are():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments = Arguments("reward")
        assert asdict(arguments) == {"task": "reward", "lanes": 1}
        assert [f.name for f in fields(Arguments)] == ["task", "lanes"]
        assert replace(arguments, lanes=4).lanes == 4
    assert old_names(Arguments) == {"form": "task", "workers": "lanes"}


def test_both_names_at_once_are_refused():
    with pytest.raises(TypeError, match="`form` is now called `task`"):
        Arguments(form="a", task="b")


def test_a_subclass_knows_its_parents_old_names():
    @renamed(old="new")
    @dataclass
    class Child(Arguments):
        new: int = 0

    with pytest.warns(FutureWarning) as seen:
        child = Child(form="reward", old=5)
    assert (child.task, child.new, len(seen)) == ("reward", 5, 2)
    assert old_names(Child) == {"form": "task", "workers": "lanes", "old": "new"}


@pytest.mark.parametrize("value", [-1, 10**9, 1.0, True, "3", None, float("nan")])
def test_counts_that_cannot_be(value):
    with pytest.raises(ValueError, match=r"^`lanes` must be (a whole number of at least 0|at most 10,000,000), got "):
        check_least(Arguments(lanes=value), lanes=0)
    check_least(Arguments(lanes=10**9), 10**9, lanes=0)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("https://me:p4ss@word@host/v1", "https://***@host/v1"),
        ("https://トークン@host/v1", "https://***@host/v1"),
        ("https://host/v1?api-version=3&api-key=abc&x=1", "https://host/v1?api-version=3&api-key=***&x=1"),
        ('{"api_key": "abc", "max_tokens": 3, "eos_token": "</s>"}',
         '{"api_key": "***", "max_tokens": 3, "eos_token": "</s>"}'),
        ("mail me@host", "mail me@host"),
    ],
)  # fmt: skip
def test_what_is_secret_is_left_out(text, shown):
    assert redacted(text) == shown
