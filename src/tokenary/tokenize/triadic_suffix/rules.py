"""The scheme as replacement rules of a tokenizer.json, for programs that run none of this code.

The engine of `tokenizers` replaces one pattern after the other: a numeral is opened first, then every group is closed
by its mark, from the highest level down: each knows its place by the mark before it.
"""

from __future__ import annotations

from tokenary.tokenize.triadic_suffix.scheme import BEGIN, DIGITS, POINT, Scheme, mark_of

Rules = list[tuple[str, str]]


def marking_rules(scheme: Scheme) -> Rules:
    """Return (pattern, content) replacements, applied one after the other, that do what `Scheme.mark` does."""
    size, comma = scheme.group, ",?" if scheme.separators else ""
    integer, fraction = _marks(scheme)
    digits = "" if scheme.variant == "compound" else DIGITS
    unmarked = f"(?![{mark_of(0)}-{DIGITS}])"

    number = rf"{scheme.body}(?:[eE][+-]?[0-9]{{1,{size}}})?{scheme.after}{unmarked}"
    rules = [(rf"{scheme.before}(?={number})", BEGIN)]
    for level in range(scheme.integer_groups - 1, -1, -1):
        higher = mark_of(level + 1)
        whole = rf"{higher}[0-9]{{{size}}})|(?<={higher},[0-9]{{{size}}}" if comma else rf"{higher}[0-9]{{{size}}}"
        rest = rf"(?=(?:{comma}[0-9]{{{size}}}){{{level}}}(?!{comma}[0-9]))"  # so many groups are to come
        rules.append((rf"(?:(?<={_some(BEGIN, size)})|(?<={whole})){unmarked}{rest}", digits + mark_of(level)))
    rules.append((rf"(?<=[{mark_of(0)}{BEGIN}])\.(?=[0-9])", POINT))
    for level in range(1, scheme.fraction_groups + 1):
        opened = POINT if level == 1 else mark_of(1 - level)
        whole = rf"(?<={opened}[0-9]{{{size}}})"
        rules.append((rf"{whole}|(?:(?<={_some(opened, size)})(?![0-9]))", digits + mark_of(-level)))
    last = rf"[{mark_of(0)}{fraction}]"
    exponent = rf"(?=[0-9]{{1,{size}}}{scheme.after})"
    rules.append((rf"(?:(?<={last}[eE])|(?<={last}[eE][+-])){exponent}", BEGIN))
    rules.append((rf"(?<={_some(BEGIN, size)}){unmarked}(?![0-9])", digits + mark_of(0)))
    if scheme.form == "paper":
        rules += _padding_rules(scheme, DIGITS if digits else f"[{integer}]", digits)
    rules.append((f"[{BEGIN}{POINT}]", ""))
    if digits:
        rules.append((f"(?<={DIGITS}){mark_of(0)}", ""))
    return rules


def _padding_rules(scheme: Scheme, stop: str, digits: str) -> Rules:
    """Pad the first and the last group with zeros, and drop separators."""
    size, (integer, fraction) = scheme.group, _marks(scheme)
    rules = [(rf"(?<={BEGIN})(?={POINT})", "0" * size + digits + mark_of(0))]
    for width in range(1, size):
        zeros = "0" * (size - width)
        rules.append((rf"(?<={BEGIN})(?=[0-9]{{{width}}}{stop})", zeros))
        rules.append((rf"(?<=[{POINT}{fraction}][0-9]{{{width}}})(?={digits}[{fraction}])", zeros))
    if scheme.separators:
        rules.append((rf"(?<=[{integer}]),(?=[0-9]{{{size}}}{stop})", ""))
    return rules


def unmarking_rules(scheme: Scheme) -> Rules:
    """Return the replacements that turn marked text into plain text, as `unmark` does for what is valid."""
    integer, fraction = _marks(scheme)
    marker = scheme.variant == "marker"
    marked = rf"(?:{DIGITS}[{integer}{fraction}]?)" if marker else f"[{integer}{fraction}]"
    behind, rules = DIGITS if marker else "", []
    if scheme.form == "paper" and scheme.group > 1:
        padding, stop = rf"0{{1,{scheme.group - 1}}}", DIGITS if marker else f"[{integer}]"
        rules.append((rf"(?<![0-9{DIGITS}{integer}{fraction}]){padding}(?=[0-9]+{stop})", ""))
        rules.append((rf"(?<=[0-9]){padding}(?={behind}[{fraction}](?![0-9]))", ""))
    rules.append((rf"(?<![0-9])(?=[0-9]{{1,{scheme.group}}}{behind}{mark_of(-1)})", "."))
    rules.append((rf"(?<=[0-9]){marked}", ""))
    return rules


def _marks(scheme: Scheme) -> tuple[str, str]:
    """Return the ranges of the marks of the integer part and of the fraction."""
    return (
        f"{mark_of(0)}-{mark_of(scheme.integer_groups - 1)}",
        f"{mark_of(-1)}-{mark_of(-scheme.fraction_groups)}",
    )


def _some(before: str, size: int) -> str:
    """Alternatives of fixed widths, as an engine without variable look-behind needs them: 1 to `size` digits."""
    return "|".join(rf"{before}[0-9]{{{width}}}" for width in range(1, size + 1))
