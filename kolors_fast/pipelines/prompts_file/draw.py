"""From a prompts file to a folder of pictures, each written when its batch is done; a rerun continues."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import expect
from .batches import Painter, grouped
from .files import difference, save
from .requests import Defaults, Refusal, Request, read_requests
from .worker import Worker

if TYPE_CHECKING:
    from PIL import Image

    from ..kolors import KolorsPipeline


def draw_prompts_file(
    file: str,
    folder: Path,
    load: Callable[[], KolorsPipeline],
    defaults: Callable[[KolorsPipeline], Defaults],
    *,
    batch: int,
    overwrite: bool,
    settings: Callable[[KolorsPipeline], dict[str, Any]],
    worker: Worker,
) -> int:
    """Draw what the lines of a file ask for, print the name of every new picture, and tell of every line that fails.

    A picture that is there is kept if its parameters are those asked for, refused if not.

    Args:
        file: text, or JSON Lines where its name ends in .jsonl, see `read_requests`; "-" is text from stdin.
        folder: made if missing.
        load: makes the pipeline, once the file and the folder are known to be there.
        defaults: of lines that do not say.
        batch: pictures at once.
        overwrite: draw again, where a picture with other parameters is there.
        settings: of the pipeline, such as the model's name: recorded in every picture beside its own parameters.
        worker: whose share of the pictures to draw.

    Returns:
        The number of pictures that could not be drawn.

    Raises:
        ValueError, OSError: something that no line is to blame for; what is drawn stays.
        KeyboardInterrupt: with what is done as its text; also on SIGTERM.
    """
    expect(batch >= 1, "--batch", "at least 1", batch)
    expect(file != "-" or worker.count == 1, "--prompts-file", "a file, for several workers would share stdin", "'-'")
    expect(file == "-" or (Path(file).exists() and not Path(file).is_dir()), "--prompts-file", "a file", repr(file))
    possible = folder.is_dir() or (folder.parent.is_dir() and not folder.exists())
    expect(possible, "--output", "a folder, or a new one in an existing one", repr(str(folder)))
    with nullcontext(sys.stdin.buffer) if file == "-" else open(file, "rb") as lines, _terminated_like_interrupted():
        folder.mkdir(exist_ok=True)
        pipeline = load()
        pipeline.set_progress_bar_config(disable=True)  # the names are the progress
        session = _Session("stdin" if file == "-" else file, settings(pipeline), overwrite)
        as_json = Path(file).suffix == ".jsonl"
        requests = read_requests(lines, folder, defaults(pipeline), pipeline.vae_scale_factor, as_json=as_json)
        session.run(grouped(session.missing(worker.share(requests)), batch), Painter(pipeline, session.say))
    worker.finish(failed=session.failed > 0)
    return session.failed


class _Session:
    """Counts and tells."""

    def __init__(self, source: str, settings: dict[str, Any], overwrite: bool) -> None:
        self.source = source
        self.settings = settings
        self.overwrite = overwrite
        self.drawn = self.kept = self.failed = 0

    def say(self, text: str) -> None:
        print(f"kolors-fast: {text}", file=sys.stderr, flush=True)

    def fail(self, line: int, reason: str) -> None:
        self.failed += 1
        self.say(f"{self.source}:{line}: {reason}")

    def parameters(self, request: Request) -> dict[str, Any]:
        return request.parameters | self.settings

    def missing(self, items: Iterable[Request | Refusal]) -> Iterator[Request]:
        """The requests whose pictures are yet to be drawn."""
        for item in items:
            if isinstance(item, Refusal):
                self.fail(item.line, item.reason)
                continue
            other = None
            if item.path.exists():
                other = difference(item.path, self.parameters(item))
                if other is None:
                    self.kept += 1
                    continue
            if other is None or self.overwrite:
                yield item
            else:
                self.fail(item.line, f"{item.path} {other}; --overwrite draws it again")

    def done(self, request: Request, picture: Image.Image | str) -> None:
        """A picture, or the reason why there is none."""
        if isinstance(picture, str):
            self.fail(request.line, picture)
            return
        try:
            save(picture, request.path, self.parameters(request))
        except ValueError as error:
            self.fail(request.line, str(error))
            return
        self.drawn += 1
        print(request.path, flush=True)

    def run(self, batches: Iterator[list[Request]], painter: Painter) -> None:
        try:
            for batch in batches:
                for request, picture in painter.draw(batch):
                    self.done(request, picture)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._so_far()) from None
        except OSError as error:
            raise OSError(f"{error}; {self._so_far()}") from error
        total = self.drawn + self.kept + self.failed
        self.say(f"{self.drawn} drawn, {self.kept} there before, {self.failed} of {total} failed")

    def _so_far(self) -> str:
        before = f" and {self.kept} were there before" if self.kept else ""
        return f"{self.drawn} drawn{before}; the same command continues"


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, by which torchrun and batch systems end a job, leaves nothing half-written either."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
