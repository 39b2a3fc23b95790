"""How a query and a constitution become a prompt."""

import string


FIELDS = ("query", "constitution")

TRAINING_TEMPLATE = "Question: {query}\n\nWrite an answer that follows these rules:\n{constitution}\n\nAnswer:"
SAMPLING_TEMPLATE = TRAINING_TEMPLATE


def check_template(template: str, name: str) -> None:
    """Raise a one-line `ValueError` unless `template` has exactly the fields {query} and {constitution}.

    Args:
        template: Text in `str.format` notation.
        name: What the message calls it.
    """
    allowed = " and ".join("{" + field + "}" for field in FIELDS)
    if not isinstance(template, str):
        raise ValueError(f"`{name}` must be a text with the fields {allowed}, got {template!r}.")
    try:
        fields = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(
            f"`{name}` is not a valid template ({error}): write literal braces as {{{{ and }}}}."
        ) from None
    found = {field for field, _, _ in fields}
    unknown = sorted(found - set(FIELDS))
    if unknown:
        raise ValueError(f"`{name}` has the unknown field {{{unknown[0]}}}; it may use {allowed}.")
    if any(spec or conversion for _, spec, conversion in fields):
        raise ValueError(f"`{name}` formats a field with `:` or `!`, which texts do not need: write plain {allowed}.")
    missing = [field for field in FIELDS if field not in found]
    if missing:
        raise ValueError(f"`{name}` lacks the field {{{missing[0]}}}; it needs {allowed}.")


def render(template: str, *, query: str, constitution: str) -> str:
    """Fill a checked template. Braces inside the query or the constitution are left alone."""
    return template.format(query=query, constitution=constitution)
