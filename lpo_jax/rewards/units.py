"""Units behind a number: they may be left out, but not be other ones."""

import re

# Spellings of one unit. What is not here (students, ways, square feet per minute) is never held against anyone.
_SPELLINGS = """
cm centimeter centimetre
mm millimeter millimetre
km kilometer kilometre
m meter metre
in inch inche
ft foot feet
yd yard
mi mile
mph
g gram
kg kilogram
lb pound
oz ounce
s sec second
min minute
h hr hour
day
week
month
year yr
cent
dollar usd
euro
degree deg
radian rad
liter litre
gallon
a.m am
p.m pm
percent
"""
_UNITS = {spelling: line.split()[0] for line in _SPELLINGS.strip().splitlines() for spelling in line.split()}
_WORD = re.compile(r"[a-z]+(?:\.m)?")


_POWER = re.compile(r"\^\{(-?[0-9])\}")


def clash(one: str, other: str) -> bool:
    """Whether both texts name known units and not the same, or both a power and not the same (cm^2, cm^3)."""
    names = _names(one), _names(other)
    powers = _powers(one), _powers(other)
    return (all(names) and names[0] != names[1]) or (all(powers) and powers[0] != powers[1])


def _names(text: str) -> set[str]:
    words = _WORD.findall(text.replace(r"^{\circ}", " degree ").replace(r"\text", " ").lower())
    return {_UNITS[name] for word in words for name in (word, word.removesuffix("s")) if name in _UNITS}


def _powers(text: str) -> list[str]:
    words = text.lower()
    named = ["2"] * ("sq" in words) + ["3"] * ("cubic" in words)
    return named or _POWER.findall(text)
