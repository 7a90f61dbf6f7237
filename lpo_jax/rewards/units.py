"""Units after a number. An answer may omit the unit, but must not have a different one."""

import re

# One unit per line, with its spellings. Units that are not listed (students, ways, square feet per minute) are ignored.
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
    """Return whether both texts name known units that differ, or powers that differ, as in cm^2 and cm^3."""
    names = _names(one), _names(other)
    powers = _powers(one), _powers(other)
    return (all(names) and names[0] != names[1]) or (all(powers) and powers[0] != powers[1])


def _names(text: str) -> set[str]:
    text = text.replace(r"^{\circ}", " degree ").replace("%", " percent ")
    words = _WORD.findall(text.replace(r"\text", " ").lower())
    return {_UNITS[name] for word in words for name in (word, word.removesuffix("s")) if name in _UNITS}


def _powers(text: str) -> list[str]:
    words = text.lower()
    named = ["2"] * ("sq" in words) + ["3"] * ("cubic" in words)
    return named or _POWER.findall(text)
