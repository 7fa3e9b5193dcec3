"""Read the text in images, by an engine in a process of its own: one that hangs or crashes is ended and counted.

An engine is a function of uint8 [height, width, 3]: a list of (text, box, confidence), with the box in pixels as
(ymin, xmin, ymax, xmax). `tesseract` (Debian's language packages) and `rapidocr` (PP-OCR, Chinese and English)
are built in; `module:Class` names another, which is made without arguments.
"""

import contextlib
import multiprocessing
import os
import signal
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigurationError
from data.corpus.config import OcrConfig
from data.corpus.steps.language import identify
from data.corpus.steps.rules import load
from data.skip import Skip

Text = tuple[str, tuple[float, float, float, float], float]
Engine = Callable[[NDArray[np.uint8]], list[Text]]
TESSDATA = ("TESSDATA_PREFIX", "/usr/share/tesseract-ocr/5/tessdata", "/usr/share/tesseract-ocr/4.00/tessdata")
START_S = 300.0  # seconds for loading an engine's models
HANGS, CRASHES = "OCR engine hung", "OCR engine crashed"


def engine(config: OcrConfig) -> Engine:
    """Return the engine of the settings, loaded. Raises ConfigurationError."""
    if config.engine == "tesseract":
        return _tesseract(config.languages)
    if config.engine == "rapidocr":
        return _rapidocr()
    made: Engine = load("ocr.engine", config.engine)()
    return made


class BoundedEngine:
    """Run an engine in a child process, for at most `timeout_s` seconds an image.

    As a context, it ends the process. The child is started by `spawn`: a fork of an MPI rank is not safe.
    """

    def __init__(self, config: OcrConfig) -> None:
        self.config = config
        self._process: Any = None
        self._pipe: Connection | None = None

    def __enter__(self) -> "BoundedEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def __call__(self, pixels: NDArray[np.uint8]) -> list[Text]:
        """Return the texts of an image; raise Skip where the engine hung or crashed on it, or could not read it."""
        if self._pipe is None:
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send(pixels)
            if not self._pipe.poll(self.config.timeout_s):
                self._end()
                raise Skip(HANGS, defect=True)
            found, error = self._pipe.recv()
        except (EOFError, OSError) as lost:
            self._end()
            raise Skip(CRASHES, defect=True) from lost
        if error is not None:
            raise Skip(f"OCR engine raised {error}", defect=True)
        texts: list[Text] = found
        return texts

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.config), daemon=True)
        with _outside_mpi():
            self._process.start()
        theirs.close()
        if not self._pipe.poll(START_S):
            self._end()
            raise ConfigurationError(f"ocr.engine={self.config.engine} did not start in {START_S:.0f} s; try it alone.")
        try:
            mistake = self._pipe.recv()
        except EOFError:
            mistake = f"ocr.engine={self.config.engine} ended while it was loaded; try it alone."
        if mistake is not None:
            self._end()
            raise ConfigurationError(mistake)

    def _end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)  # an engine may have started programs
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None


def read_texts(
    pixels: NDArray[np.uint8], run: Engine, config: OcrConfig, engines: Sequence[str]
) -> list[dict[str, Any]]:
    """Return an image's texts as the field `ocr` of a record: text, language, box in fractions.

    The language is identified from all texts of one script together: single words are too short.
    """
    height, width = pixels.shape[:2]
    found = [
        (" ".join(text.split()), box) for text, box, confidence in run(pixels) if confidence >= config.min_confidence
    ]
    found = [(text, box) for text, box in found if text]
    scripts: dict[str, list[str]] = {}
    for text, _ in found:
        scripts.setdefault(script(text), []).append(text)
    codes = {name: identify(" ".join(texts), engines)[0] for name, texts in scripts.items()}
    sides = (height, width, height, width)
    return [
        {
            "text": text,
            "language": codes[script(text)],
            "box": [round(min(max(edge / side, 0.0), 1.0), 5) for edge, side in zip(box, sides, strict=True)],
        }
        for text, box in found
    ]


def script(text: str) -> str:
    """Return the Unicode name's first word of most letters of a text: LATIN, CYRILLIC, ARABIC, ..."""
    names = Counter(unicodedata.name(one, "").partition(" ")[0] for one in text if one.isalpha())
    return min(names, key=lambda name: (-names[name], name)) if names else ""


@contextlib.contextmanager
def _outside_mpi() -> Any:
    """Hide the launcher's variables from a child process, which would take itself for a rank."""
    names = ("PMI_", "PMIX_", "OMPI_", "MPI_", "SLURM_", "HYDRA_", "MV2_")
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(names)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _serve(pipe: Connection, config: OcrConfig) -> None:
    """Answer images with texts until the pipe is closed: the child's main function."""
    with contextlib.suppress(OSError):
        os.setsid()  # programs that the engine starts can be ended with it
    try:
        run = engine(config)
    except ConfigurationError as error:
        pipe.send(str(error))
        return
    pipe.send(None)
    while True:
        try:
            pixels = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((run(pixels), None))
        except Exception as error:  # engines raise almost anything
            pipe.send((None, type(error).__name__))


def _tesseract(names: Sequence[str]) -> Engine:
    try:
        from PIL import Image
        from tesserocr import RIL, PyTessBaseAPI, get_languages, iterate_level
    except ImportError as error:
        raise ConfigurationError(
            f"ocr.engine=tesseract needs tesserocr ({error}); pip install '.[ocr]', or choose another."
        ) from error
    places = [os.environ.get(TESSDATA[0], ""), *TESSDATA[1:]]
    folder = next((place for place in places if place and os.path.isdir(place)), "")
    there = get_languages(folder + "/")[1] if folder else []
    if missing := [name for name in names if name not in there]:
        package = missing[0].replace("_", "-")
        raise ConfigurationError(
            f"ocr.languages={','.join(names)} needs Tesseract's package of {missing[0]}; apt-get install "
            f"tesseract-ocr-{package}."
        )
    api = PyTessBaseAPI(path=folder + "/", lang="+".join(names))

    def run(pixels: NDArray[np.uint8]) -> list[Text]:
        api.SetImage(Image.fromarray(pixels))
        api.Recognize()
        found: list[Text] = []
        for word in iterate_level(api.GetIterator(), RIL.WORD):
            text, box = word.GetUTF8Text(RIL.WORD) if not word.Empty(RIL.WORD) else "", word.BoundingBox(RIL.WORD)
            if text and box:
                left, top, right, bottom = box
                found.append((text, (top, left, bottom, right), word.Confidence(RIL.WORD) / 100))
        return found

    return run


def _rapidocr() -> Engine:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ConfigurationError(
            f"ocr.engine=rapidocr needs rapidocr ({error}); pip install '.[ocr]', or choose another."
        ) from error
    read: Any = RapidOCR(params={"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": 1})

    def run(pixels: NDArray[np.uint8]) -> list[Text]:
        made = read(np.ascontiguousarray(pixels[..., ::-1]))  # it takes blue, green, red
        found: list[Text] = []
        for text, corners, score in zip(
            made.txts or (), made.boxes if made.txts else (), made.scores or (), strict=True
        ):
            (left, top), (right, bottom) = corners.min(0).tolist(), corners.max(0).tolist()
            found.append((text, (top, left, bottom, right), float(score)))
        return found

    return run
