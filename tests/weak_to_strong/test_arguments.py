"""Settings of the commands: old names, and values that are refused."""

import pytest

from trl_extensions.weak_to_strong.arguments import WeakToStrongArguments, parse_variant, split_layers


def test_old_names_work_with_one_warning_each():
    with pytest.warns(FutureWarning) as caught:
        args = WeakToStrongArguments(form="reward", middle_models=["a"])
    assert (args.task, args.bootstrap_models) == ("reward", ["a"]) and len(caught) == 2
    assert "`form` is now called `task`" in " ".join(str(own.message) for own in caught)
    with pytest.warns(FutureWarning, match="`middle_models` is now called `bootstrap_models`"):
        assert args.middle_models == ["a"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "ranking"}, "`task` must be one of classification, reward, generation"),
        ({"ensemble": "mean"}, "`ensemble` must be one of"),
        ({"keep_share": 1.0}, "`keep_share` must lie between 0 and 1"),
        ({"num_examples": 1}, "`num_examples` must be at least 2"),
        ({"seeds": [1, 1]}, "`seeds` must be one or more different numbers"),
        ({"weak_models": ["a", "a"]}, "`weak_models` names 'a' twice"),
        ({"variants": ["mse"]}, "`variants`: 'mse' is none"),
        ({"test_where": "split"}, "`test_where` must be a column"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WeakToStrongArguments(**options)


def test_small_languages():
    assert parse_variant("product+weights+kept") == ("product", True, True)
    assert split_layers("gpt2[:6]") == ("gpt2", 6) and split_layers("gpt2") == ("gpt2", None)
    with pytest.raises(ValueError, match=r"write NAME\[:4\]"):
        split_layers("gpt2[0]")
