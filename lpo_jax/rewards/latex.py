r"""Canonical spelling of the LaTeX of answers.

`\dfrac12`, `\tfrac{1}{2}` and `\frac 1 2` become `\frac{1}{2}`. Sizes, spacing, dollar signs and fonts are removed.
Unicode signs, plain `sqrt(2)` and `**` become commands. Nothing is evaluated.
"""

import re
import unicodedata

MAX_DEPTH = 40

_UNICODE = str.maketrans(
    {
        **{"−": "-", "–": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "÷": "/", "°": r"^\circ "},
        **{"√": r"\sqrt ", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "²": "^2", "³": "^3", "±": r"\pm "},
        **{"π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne "},
        **{"∪": r"\cup ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "∖": r"\setminus ", "∈": r"\in "},
        **{"∨": r"\lor ", "∧": r"\land ", "…": r"\ldots ", "，": ",", "€": "", "£": "", "¥": ""},
    }
)
_UNICODE |= {
    code: "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", chr(code)).split("\u2044"))
    for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F), 0x2189)  # ½ and the other vulgar fractions
}
# 10,\!080 and 10{,}080 and 10\,080: separators that can only separate thousands.
_THOUSANDS = re.compile(r"(?<=[0-9])(?:,\s*\\!\s*|\\!\s*,\s*|\{\s*,\s*\}\s*|\\[,; ]|~)(?=[0-9]{3}(?![0-9]))")
_ROW_GAP = re.compile(r"(?<=\\\\)\s*\[-?[0-9.]+(?:pt|em|ex|mm|cm)\]")  # \\[2pt]
_TEXT = r"\\(?:text|mbox|hbox|textrm|textbf|textit|textnormal|mathrm|rm)\b\s*"


def _conjunction(word: str, commands: str) -> re.Pattern[str]:
    return re.compile(
        rf"{_TEXT}\{{[\s,;~]*{word}[\s,;~]*\}}|(?<![A-Za-z\\{{]){word}(?![A-Za-z}}])|\\(?:{commands})\b"
    )


_AND, _OR = _conjunction("and", "land|wedge"), _conjunction("or", "lor|vee")
# 1 4/5 is 9/5, but 2 1 4/5 and x^2 1/2 contain no mixed number.
_PLAIN_MIXED = re.compile(
    r"(?<![0-9A-Za-z.,^_}/])(?<![0-9A-Za-z]\s)(0|[1-9][0-9]*)\s+([1-9][0-9]*)\s*/\s*([1-9][0-9]*)(?![0-9!^({])(?![.,][0-9])"
)
_DOT = re.compile(r"(?<=[0-9.])\\dot\s*\{?\s*([0-9])\s*\}?(?![0-9\\])")  # 0.1\dot{6}
_PERIOD = re.compile(r"(?<![0-9A-Za-z.,}])([0-9]+\.)\(([0-9]+)\)(?![0-9.!^({\\])")  # 0.(3)
_ABS = re.compile(r"(?:(?<![A-Za-z\\])abs|\\operatorname\s*\{\s*abs\s*\})\s*(?:\\left\s*)?\(")
_REALS = re.compile(r"\\(?:R|reals|Reals|Bbb\s*\{?R\}?)(?![A-Za-z])")
_WORDS = re.compile(
    r"(?<![A-Za-z\\])(sqrt|pi|infinity|infty|sin|cos|tan|arcsin|arccos|arctan|log|ln|exp|theta)(?![A-Za-z])"
)
# 575 students, 5 cm, 5cm^2: the words after a number are its unit.
_BARE_UNIT = re.compile(
    r"(?<=[0-9}])(?:\s+([A-Za-z]{3,}(?:\s+[A-Za-z]{2,}){0,3})|\s*(cm|mm|km|kg|ft|mph|in))"
    r"(?=\s*(?:\^\s*\{?[23]\}?)?\s*(?:[.,;)\]]|\\lor|$))"
)
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\s+|.", re.DOTALL)
_COMMAND = re.compile(r"\\[A-Za-z]+")

_SPACES = frozenset({r"\,", r"\;", r"\:", r"\>", r"\ ", "\\\n", "~", r"\quad", r"\qquad", r"\space"})
_DROPPED = frozenset(
    re.findall(
        r"\S+",
        r"""\! $ \$ \( \) \[ \] \displaystyle \textstyle \limits \nolimits \mathbf \mathit \boldsymbol \bm \mathsf
        \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \biggl \biggr \Biggl \Biggr \left \right \middle""",
    )
)
# Each command, followed by its other spellings.
_SPELLINGS = r"""
\frac \dfrac \tfrac \cfrac, \binom \dbinom \tbinom, \le \leq \leqslant, \ge \geq \geqslant, < \lt, > \gt, \ne \neq,
\cdot \times \ast *, / \div, \{ \lbrace, \} \rbrace, [ \lbrack, ] \rbrack, ( \langle, ) \rangle, | \lvert \rvert \vert,
% \%, ^{\circ} \degree, \infty \infinity, \emptyset \varnothing, \approx \simeq, \overline \bar, \vec \overrightarrow,
\setminus \backslash \smallsetminus, \ldots \dots \cdots, ' \prime
"""
_RENAMED = {other: command for command, *others in map(str.split, _SPELLINGS.split(",")) for other in others}
_TEXTS = frozenset(
    {r"\text", r"\mbox", r"\hbox", r"\textrm", r"\textbf", r"\textit", r"\textnormal", r"\mathrm"}
)
_ARGUMENTS = dict.fromkeys((r"\sqrt", r"\overline", r"\vec", r"\mathbb", "^", "_"), 1)
_ARGUMENTS |= {r"\frac": 2, r"\binom": 2}


