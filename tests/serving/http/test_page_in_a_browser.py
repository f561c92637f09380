"""The page at `/` as a person uses it: type, read the answer as it comes, stop it, see the figures move."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser import FOUND, Page

pytestmark = pytest.mark.skipif(FOUND is None, reason="needs chromium")


@pytest.fixture
def page(url: str) -> Iterator[Page]:
    opened = Page(url)
    yield opened
    opened.close()


def test_type_read_stop_and_see_figures(page: Page) -> None:
    page.until("document.getElementById('name').textContent.includes('demo')")
    page.value("document.getElementById('way').value = 'text'")
    page.value("document.getElementById('max_tokens').value = 12")
    page.value("document.getElementById('text').focus()")
    page.type("def add(a, b):")
    page.press_enter()
    page.until("document.getElementById('log').textContent.includes('def add(a, b):')")
    page.until("document.getElementById('stop').disabled && document.getElementById('log').textContent.length > 30")

    # At this temperature it does not end by itself for long.
    for field, value in (("max_tokens", 900), ("temperature", 2), ("seed", 2)):
        page.value(f"document.getElementById('{field}').value = {value}")
    page.value("document.getElementById('text').focus()")
    before = page.value("document.getElementById('log').textContent.length")
    page.type("import os")
    page.press_enter()
    page.until(f"document.getElementById('log').textContent.length > {before + 30}")  # it comes while it is made
    assert page.value("document.getElementById('stop').disabled") is False
    page.value("document.getElementById('stop').click()")
    page.until("document.getElementById('stop').disabled")
    length = page.value("document.getElementById('log').textContent.length")
    page.until("[...document.querySelectorAll('#figures b')].some(each => /[1-9]/.test(each.textContent))")
    assert page.value("document.getElementById('log').textContent.length") == length
