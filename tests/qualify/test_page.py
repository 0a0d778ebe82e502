"""The page says what the JSON says, and no cell breaks its table."""

from lcexport.qualify.page import MOST_ROWS, page, rows_of, section, shown

CLAIM = {
    "id": "step",
    "claim": "It agrees.",
    "test": "By running it.",
    "verdict": "refuted",
    "threshold": "l2 <= 0.1",
    "why": "outside: a",
    "measured": {"a": {"l2": 0.25, "rows": 3}, "b": [0, 1], "c": "x|y"},
}


def test_a_claim_has_all_its_parts():
    text = section(CLAIM)
    for part in (
        "**Refuted.** It agrees.",
        "Tested: By",
        "Threshold: l2 <= 0.1",
        "Why: outside: a",
    ):
        assert part in text
    assert "| a | l2 0.25, rows 3 |" in text
    assert "| b | 0, 1 |" in text
    assert "| c | x\\|y |" in text


def test_what_is_empty_is_left_out():
    text = section({**CLAIM, "threshold": "", "why": "", "measured": {}})
    assert text.count("\n\n") == 2


def test_long_measurements_point_to_the_json():
    text = section({**CLAIM, "measured": {f"row {i}": i for i in range(MOST_ROWS + 2)}})
    assert text.endswith("2 further figures are in the JSON.")


def test_values_for_people():
    values = (True, False, None, 12_345, 0.000123456, [], "a\nb")
    assert [shown(value) for value in values] == [
        "yes", "no", "none", "12,345", "0.0001235", "none", "a b",
    ]  # fmt: skip
    assert list(rows_of({"traceback": "a\nb"})) == []


def test_the_overview_counts_verdicts():
    document = {
        "subject": {"backend": "b", "resolution": "r", "engine": {"plans": []}},
        "environment": {"torch": "2"},
        "verdicts": {"refuted": 1},
        "claims": [CLAIM],
    }
    text = page(document)
    assert "1 claims: 1 refuted." in text
    assert "| [It agrees.](#step) | refuted |" in text
    assert "plans" not in text
