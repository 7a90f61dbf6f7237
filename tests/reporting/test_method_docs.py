"""docs/methods.md: complete, linked within itself, and what the program would write today."""

import re
from pathlib import Path

from lpo_jax import objectives as O
from lpo_jax.reporting import method_docs

DOCUMENT = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_document_is_up_to_date():
    assert DOCUMENT.read_text() == method_docs.markdown(), "run: lpo methods --markdown > docs/methods.md"
    assert (DOCUMENT.parent / "simplex.png").stat().st_size < 150_000


def test_every_method_has_its_section_with_every_option():
    text = method_docs.markdown()
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## )", text, re.M | re.S))
    for name, record in O.names().items():
        assert record["formula"] in sections[name]
        for option in record["options"]:
            assert f"`{option}=" in sections[name], (name, option)
    assert "Note: scores are raw log-probs" in sections["tpo"]
    assert "--methods tpo" in sections["tpo"] and "lpo simplex" not in sections["flowrl"]
    for word in O.DIVERGENCES:
        assert f"\n| `{word}` |" in text


def test_links_lead_to_headings():
    text = method_docs.markdown()
    headings = {method_docs._anchor(h) for h in re.findall(r"^#+ (.*)$", text, re.M)}
    links = set(re.findall(r"\]\(#([^)]*)\)", text))
    assert len(links) > len(O.names()) and links <= headings


def test_rows_of_tables_have_as_many_cells_as_their_heads():
    for line in re.findall(r"^\|.*\|$", re.sub(r"```.*?```", "", method_docs.markdown(), flags=re.S), re.M):
        assert len(re.findall(r"(?<!\\)\|", line)) in (4, 5), line
