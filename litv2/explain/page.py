"""A page on this machine where a person tries a model and looks inside it, made with Gradio."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import MissingPackage, UserError
from ..preprocess import read_image
from . import attention, offsets, spectrum
from .drawing import draw_attention, draw_cam, draw_offsets, draw_spectrum
from .subjects import Subject, View

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import
try:
    import gradio as gr
except ImportError as error:
    raise MissingPackage(f"{error}; the page needs Gradio: pip install 'litv2[demo]'") from error

__all__ = ["Page", "serve"]

PIXELS = 50_000_000  # of an image at most: decoded it takes three bytes for each
SHOWN_CLASSES, LEAST_SCORE = 5, 0.3  # how many classes are listed; boxes with a lower score are not drawn

Position = tuple[int, int] | None  # x and y in pixels of the image


class Page:
    """What the page shows, as functions of an uploaded file and the position that was clicked. It keeps nothing between calls."""

    def __init__(self, subject: Subject):
        self.subject = subject

    def view(self, path: str) -> View:
        """The image as the model sees it, turned upright as the browser shows it.

        Raises:
            UserError: it is too large, damaged or no image.
        """
        name = Path(path).name
        try:
            with Image.open(path) as image:
                width, height = image.size
        except Image.DecompressionBombError as error:
            raise UserError(f"{name} is too large: the page takes up to {PIXELS // 10**6} million pixels") from error
        except Exception:  # a damaged file: reading it says why
            width = height = 0
        if width * height > PIXELS:
            raise UserError(f"{name} has {width} x {height} pixels: the page takes up to {PIXELS // 10**6} million")
        try:
            return self.subject.view(read_image(Path(path), upright=True))
        except UserError as error:
            raise UserError(str(error).replace(path, name)) from error

    def prediction(self, view: View) -> tuple[str, Any]:
        """How long it took, and what the model finds, for ``gr.Label`` or ``gr.AnnotatedImage``."""
        start = time.perf_counter()
        found = self.subject.predict(view)
        took = f"{1e3 * (time.perf_counter() - start):.0f} ms for this image on {view.tensor.device.type}"
        names = self.subject.names
        if self.subject.task == "classification":
            return took, {name: value.item() for name, value in zip(names, found)}
        if self.subject.task == "segmentation":
            return took, (view.picture, [((found == i).numpy(), names[i]) for i in found.unique().tolist()])
        found = found[found.scores >= LEAST_SCORE]
        labels = [f"{names[label]} {score:.0%}" for label, score in zip(found.labels.tolist(), found.scores.tolist())]
        shapes = found.masks.numpy() if "masks" in found else [tuple(box) for box in found.bboxes.round().int().tolist()]
        return f"{len(found)} objects, {took}", (view.picture, list(zip(shapes, labels)))

    def at_position(self, view: View, at: Position) -> list[Any]:
        """Pictures of attention and offsets: at a position, or at the strongest response.

        Raises:
            UserError: the model does not see the position.
        """
        place = None if at is None else view.to_tensor(at[0] + 0.5, at[1] + 0.5)
        images, model = view.tensor, self.subject.model
        return [draw_attention(view, attention(model, images, place)), draw_offsets(view, offsets(model, images, place))]

    def class_activation(self, view: View) -> Any:
        """A picture.

        Raises:
            UserError: the model finds nothing, or grad-cam is not installed.
        """
        from .activation import cams_of_finding

        return draw_cam(view, *cams_of_finding(self.subject, view))


def build(page: Page, title: str) -> gr.Blocks:
    """Wires the page: an upload is predicted, then explained; a click moves the position."""
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(f"## {title}\nDrop an image, then click on it to move the position whose attention and samples are shown.")
        with gr.Row():
            image = gr.Image(label="your image", sources=["upload", "clipboard"], height=360, buttons=[], elem_id="image")
            # The file as it is: Gradio's own reading says nothing of what is wrong with a damaged one.
            image.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
            with gr.Column():
                message = gr.Markdown(elem_id="message")
                found: gr.Label | gr.AnnotatedImage
                if page.subject.task == "classification":
                    found = gr.Label(label="classes", num_top_classes=SHOWN_CLASSES, elem_id="found")
                else:
                    found = gr.AnnotatedImage(label="found", height=360, elem_id="found")
        plots = []
        for name in ("attention", "offsets", "spectrum", "class activation"):
            with gr.Tab(name):
                plots.append(gr.Plot(show_label=False, elem_id=name.replace(" ", "-")))

        def predict(path: str | None) -> list[Any]:
            return ["", None] if path is None else _or_message(1, lambda: list(page.prediction(page.view(path))))

        def explain(path: str | None) -> list[Any]:
            try:
                view = None if path is None else page.view(path)
            except UserError:  # the prediction has said so
                view = None
            if path is None or view is None:
                return [gr.skip(), *[None] * 4]
            first = [gr.skip(), *page.at_position(view, None), draw_spectrum(spectrum(page.subject.model, view.tensor))]
            try:
                return [*first, page.class_activation(view)]
            except UserError as error:
                return [f"No class activation: {error}.", *first[1:], None]

        def move(path: str, click: gr.SelectData) -> list[Any]:
            x, y = click.index
            return _or_message(2, lambda: [f"Position {x}, {y}", *page.at_position(page.view(path), (x, y))])

        predicted = image.change(predict, image, [message, found], api_visibility="private")
        predicted.then(explain, image, [message, *plots], api_visibility="private")
        image.select(move, image, [message, *plots[:2]], api_visibility="private")
    return blocks


def _or_message(others: int, show: Callable[[], list[Any]]) -> list[Any]:
    """What ``show`` returns, or the message of a user's error, with everything else left as it is."""
    try:
        return show()
    except UserError as error:
        return [f"**{str(error)[0].upper()}{str(error)[1:]}.**", *[gr.skip()] * others]


def serve(subject: Subject, title: str, host: str = "127.0.0.1", port: int | None = None, megabytes: int = 20) -> None:
    """Serves the page until it is interrupted. Uploads are kept in a folder of their own, which is removed at the end.

    Args:
        port: None for the first free one from 7860.
        megabytes: of a file at most.

    Raises:
        OSError: the port is taken, or the host is not this machine's.
    """
    with tempfile.TemporaryDirectory(prefix="litv2-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        blocks = build(Page(subject), title).queue(default_concurrency_limit=1)
        blocks.launch(
            server_name=host,
            server_port=port,
            max_file_size=f"{megabytes}mb",
            theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # of the visitor's system: none is fetched
            share=False,
            ssr_mode=False,
            quiet=True,  # instead of an advertisement for share=True
            prevent_thread_lock=True,
            footer_links=[],
            app_kwargs=dict(docs_url=None, redoc_url=None, openapi_url=None),
        )
        print(f"the page is at {blocks.local_url}; Ctrl-C ends it", flush=True)
        blocks.block_thread()
