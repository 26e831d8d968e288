"""Recipes: strict TOML."""

import copy

import pytest

from kolors_fast.training.config import RECIPES, EpsilonStage, RecipeError, load_recipe, parse_recipe, tomllib

BUNDLED = sorted(path.stem for path in RECIPES.glob("*.toml"))


@pytest.fixture
def table():
    return tomllib.loads((RECIPES / "kolors-tiny.toml").read_text())


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_recipes_load(name):
    recipe = load_recipe(name)
    assert recipe.name == name


def test_kolors_phases(table):
    stages = parse_recipe(table, "recipe").stages
    assert [s.objective for s in stages] == ["autoencoder", "language_model"] + 4 * ["epsilon"]
    first, *later = stages[2:]
    assert isinstance(first, EpsilonStage) and (first.train_steps, first.beta_end) == (1000, 0.012)
    assert first.shortest == first.longest
    for stage in later:  # the second phase: buckets
        assert isinstance(stage, EpsilonStage) and (stage.train_steps, stage.beta_end) == (1100, 0.014)
        assert stage.shortest < stage.longest
        assert first.area < stage.area


def test_unknown_keys_are_errors(table):
    for change in (
        lambda t: t.update(sead=1),
        lambda t: t["tokenizer"].update(vocabulary=1),
        lambda t: t["stage"][0].update(epochs=3),
        lambda t: t["stage"][0].update(caption_dropout=0.1),  # another objective's key
    ):
        broken = copy.deepcopy(table)
        change(broken)
        with pytest.raises(RecipeError, match=r"unknown key '\w+'"):
            parse_recipe(broken, "recipe")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", "many", "steps: expected int, got 'many'"),
        ("steps", True, "steps: expected int, got True"),
        ("steps", 0, "steps: expected 1 or more, got 0"),
        ("warmup", 10**9, r"warmup \+ decay: expected at most steps"),
        ("learning_rate", "fast", "learning_rate: expected float"),
        ("precision", "fp8", "precision: expected one of fp32, bf16.*, got 'fp8'"),
        ("ema", 1.0, "ema: expected 0 <= ema < 1"),
        ("sizes", [[128, "wide"]], "sizes: expected int, got 'wide'"),
        ("sizes", [[128, 128, 3]], r"sizes: expected tuple.*, got \[128, 128, 3\]"),
        ("objective", "gan", "objective: expected one of"),
    ],
)
def test_wrong_values(table, key, value, message):
    table["stage"][0][key] = value
    with pytest.raises(RecipeError, match=message):
        parse_recipe(table, "recipe")


@pytest.mark.parametrize("key", ["timestep_power", "timestep_falloff"])
def test_wrong_timestep_distribution(table, key):
    table["stage"][2][key] = 0
    with pytest.raises(RecipeError, match=f"{key}: expected more than 0, got 0"):
        parse_recipe(table, "recipe")


@pytest.mark.parametrize("system", ["dalle", 3])
def test_unknown_systems(table, system):
    with pytest.raises(RecipeError, match=f"recipe: system: expected one of .*'kolors'.*, got {system!r}"):
        parse_recipe({"system": system, **table}, "recipe")


@pytest.mark.parametrize(
    ("stage", "key", "value", "message"),
    [
        ("flow", "density", "normal(0, 1)", r"stage 'flow': density: expected .*, got 'normal\(0, 1\)'"),
        ("flow", "shift", 0, r"stage 'flow': shift: expected more than 0, got 0"),
        ("flow", "encoder_dropout", 1.0, "encoder_dropout: expected 0 <= encoder_dropout < 1, got 1.0"),
        ("flow", "caption_dropout", -0.1, "caption_dropout: expected 0 <= caption_dropout < 1, got -0.1"),
        ("flow", "snr_gamma", 5.0, "unknown key 'snr_gamma'"),
        ("t5", "masked", 0, "masked: expected 0 < masked < 1, got 0"),
        (
            "t5",
            "objective",
            "language_model",
            r"objective: expected one of \['clip', 'epsilon_linear', 'rectified_flow'",
        ),
    ],
)
def test_wrong_values_of_sd3(stage, key, value, message):
    table = tomllib.loads((RECIPES / "sd3-tiny.toml").read_text())
    next(one for one in table["stage"] if one["name"] == stage)[key] = value
    with pytest.raises(RecipeError, match=message):
        parse_recipe(table, "recipe")


def test_missing_parts(table):
    with pytest.raises(RecipeError, match="missing key 'seed'"):
        parse_recipe({k: v for k, v in table.items() if k != "seed"}, "recipe")
    with pytest.raises(RecipeError, match=r"expected at least one \[\[stage\]\]"):
        parse_recipe({**table, "stage": []}, "recipe")
    with pytest.raises(RecipeError, match="stage names: expected each once"):
        parse_recipe({**table, "stage": [table["stage"][0]] * 2}, "recipe")


def test_unreadable_files(tmp_path):
    with pytest.raises(RecipeError, match=r"no such file, and the bundled recipes are: .*kolors-tiny"):
        load_recipe("kolors-enormous")
    (tmp_path / "broken.toml").write_text("steps = = 3")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(tmp_path / "broken.toml")
