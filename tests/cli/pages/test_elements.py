"""Whatever a run calls itself, its page shows as text; a page needs nothing from elsewhere."""

from hypothesis import given
from hypothesis import strategies as st

from esper_lightning.cli.pages.elements import PAGE_BEGINS, Markup, element, page, table
from tests.cli.pages.browser import Elements

NASTY = '<script>alert("x")</script>&amp;\x1b[2J\udcff'


@given(st.text())
def test_every_text_is_escaped_in_content_and_attributes(text):
    found = Elements(element("p", text, title=text))
    assert [name for name, _ in found.elements] == ["p"]
    assert set(found.elements[0][1]) == {"title"}


def test_escape_sequences_and_surrogates_are_spelled_out():
    shown = element("pre", f"{NASTY}\nsecond line")
    assert "<script>" not in shown
    assert "\x1b" not in shown
    assert shown.encode().decode().count("\n") == 1
    assert r"\x1b[2J\udcff" in shown


def test_markup_is_not_escaped_twice():
    assert element("p", Markup("<b>1</b>")) == "<p><b>1</b></p>"


def test_a_page_says_who_wrote_it_and_loads_nothing():
    text = page(NASTY, table(["a"], [["1"], ["<i>"]]))
    assert text.encode().startswith(PAGE_BEGINS)
    found = Elements(text)
    assert not [a for _, a in found.elements if "src" in a or "href" in a]
    assert "url(" not in text
    assert len(found.all("script")) == 1


def test_only_the_page_of_a_running_run_is_loaded_again():
    def refreshes(text: str) -> list[str | None]:
        metas = Elements(text).all("meta")
        return [meta["content"] for meta in metas if meta.get("http-equiv") == "refresh"]

    assert refreshes(page("a")) == []
    assert refreshes(page("a", refresh_s=10)) == ["10"]