class Unreadable(ValueError):
    """The text is not well-formed LaTeX: its braces do not match, or it is nested too deeply."""


def canonical(text: str) -> str:
    r"""Return the text in canonical spelling, without meaningless spaces.

    Every argument is in braces, text is `\text{words with single spaces}`, `and` between values becomes a comma, and
    `or` becomes `\lor`. A space is kept between two numbers, and between a command and a letter.

    Raises:
      Unreadable: if braces do not match, an argument is missing or the nesting is deeper than 40.
    """
    text = text.translate(_UNICODE).replace("**", "^")
    text = _ROW_GAP.sub("", _THOUSANDS.sub("", text))
    text = _OR.sub(r" \\lor ", _AND.sub(" , ", text))
    text = _bars(_REALS.sub(r"\\mathbb{R}", text))
    text = _DOT.sub(r"\\overline{\1}", text)
    text = _PERIOD.sub(r"\1\\overline{\2}", _PLAIN_MIXED.sub(_as_fraction, text))
    text = _WORDS.sub(r"\\\1 ", text)
    text = _BARE_UNIT.sub(lambda match: rf"\text{{{match[1] or match[2]}}}", text)
    return _Reader(_TOKEN.findall(text)).sequence(closing=None, depth=0).strip()


def _as_fraction(mixed: re.Match[str]) -> str:
    whole, top, bottom = mixed.groups()
    proper = len(top) < len(bottom) or (len(top) == len(bottom) and top < bottom)
    return rf"{whole}\frac{{{top}}}{{{bottom}}}" if proper else mixed[0]


def _bars(text: str) -> str:
    """Write `abs(x)` as `|x|`, unless x has bars itself, which would make the pairs of bars ambiguous."""
    for match in reversed([*_ABS.finditer(text)]):
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += (text[end] == "(") - (text[end] == ")")
            end += 1
        inside = text[match.end() : end - 1]
        if not depth and inside and "|" not in inside:
            text = f"{text[: match.start()]}|{inside}|{text[end:]}"
    return text


class _Reader:
    """A recursive-descent parser that rewrites a list of tokens in one pass."""

    def __init__(self, tokens: list[str]):
        self._tokens, self._at = tokens, 0

    def sequence(self, closing: str | None, depth: int) -> str:
        """Return everything up to the closing token (or the end) in canonical spelling."""
        if depth > MAX_DEPTH:
            raise Unreadable(f"nested deeper than {MAX_DEPTH} levels")
        out, space = "", False
        while True:
            if self._at == len(self._tokens):
                if closing is not None:
                    raise Unreadable(f"a {closing} is missing")
                return out
            token = self._tokens[self._at]
            self._at += 1
            if token == closing:
                return out
            if token == "}":
                raise Unreadable("a } without its {")
            if token == r"\choose" and closing == "}":
                top, bottom = out.strip(), self.sequence(closing, depth + 1).strip()
                return rf"\binom{{{top}}}{{{bottom}}}"
            if token.isspace() or token in _SPACES:
                space = True
                continue
            element = self._element(token, depth)
            if not element:
                continue
            out += _gap(out, element, space) + element
            space = False

    def _element(self, token: str, depth: int) -> str:
        token = _RENAMED.get(token, token)
        if token in _DROPPED:
            if token in (r"\left", r"\right") and self._next() == ".":
                self._at += 1
            return ""
        if token == "{":
            inside = self.sequence("}", depth + 1)
            return "{" + inside + "}" if inside else ""
        if token in _TEXTS:
            return self._text()
        if token not in _ARGUMENTS:
            return token
        option = ""
        if token == r"\sqrt" and self._next() == "[":
            self._at += 1
            option = "[" + self.sequence("]", depth + 1) + "]"
        arguments = [self._argument(token, depth + 1) for _ in range(_ARGUMENTS[token])]
        return token + option + "".join("{" + argument + "}" for argument in arguments)

    def _next(self) -> str | None:
        """Skip spaces and return the next token without consuming it; None at the end."""
        while self._at < len(self._tokens):
            token = self._tokens[self._at]
            if not token.isspace() and token not in _SPACES:
                return token
            self._at += 1
        return None

    def _argument(self, command: str, depth: int) -> str:
        """Return one group or token; x^10, x^-1, x^(n+1) and sqrt(2) have their plain-text meaning."""
        token = self._next()
        if token is None or token == "}":
            raise Unreadable(f"{command} lacks its argument")
        self._at += 1
        if token == "{":
            return self.sequence("}", depth).strip()
        if token == "(" and command != "_":
            return "(" + self.sequence(")", depth) + ")"
        if token == "-" and command == "^":
            return "-" + self._argument(command, depth + 1)
        if token.isdigit() and command == "^":
            while self._at < len(self._tokens) and self._tokens[self._at].isdigit():
                token += self._tokens[self._at]
                self._at += 1
        return self._element(token, depth)

    def _text(self) -> str:
        if self._next() != "{":
            return ""
        self._at += 1
        out, depth = [], 1
        while depth:
            if self._at == len(self._tokens):
                raise Unreadable("a } is missing")
            token = self._tokens[self._at]
            self._at += 1
            depth += (token == "{") - (token == "}")
            out.append(" " if token in _SPACES else token)
        words = " ".join("".join(out[:-1]).replace("$", "").replace(r"\lor", ",").split())
        if re.fullmatch(r"[A-Za-z]|[0-9.,]+|", words):  # \mathrm{e}, \text{13}
            return words
        return r"\text{" + words + "}"


def _gap(before: str, element: str, space: bool) -> str:
    if space and before[-1:].isdigit() and element[0].isdigit():
        return " "
    command = before.rfind("\\")
    if element[0].isalpha() and command >= 0 and _COMMAND.fullmatch(before, command):
        return " "
    return ""
