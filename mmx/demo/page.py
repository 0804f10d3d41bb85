"""The page: an image on the left, tabs with actions on the right.

Every action is an endpoint of the API (/caption, /ask, /rank, /look, /word, /encoders); events that only update
components are private. The model handles one event at a time, in the order of the queue. Gradio does not preprocess
inputs (`preprocess=False`): it would open images before `load_image` checks them. `events` accepts uploads only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import gradio as gr
from gradio.components import Component

from mmx.demo import events
from mmx.demo.actions import MAX_BEAMS, MAX_CAPTIONS, MAX_NEW_TOKENS, Session
from mmx.demo.events import Events, RegionUpdate, report_errors, report_stream_errors
from mmx.demo.region import WHOLE_IMAGE, Point
from mmx.inference.pipeline import Pipeline
from mmx.interpret.look import MapMethod

# Keyword arguments of events: with the model; private without the model; private with the model.
_MODEL: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "preprocess": False}
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "preprocess": False, "show_progress": "hidden"}
_PRIVATE_MODEL: dict[str, Any] = {**_MODEL, **_PRIVATE}

_HEADER = """# mmx
Caption an image, ask questions about it, and see what each word attends to."""
_WORDS_LABEL = "Words (select one to see its attention map)"


class CaptionTab(NamedTuple):
    """Inputs and outputs of captioning, and the components that show the words of a complete caption."""

    inputs: list[Component]
    outputs: list[Component]
    words: list[Component]


class AskTab(NamedTuple):
    """The image with the region, and the conversation."""

    region: gr.Image
    chat: gr.Chatbot


def build_page(pipeline: Pipeline, examples: Sequence[Path] = ()) -> gr.Blocks:
    """Return the page of a model, not yet served. examples: images to select, which gradio copies into its cache."""
    model_events = Events(pipeline)
    with gr.Blocks(title="mmx", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        session = gr.State(None)
        gr.Markdown(_HEADER, elem_id="header")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = _image(examples)
                note = gr.Markdown("", elem_id="note", elem_classes="note")
            with gr.Column(scale=3, min_width=320):
                with gr.Tab("Caption"):
                    caption = _caption_tab(model_events, image, session)
                with gr.Tab("Ask"):
                    ask = _ask_tab(model_events, image, session)
                with gr.Tab("Attention maps") as maps_tab:
                    _maps_tab(model_events, maps_tab, image, session)
                with gr.Tab("Encoders") as encoders_tab:
                    _encoders_tab(encoders_tab)
        opened = [session, note, ask.region, ask.chat]
        upload = image.change(report_errors(model_events.open), [image, session], opened, **_PRIVATE_MODEL)
        captioned = upload.success(
            report_stream_errors(model_events.caption_upload), caption.inputs, caption.outputs, **_PRIVATE_MODEL
        )
        captioned.success(
            report_errors(model_events.show_caption_words), [session], [session, *caption.words], **_PRIVATE_MODEL
        )
        upload.failure(events.clear_page, None, [*opened, caption.outputs[0], *caption.words], **_PRIVATE)
    page.queue(max_size=32, default_concurrency_limit=1)
    return page


def _image(examples: Sequence[Path]) -> gr.Image:
    image = gr.Image(
        label="Image",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=360,
        buttons=[],
        elem_id="image",
        alt_text="the uploaded image",
    )
    if examples:
        gr.Examples(
            [[str(path)] for path in examples],
            [image],
            label="Examples",
            api_visibility="private",
            cache_examples=False,
            elem_id="examples",
        )
    return image


# ---- caption ---------------------------------------------------------------------------------------------------


def _caption_tab(model_events: Events, image: gr.Image, session: gr.State) -> CaptionTab:
    text = gr.Textbox(label="Caption", lines=2, interactive=False, elem_id="caption")
    all_captions = gr.Textbox(label="All captions, best first", interactive=False, visible=False, elem_id="captions")
    button = gr.Button("Caption", variant="primary", elem_id="caption-button")
    with gr.Accordion("Decoding options", open=False):
        options = _decoding_options(model_events.pipeline.generation.max_new_tokens)
    words = gr.Radio([], label=_WORDS_LABEL, elem_id="caption-words")
    heatmap = _heatmap("caption-heatmap")
    sentence = gr.Markdown("", elem_id="caption-gain", elem_classes="note")
    tab = CaptionTab(
        inputs=[image, *options, session],
        outputs=[text, all_captions, session],
        words=[all_captions, words, heatmap, sentence],
    )
    captioned = button.click(
        report_stream_errors(model_events.caption), tab.inputs, tab.outputs, api_name="caption", **_MODEL
    )
    captioned.success(
        report_errors(model_events.show_caption_words), [session], [session, *tab.words], **_PRIVATE_MODEL
    )
    words.input(
        report_errors(model_events.caption_word),
        [image, words, session],
        [heatmap, sentence, session],
        **_PRIVATE_MODEL,
    )
    return tab


def _decoding_options(max_new_tokens: int) -> list[Component]:
    """In the order of the arguments of `Events.caption`."""
    return [
        gr.Slider(1, MAX_BEAMS, 1, step=1, label="Beams", info="1: shown token by token; more: beam search"),
        gr.Slider(1, MAX_CAPTIONS, 1, step=1, label="Captions", info="more than 1: samples, or the best beams"),
        gr.Slider(0, 2, 1, step=0.1, label="Temperature", info="of samples; higher is more varied"),
        gr.Slider(0, 5, 1, step=0.1, label="Guidance scale", info="1: off; higher follows the image more closely"),
        gr.Slider(
            1, MAX_NEW_TOKENS, min(max_new_tokens, MAX_NEW_TOKENS), step=1, label="Maximum length", info="in tokens"
        ),
    ]


def _heatmap(elem_id: str) -> gr.Image:
    return gr.Image(
        label="Attention map",
        interactive=False,
        buttons=["fullscreen"],
        elem_id=elem_id,
        height=340,
        alt_text="the image with the attention map of the selected word",
    )


# ---- ask -------------------------------------------------------------------------------------------------------


def _ask_tab(model_events: Events, image: gr.Image, session: gr.State) -> AskTab:
    chat = gr.Chatbot(
        label="Conversation",
        height=260,
        render_markdown=False,
        buttons=[],
        feedback_options=None,
        elem_id="chat",
        placeholder="Ask a question about the image.",
    )
    question = gr.Textbox(label="Question", placeholder="what is this?", max_lines=1, elem_id="question")
    ask = gr.Button("Ask", variant="primary", elem_id="ask-button")
    with gr.Accordion("Rank candidate answers", open=False, elem_id="rank"):
        candidates = gr.Textbox(
            label="Candidate answers, separated by commas", placeholder="yes, no", elem_id="candidates"
        )
        rank = gr.Button("Rank", elem_id="rank-button")
        table = gr.Dataframe(
            headers=["answer", "probability"],
            label="Probabilities",
            interactive=False,
            elem_id="ranked",
            wrap=True,
            buttons=[],
        )
    with gr.Accordion("Ask about a region", open=False, elem_id="region-options"):
        region = gr.Image(
            label="Region (click two corners)",
            interactive=False,
            height=300,
            buttons=[],
            elem_id="region",
            alt_text="the image with the region of the question",
        )
        with gr.Row():
            edges = [_edge(name, value) for name, value in zip(("Left", "Top", "Right", "Bottom"), WHOLE_IMAGE)]
        whole_image = gr.Button("Use the whole image", size="sm")
    answer = gr.Textbox(label="Answer", visible=False)
    seconds = gr.Number(label="Seconds", visible=False)
    answered = gr.on(
        [ask.click, question.submit],
        report_errors(model_events.ask),
        [image, question, *edges, session],
        [answer, seconds, session],
        api_name="ask",
        **_MODEL,
    )
    answered.success(lambda current: (events.messages(current), ""), [session], [chat, question], **_PRIVATE)
    chat.clear(events.clear_chat, [session], [session], **_PRIVATE)
    rank.click(
        report_errors(model_events.rank),
        [image, question, candidates, *edges, session],
        [table, session],
        api_name="rank",
        **_MODEL,
    )
    _region_events(image, region, edges, whole_image, session)
    return AskTab(region, chat)


def _edge(name: str, value: float) -> gr.Number:
    return gr.Number(value, label=name, minimum=0, maximum=1, step=0.01, min_width=110)


def _region_events(
    image: gr.Image, region: gr.Image, edges: Sequence[gr.Number], whole_image: gr.Button, session: gr.State
) -> None:
    corner = gr.State(None)

    def clicked(
        x0: object,
        y0: object,
        x1: object,
        y1: object,
        first: Point | None,
        current: Session | None,
        event: gr.SelectData,
    ) -> RegionUpdate:
        pixel = (event.index[0], event.index[1])
        return report_errors(events.click_region)((x0, y0, x1, y1), first, pixel, current)

    region.select(clicked, [*edges, corner, session], [*edges, corner, region], **_PRIVATE)
    whole_image.click(events.select_whole_image, [session], [*edges, corner, region], **_PRIVATE)
    for edge in edges:
        edge.submit(report_errors(events.show_region), [*edges, session], [region, corner], **_PRIVATE)
        edge.blur(report_errors(events.show_region), [*edges, session], [region, corner], **_PRIVATE)
    image.change(lambda: (*WHOLE_IMAGE, None), None, [*edges, corner], **_PRIVATE)


# ---- attention maps --------------------------------------------------------------------------------------------


def _maps_tab(model_events: Events, tab: gr.Tab, image: gr.Image, session: gr.State) -> None:
    decoder = model_events.pipeline.model.config.decoder
    text = gr.Textbox(label="Text", interactive=False, elem_id="map-text")
    with gr.Row():
        methods = list(get_args(MapMethod))
        method = gr.Dropdown(methods, value="both", label="Method", min_width=120, elem_id="method")
        layer = _selection("layer", len(decoder.cross_attention_layers))
        head = _selection("head", decoder.num_heads)
    button = gr.Button("Compute maps", variant="primary", elem_id="maps-button")
    word = gr.Radio([], label=_WORDS_LABEL, elem_id="map-words")
    heatmap = _heatmap("map-heatmap")
    sentence = gr.Markdown("", elem_classes="note")
    gains = _bar_plot("bits", "Information gain of the image (bits)")
    entropies = _bar_plot("entropy", "Attention entropy (0: one slot, 1: uniform)", y_lim=[0, 1])
    table = gr.Dataframe(label="Words", interactive=False, elem_id="word-table", buttons=[])

    inputs = [image, method, layer, head, session]
    outputs = [text, table, session]
    computed = gr.on(
        [button.click, method.input], report_errors(model_events.look), inputs, outputs, api_name="look", **_MODEL
    )
    opened = tab.select(report_errors(model_events.look_if_text), inputs, outputs, **_PRIVATE_MODEL)
    for event in (computed, opened):
        event.success(events.show_words, [session], [word, heatmap, sentence, gains, entropies], **_PRIVATE)
    image.change(
        lambda: ("", None, events.no_words(), None, "", None, None),
        None,
        [text, table, word, heatmap, sentence, gains, entropies],
        **_PRIVATE,
    )
    gr.on(
        [word.input, layer.input, head.input],
        report_errors(model_events.word),
        [image, word, method, layer, head, session],
        [heatmap, sentence, session],
        api_name="word",
        **_MODEL,
    )


def _selection(name: str, count: int) -> gr.Dropdown:
    choices = [("all", -1), *((str(number), number) for number in range(count))]
    return gr.Dropdown(choices, value=-1, label=name.capitalize(), min_width=100, elem_id=name)


def _bar_plot(column: str, title: str, y_lim: list[float | None] | None = None) -> gr.BarPlot:
    """The title is inside of the plot: a label above it would cut off the names below its axis."""
    return gr.BarPlot(
        x="word",
        y=column,
        x_title=" ",
        y_title=column,
        x_label_angle=-45,
        y_lim=y_lim,  # type: ignore[arg-type]
        height=280,
        buttons=[],
        title=title,
        label=title,
        show_label=False,
    )


# ---- encoders --------------------------------------------------------------------------------------------------


def _encoders_tab(tab: gr.Tab) -> None:
    gr.Markdown("Installed encoders with their options, and why an encoder cannot be used.")
    rows = gr.JSON(label="Encoders", visible=False)
    table = gr.HTML("Loading ...", elem_id="encoders")
    listed = gr.on(
        [tab.select],
        report_errors(events.encoders),
        None,
        [rows],
        api_name="encoders",
        concurrency_id="encoders",
        show_progress_on=table,
    )
    listed.success(events.encoder_table, [rows], [table], **_PRIVATE)
