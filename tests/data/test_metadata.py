"""Which samples a filter keeps, and what it says to a table that is none."""

import pytest

from kolors_fast.data.metadata import Filter


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"quality": 4, "language": "zh"}, None),
        ({"quality": 5.0, "language": "en", "more": 1}, None),
        ({"quality": 3, "language": "zh"}, "quality below 4"),
        ({"quality": 6, "language": "zh"}, "quality above 5"),
        ({"quality": float("nan"), "language": "zh"}, "quality below 4"),
        ({"quality": 4, "language": "fr"}, "language not in the list"),
        ({"language": "zh"}, "quality missing"),
        ({"quality": None, "language": "zh"}, "quality missing"),
        ({"quality": "high", "language": "zh"}, "quality no number"),
        ({"quality": True, "language": "zh"}, "quality no number"),
    ],
)
def test_refusals(metadata, reason):
    rules = Filter({"quality": {"min": 4, "max": 5}, "language": {"in": ["zh", "en"]}})
    assert rules.refusal(metadata) == reason


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"quality": {"least": 4}}, "filter: quality: expected min, max or in, got 'least'"),
        ({"quality": {"min": "4"}}, "filter: quality: min: expected a number, got '4'"),
        ({"quality": {"max": True}}, "filter: quality: max: expected a number, got True"),
        ({"language": {"in": "zh"}}, "filter: language: in: expected a list, got 'zh'"),
        ({"quality": 4}, r"filter: quality: expected a table such as \{min = 4\}, got 4"),
        ({"quality": {}}, "filter: quality: expected a table"),
    ],
)
def test_wrong_tables_get_one_sentence(table, message):
    with pytest.raises(ValueError, match=message):
        Filter(table)


def test_files(tmp_path):
    toml, json = tmp_path / "f.toml", tmp_path / "f.json"
    toml.write_text('quality = {min = 4}\nlanguage = {in = ["zh"]}\n')
    json.write_text('{"quality": {"min": 4}, "language": {"in": ["zh"]}}')
    assert Filter.load(toml).table == Filter.load(json).table == {"quality": {"min": 4}, "language": {"in": ["zh"]}}
    json.write_text("quality = 4")
    with pytest.raises(ValueError, match=r"filter .*f.json: expected TOML, or JSON in a .json file"):
        Filter.load(json)
    json.write_text("[1]")
    with pytest.raises(ValueError, match=r"filter .*f.json: expected a table of fields, got a list"):
        Filter.load(json)


def test_the_pictures_own_fields_are_apart():
    of_metadata, of_pictures = Filter({"quality": {"min": 4}, "width": {"min": 512}}).split()
    assert (of_metadata.table, of_pictures.table) == ({"quality": {"min": 4}}, {"width": {"min": 512}})
