"""A pipeline of the kind that a folder holds."""

from __future__ import annotations

import os
from typing import Any

from ..models.checkpoint import CheckpointError
from .folder import load_index
from .kolors import KolorsPipeline
from .pipeline import Pipeline
from .pixart import PixArtPipeline, PixArtSigmaPipeline
from .sd3 import SD3Pipeline

PIPELINES: tuple[type[Pipeline], ...] = (KolorsPipeline, SD3Pipeline, PixArtPipeline, PixArtSigmaPipeline)


def pipeline_class(path_or_id: str | os.PathLike[str]) -> type[Pipeline]:
    """The class of the pipeline in a folder in diffusers' layout, a Hub repository or a bundled model.

    Raises:
        CheckpointError (an OSError): there is none, or of a system that is not here.
    """
    index, file = load_index(path_or_id)
    known = {kind.index_name: kind for kind in PIPELINES}
    named = index.get("_class_name")
    if named not in known:
        raise CheckpointError(f"{file}: _class_name: expected one of {', '.join(known)}, got {named}")
    return known[named]


def load_pipeline(path_or_id: str | os.PathLike[str], **options: Any) -> Pipeline:
    """`from_pretrained` of that class; the options are its own."""
    return pipeline_class(path_or_id).from_pretrained(path_or_id, **options)
