# SPDX-License-Identifier: Apache-2.0
"""A page on this machine where a person tries a model and looks inside it, made with Gradio."""

from __future__ import annotations

import html
import os
import signal
import socket
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..errors import MissingPackage, UserError
from ..export.images import photographs
from ..preprocess import read_image
from . import attention, offsets, spectrum
from .drawing import draw_attention, draw_cam, draw_offsets, draw_spectrum
from .subjects import Subject, View

if TYPE_CHECKING:
    from matplotlib.figure import Figure

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import
try:
    import gradio as gr
    from gradio.utils import get_upload_folder
except ImportError as error:
    raise MissingPackage(f"{error}; the page needs Gradio: pip install 'litv2[demo]'") from error

__all__ = ["PICTURES", "Page", "serve"]

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")  # those that browsers show; for some others Pillow starts programs
PIXELS = 50_000_000  # of an image at most: decoded it takes three bytes for each
SHOWN_CLASSES, LEAST_SCORE = 5, 0.3  # how many classes are listed; boxes with a lower score are not drawn
AT_POSITION = ("attention", "offsets")
PICTURES = (*AT_POSITION, "spectrum", "class activation")

FONT = ["system-ui", "sans-serif"]  # of the visitor's system: none is fetched
STYLE = """
div.matplotlib.layout {overflow-x: auto; align-items: safe center}
div.matplotlib.layout img {min-width: 44rem}
"""  # a phone scrolls pictures: smaller, nobody could read them

File = dict[str, Any]  # of an upload, as Gradio describes it: "path" and others
Position = tuple[int, int] | None  # column and row of a pixel of the image


class Page:
    """What the page shows, as functions of an uploaded file and the position that was clicked. It keeps nothing between calls.

    One thread at a time may use it: what watches the model would see the images of others, too.
    """

    def __init__(self, subject: Subject):
        self.subject = subject

    def view(self, path: str) -> View:
        """The image as the model sees it, turned upright as the browser shows it.

        Raises:
            UserError: it is too large, damaged or of another format than ``FORMATS``.
        """
        name = Path(path).name
        try:
            with Image.open(path, formats=FORMATS) as image:  # reads no further than the size
                width, height = image.size
        except Image.DecompressionBombError as error:
            raise UserError(f"the file {name} has too many pixels: the page takes up to {PIXELS // 10**6} million") from error
        except Exception as error:  # decoders raise all kinds of exceptions
            raise UserError(f"the file {name} is damaged, or of another format than {', '.join(FORMATS)}") from error
        if width * height > PIXELS:
            raise UserError(f"the file {name} has {width} x {height} pixels: the page takes up to {PIXELS // 10**6} million")
        try:
            return self.subject.view(read_image(Path(path), upright=True))
        except UserError as error:
            raise UserError(f"the file {str(error).replace(path, name)}") from error

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
        return f"{len(found)} {'object' if len(found) == 1 else 'objects'}, {took}", (view.picture, list(zip(shapes, labels)))

    def picture(self, what: str, view: View, at: Position = None) -> Figure:
        """One of ``PICTURES``; those of ``AT_POSITION`` are of the strongest response, or of a position.

        Raises:
            UserError: the model does not see the position, finds nothing, or has no attention; or grad-cam is not installed.
        """
        place = None if at is None else view.to_tensor(at[0] + 0.5, at[1] + 0.5)
        model, images = self.subject.model, view.tensor
        if what == "attention":
            return draw_attention(view, attention(model, images, place))
        if what == "offsets":
            return draw_offsets(view, offsets(model, images, place))
        if what == "spectrum":
            return draw_spectrum(spectrum(model, images))
        from .activation import cams_of_finding  # which needs grad-cam

        return draw_cam(view, *cams_of_finding(self.subject, view))


