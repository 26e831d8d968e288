"""Training: one loop, an objective per stage, recipes in TOML, a session per system."""

from .config import Recipe, RecipeError, load_recipe
from .run import export, run
from .trainer import Trainer

__all__ = ["Recipe", "RecipeError", "Trainer", "export", "load_recipe", "run"]
