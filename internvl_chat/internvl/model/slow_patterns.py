"""Find regular expressions that may take very long.

Tokenizers and adapters of unknown origin contain regular expressions. A matcher that backtracks needs exponential time
for some of them, such as `(a+)+b`: a repeated group whose content can be split in many ways. With n quantifiers in a
row, such as `.*.*.*b`, the time is the n-th power of the length.
"""

import re

# In one alternative, patterns of published tokenizers have at most 4 such quantifiers. The longest has 400 characters.
MAX_UNBOUNDED_QUANTIFIERS, MAX_PATTERN_CHARACTERS = 6, 4096
# A character class (one level of nesting, as Oniguruma allows), an escaped character, a group's start or end, `|`, or a
# quantifier, or any other character. A class may begin with `]`.
TOKEN = re.compile(
    r"\[\^?\]?(?:\\.|\[[^\]]*\]|[^\]\\])*\]|\\.|\((?:\?(?:<?[=!]|[:>]|<\w+>|[a-z-]*:)?)?|\{\d*,?\d*\}|.", re.DOTALL
)


def is_slow_pattern(pattern: str, max_unbounded_quantifiers: int = MAX_UNBOUNDED_QUANTIFIERS) -> bool:
    """Return whether matching a regular expression may take very long.

    The answer is by syntax: a repeated group that contains a quantifier without upper bound or alternatives, or more
    than `max_unbounded_quantifiers` in one alternative. It may be wrong for a group that matches in one way only.
    """
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        return True
    num_unbounded, was_varying = 0, False
    open_groups = [False]  # for each open group: whether its content varies
    for token in TOKEN.findall(pattern):
        is_unbounded = token in ("*", "+") or (token.startswith("{") and token.endswith(",}"))
        is_repeated = is_unbounded or (token.startswith("{") and token not in ("{}", "{,}", "{1}", "{0,1}"))
        num_unbounded += is_unbounded
        if (is_repeated and was_varying) or num_unbounded > max_unbounded_quantifiers:
            return True
        was_varying = False
        if token.startswith("("):
            open_groups.append(False)
        elif token == ")" and len(open_groups) > 1:
            was_varying = open_groups.pop()
            open_groups[-1] |= was_varying
        elif token == "|" and len(open_groups) == 1:
            num_unbounded = 0
        elif token == "|" or is_unbounded:
            open_groups[-1] = True
    return False
