"""Requests to batches, and batches to pictures."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from .requests import Request

if TYPE_CHECKING:
    from ..kolors import KolorsPipeline

LOOK_AHEAD = 4  # batches' worth of requests wait for others like them
# after it nothing runs on the device any more
_DEVICE_LOST: Any = getattr(torch, "AcceleratorError", ())


def grouped(requests: Iterable[Request], size: int) -> Iterator[list[Request]]:
    """Batches of up to `size` requests that one call can draw, the full ones first and then the oldest.

    One call draws one picture size and number of steps. Guidance of any scale goes together, but not with none, which
    takes half of the work; nor a negative prompt with none, which may stand for zeros.
    """
    waiting: dict[Any, list[Request]] = {}  # the batch of the oldest request is first
    for request in requests:
        key = (
            request.height,
            request.width,
            request.steps,
            request.guidance_scale > 1,
            request.negative_prompt is None,
        )
        waiting.setdefault(key, []).append(request)
        if len(waiting[key]) == size:
            yield waiting.pop(key)
        elif sum(map(len, waiting.values())) >= LOOK_AHEAD * size:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()


class Painter:
    """Draws batches, in parts where a whole one fails.

    Args:
        say: told once for every picture size and number that the memory does not hold.
    """

    def __init__(self, pipeline: KolorsPipeline, say: Callable[[str], None]) -> None:
        self._pipeline: Any = pipeline
        self._say = say
        self._most: dict[tuple[int, int], int] = {}  # pictures at once, by size

    def draw(self, batch: list[Request]) -> Iterator[tuple[Request, Image.Image | str]]:
        """Each request with its picture or with the reason why there is none, part by part."""
        size = batch[0].height, batch[0].width
        parts = deque([batch])
        while parts:
            part = parts.popleft()
            most = self._most.get(size, len(part))
            if len(part) > most:
                parts.extendleft(reversed([part[i : i + most] for i in range(0, len(part), most)]))
                continue
            images, reason, full = self._try(part)
            if images is not None:
                yield from zip(part, images, strict=True)
            elif len(part) == 1:
                yield part[0], reason
            else:
                half = len(part) // 2
                if full:
                    self._most[size] = half
                    self._say(
                        f"warning: out of memory with {len(part)} pictures of {size[0]}x{size[1]} at once; "
                        f"going on with {half}"
                    )
                parts.extendleft([part[half:], part[:half]])

    def _try(self, part: list[Request]) -> tuple[list[Image.Image] | None, str, bool]:
        """The pictures, or why not, and whether for want of memory. What the failed call held is free on return."""
        full = False
        try:
            return self._call(part), "", full
        except _DEVICE_LOST:
            raise
        except torch.OutOfMemoryError as error:
            reason, full = _first_line(error), True
        except (ValueError, RuntimeError) as error:
            reason = _first_line(error)
        if full and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None, reason, full

    def _call(self, part: list[Request]) -> list[Image.Image]:
        first = part[0]
        negatives = [request.negative_prompt for request in part if request.negative_prompt is not None]
        images: list[Image.Image] = self._pipeline(
            [request.prompt for request in part],
            height=first.height,
            width=first.width,
            num_inference_steps=first.steps,
            guidance_scale=[request.guidance_scale for request in part],
            negative_prompt=negatives or None,
            # of the CPU, so that a seed is a picture on every device
            generator=[torch.Generator("cpu").manual_seed(request.seed) for request in part],
            **self._pipeline.typed,
        ).images
        return images


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), repr(error))
