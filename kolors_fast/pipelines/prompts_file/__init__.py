"""Drawing the pictures of a file of prompts: what `kolors-fast generate --prompts-file` does."""

from .draw import draw_prompts_file
from .requests import Defaults
from .worker import Worker

__all__ = ["Defaults", "Worker", "draw_prompts_file"]
