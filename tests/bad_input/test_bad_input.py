"""Every row of the catalogue raises the error that it names; the page lists all of them."""

from __future__ import annotations

import warnings

import pytest
from catalogue import FOLDER, PAGE, Case, Refused, cases, page, run

ROWS = list(cases())


@pytest.mark.parametrize("case", [case for _, case in ROWS], ids=lambda case: case.id)
def test_refused(case: Case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        # What a package of the trainer says of its own future is no concern here.
        warnings.simplefilter("ignore")
        with pytest.raises(Exception) as caught:
            run(case.code, tmp_path)
    error = caught.value
    assert type(error).__name__ == case.error, repr(error)
    assert isinstance(error, ValueError | Refused)
    text = str(error).replace(str(tmp_path), FOLDER)
    assert not case.missing(text), text
    assert "\n" not in text


def test_a_row_needs_its_pieces_in_order():
    case = Case("", "", "", "first … second", "third")
    assert case.missing("first, then second; third") == []
    assert case.missing("second, first; third") == ["second"]
    assert case.missing("first, second") == ["third"]
    assert case._replace(fix="(advice)").missing("first, second") == []


def test_there_are_enough_and_no_name_twice():
    assert len(ROWS) >= 280
    ids = [case.id for _, case in ROWS]
    assert len(set(ids)) == len(ids)
    assert all(case.sees and case.fix for _, case in ROWS)


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(ROWS), "python tests/bad_input/catalogue.py writes it"