def build(page: Page, title: str) -> gr.Blocks:
    """Wires the page: an upload is predicted, then explained, picture by picture; a click moves the position."""
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(f"## {title}\nDrop an image, then click on it to move the position whose attention and samples are shown.")
        with gr.Row():
            with gr.Column():
                image = gr.Image(label="your image", sources=["upload", "clipboard"], height=360, buttons=[], elem_id="image")
                if folder := photographs():
                    gr.Examples([str(path) for path in sorted(folder.glob("*.jpg"))], image, label="or one of these", elem_id="examples")
            with gr.Column():
                message = gr.HTML(padding=False, elem_id="message")
                found: gr.Label | gr.AnnotatedImage
                if page.subject.task == "classification":
                    found = gr.Label(label="classes", num_top_classes=SHOWN_CLASSES, elem_id="found")
                else:
                    found = gr.AnnotatedImage(label="found", height=360, elem_id="found")
        pictures, remarks = {}, {}
        for what in PICTURES:
            with gr.Tab(what):
                remarks[what] = gr.HTML(padding=False, visible=False)
                pictures[what] = gr.Plot(show_label=False, elem_id=what.replace(" ", "-"))
        position = gr.State()  # of the visitor, a Position

        def predict(file: File | None) -> dict[Any, Any]:
            try:
                text, result = ("", None) if file is None else page.prediction(page.view(_uploaded(file)))
            except UserError as error:
                text, result = str(error), None
            return {message: _paragraph(text), found: result, position: None}

        def explain(what: str, file: File | None, at: Position) -> dict[Any, Any]:
            """A picture, or why there is none."""
            figure, remark = None, ""
            try:
                view = None if file is None else page.view(_uploaded(file))
            except UserError:  # the prediction has said so
                view = None
            try:
                figure = None if view is None else page.picture(what, view, at)
            except UserError as error:
                remark = str(error)
            return {pictures[what]: figure, remarks[what]: gr.HTML(_paragraph(remark), visible=bool(remark))}

        def move(file: File, click: gr.SelectData) -> dict[Any, Any]:
            x, y = click.index
            try:
                view = page.view(_uploaded(file))
                moved = {pictures[what]: page.picture(what, view, (x, y)) for what in AT_POSITION}
            except UserError as error:
                return {message: _paragraph(str(error))}
            return {message: _paragraph(f"position {x}, {y}"), position: (x, y), **moved}

        # One queue: what uses the model is computed one by one, in the order in which it was asked for; of a visitor's images and clicks
        # the last counts. Files are not read by Gradio (preprocess), which says nothing of what is wrong with a damaged one.
        how: dict[str, Any] = dict(
            concurrency_id="model", concurrency_limit=1, trigger_mode="always_last", preprocess=False, api_visibility="private"
        )
        step = image.change(predict, image, [message, found, position], **how)
        for what in PICTURES:
            step = step.then(partial(explain, what), [image, position], [pictures[what], remarks[what]], **how)
        moved = [message, position, *(pictures[what] for what in AT_POSITION)]
        image.select(move, image, moved, **how)
    return blocks


def _uploaded(file: File) -> str:
    """Returns the path of an upload or an example. Gradio checks paths only where a request marks them as such.

    Raises:
        UserError: it is another file of this machine.
    """
    path = Path(str(file.get("path"))).resolve()
    folders = [Path(get_upload_folder()), *filter(None, [photographs()])]
    if not any(path.is_relative_to(folder.resolve()) for folder in folders):
        raise UserError("this is no uploaded image")
    return str(path)


def _paragraph(text: str) -> str:
    return f'<p role="status">{html.escape(text[:1].upper() + text[1:])}</p>'


def serve(subject: Subject, title: str, host: str = "127.0.0.1", port: int | None = None, megabytes: int = 20) -> None:
    """Serves the page until it is interrupted, then ends the process. Uploads are kept in a folder, which is removed at the end.

    Args:
        port: None for the first free one from 7860.
        megabytes: of a file at most.

    Raises:
        UserError: the port is taken, or the host is not this machine's.
    """
    try:
        with socket.create_server((host, port or 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise UserError(f"--host {host} {'' if port is None else f'--port {port} '}cannot be served: {error}; choose another") from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that uploads are removed then, too
    os.environ["no_proxy"] = "*"  # Gradio asks its own server whether it has started
    with tempfile.TemporaryDirectory(prefix="litv2-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        blocks = build(Page(subject), title)
        blocks.launch(
            server_name=host,
            server_port=port,
            max_file_size=f"{megabytes}mb",
            theme=gr.themes.Base(font=FONT, font_mono=FONT),
            css=STYLE,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            run_history=False,  # a page that offers to store the images on other servers
            enable_monitoring=False,
            quiet=True,  # instead of an advertisement for share=True
            prevent_thread_lock=True,
            footer_links=[],
            app_kwargs=dict(docs_url=None, redoc_url=None, openapi_url=None),
        )
        print(f"the page is at {blocks.local_url}; Ctrl-C ends it", flush=True)
        blocks.block_thread()
    os._exit(0)  # at once: the interpreter's own end stops Gradio's threads, which aborts the process if one is within torch
