"""The page: a picture at the left, what can be done with it at the right, and which event does it.

Every action is an endpoint with a name (/caption, /ask, /rank, /look, /word, /encoders); events that only move things
about on the page are private. One thing at a time is asked of the model, in the order of the queue. Inputs are not
looked at by gradio (`preprocess=False`): its own door for pictures opens them before ours could. So it is `events` that
takes nothing but what was uploaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from mmx.demo import events
from mmx.demo.actions import MOST_TOKENS
from mmx.demo.events import Events, report_errors, report_stream_errors
from mmx.demo.region import WHOLE
from mmx.inference.pipeline import Pipeline
from mmx.interpret.look import MapMethod

MODEL: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "preprocess": False}
PRIVATE: dict[str, Any] = {"api_visibility": "private", "preprocess": False, "show_progress": "hidden"}
HELPER: dict[str, Any] = {**MODEL, **PRIVATE}
TOP = """# mmx
Any encoder, one decoder: it speaks of your picture, answers, and shows where each word looked."""


def build(pipeline: Pipeline, examples: Sequence[Path] = ()) -> gr.Blocks:
    """The page over a model, not yet served. examples: pictures to pick from, which gradio copies into its cache."""
    does = Events(pipeline)
    with gr.Blocks(title="mmx", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        session = gr.State(None)
        gr.Markdown(TOP, elem_id="top")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture, note = _picture(examples)
            with gr.Column(scale=3, min_width=320):
                with gr.Tab("Caption"):
                    settle, caption = _caption_tab(does, pipeline, picture, session)
                with gr.Tab("Ask"):
                    part, chat = _ask_tab(does, picture, session)
                with gr.Tab("Look inside") as inside:
                    _look_tab(does, pipeline, inside, picture, session)
                with gr.Tab("Encoders") as tab:
                    _encoders_tab(tab)
        arrival = picture.change(report_errors(does.open), [picture, session], [session, note, part, chat], **HELPER)
        spoken = arrival.success(report_stream_errors(does.caption_at_once), caption[0], caption[1], **HELPER)
        spoken.success(report_errors(does.settle), [session], [session, *settle], **HELPER)
        arrival.failure(events.cleared, None, [session, note, part, chat, caption[1][0], *settle], **PRIVATE)
    page.queue(max_size=32, default_concurrency_limit=1)
    return page


def _picture(examples: Sequence[Path]) -> tuple[gr.Image, gr.Markdown]:
    picture = gr.Image(
        label="Picture", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=360,
        buttons=[], elem_id="picture", alt_text="the picture that is spoken of",
    )  # fmt: skip
    note = gr.Markdown("", elem_id="note", elem_classes="note")
    if examples:
        gr.Examples(
            [[str(path)] for path in examples], [picture], label="Or one of these", api_visibility="private",
            cache_examples=False, elem_id="examples",
        )  # fmt: skip
    return picture, note


def _caption_tab(does: Events, pipeline: Pipeline, picture: gr.Image, session: gr.State) -> tuple[list[Any], Any]:
    """-> the components that settle once a caption is whole; inputs and outputs of the caption."""
    text = gr.Textbox(label="Caption", lines=2, interactive=False, elem_id="caption")
    every = gr.Textbox(label="All captions, best first", interactive=False, visible=False, elem_id="captions")
    button = gr.Button("Caption", variant="primary", elem_id="do-caption")
    with gr.Accordion("How words are chosen", open=False):
        beams = gr.Slider(1, 10, 1, step=1, label="Beams", info="1 comes word by word; more are searched, then told")
        samples = gr.Slider(1, 8, 1, step=1, label="Captions", info="more than 1: samples, or the best beams")
        warmth = gr.Slider(0, 2, 1, step=0.1, label="Temperature", info="of samples: higher is bolder")
        guidance = gr.Slider(0, 5, 1, step=0.1, label="Guidance", info="how much what is seen counts; 0 not at all")
        most = pipeline.generation.max_new_tokens
        tokens = gr.Slider(1, MOST_TOKENS, min(most, MOST_TOKENS), step=1, label="Longest caption", info="in tokens")
    words = gr.Radio([], label="Words: choose one to see where it looked", elem_id="words")
    heat = gr.Image(
        label="Where the word looked", interactive=False, buttons=["fullscreen"], elem_id="heat", height=340,
        alt_text="the picture under the heat of where the word looked",
    )  # fmt: skip
    bits = gr.Markdown("", elem_id="bits", elem_classes="note")
    given, out = [picture, beams, samples, warmth, guidance, tokens, session], [text, every, session]
    made = button.click(report_stream_errors(does.caption), given, out, api_name="caption", **MODEL)
    made.success(report_errors(does.settle), [session], [session, every, words, heat, bits], **HELPER)
    words.input(report_errors(does.plain_word), [picture, words, session], [heat, bits, session], **HELPER)
    return [every, words, heat, bits], (given, out)


def _ask_tab(does: Events, picture: gr.Image, session: gr.State) -> tuple[gr.Image, gr.Chatbot]:
    chat = gr.Chatbot(
        label="Conversation", height=260, render_markdown=False, buttons=[], feedback_options=None, elem_id="chat",
        placeholder="Ask something about the picture.",
    )  # fmt: skip
    question = gr.Textbox(label="Question", placeholder="what is this?", max_lines=1, elem_id="question")
    ask = gr.Button("Ask", variant="primary", elem_id="do-ask")
    with gr.Accordion("Offered answers", open=False, elem_id="offer"):
        offered = gr.Textbox(label="Answers, with commas between them", placeholder="yes, no", elem_id="offered")
        rank = gr.Button("Rank them", elem_id="do-rank")
        table = gr.Dataframe(
            headers=["answer", "probability"], label="Their probabilities", interactive=False, elem_id="ranked",
            wrap=True, buttons=[],
        )  # fmt: skip
    with gr.Accordion("Ask about a part", open=False, elem_id="about"):
        part = gr.Image(
            label="The part: click two corners", interactive=False, height=300, buttons=[],
            elem_id="part", alt_text="the picture with the part that is asked about",
        )  # fmt: skip
        with gr.Row():
            sides = [
                gr.Number(side, label=name, minimum=0, maximum=1, step=0.01, min_width=110)
                for name, side in zip(("Left", "Top", "Right", "Bottom"), (0, 0, 1, 1))
            ]
        everywhere = gr.Button("The whole picture", size="sm")
    answer = gr.Textbox(label="Answer", visible=False)
    seconds = gr.Number(label="Seconds", visible=False)
    first = gr.State(None)
    made = gr.on(
        [ask.click, question.submit], report_errors(does.ask), [picture, question, *sides, session], [answer, seconds, session],
        api_name="ask", **MODEL,
    )  # fmt: skip
    made.success(lambda held: (events.messages(held), ""), [session], [chat, question], **PRIVATE)
    chat.clear(events.forget, [session], [session], **PRIVATE)
    rank.click(
        report_errors(does.rank),
        [picture, question, offered, *sides, session],
        [table, session],
        api_name="rank",
        **MODEL,
    )

    def clicked(x0: Any, y0: Any, x1: Any, y1: Any, corner: Any, held: Any, event: gr.SelectData) -> Any:
        return report_errors(does.corner)((x0, y0, x1, y1), corner, tuple(event.index), held)

    part.select(clicked, [*sides, first, session], [*sides, first, part], **PRIVATE)
    everywhere.click(events.whole, [session], [*sides, first, part], **PRIVATE)
    for side in sides:
        side.submit(report_errors(events.part), [*sides, session], [part, first], **PRIVATE)
        side.blur(report_errors(events.part), [*sides, session], [part, first], **PRIVATE)
    picture.change(lambda: (*WHOLE, None), None, [*sides, first], **PRIVATE)
    return part, chat


def _look_tab(does: Events, pipeline: Pipeline, tab: gr.Tab, picture: gr.Image, session: gr.State) -> None:
    decoder = pipeline.model.config.decoder
    text = gr.Textbox(label="Looked into", interactive=False, elem_id="looked")
    with gr.Row():
        kind = gr.Dropdown(list(get_args(MapMethod)), value="both", label="Kind of map", min_width=120, elem_id="kind")
        layer = _numbered("layer", len(decoder.cross_attention_layers))
        head = _numbered("head", decoder.num_heads)
    button = gr.Button("Look", variant="primary", elem_id="do-look")
    word = gr.Radio([], label="Words: choose one to see where it looked", elem_id="word")
    heat = gr.Image(
        label="Where the word looked", interactive=False, buttons=["fullscreen"], elem_id="inner-heat", height=340,
        alt_text="the picture under the heat of where the word looked",
    )  # fmt: skip
    bits = gr.Markdown("", elem_classes="note")
    saved = gr.BarPlot(
        x="word", y="bits", x_title=" ", x_label_angle=-45, height=280, buttons=[], **_titled("Bits that looking saved")
    )
    spread = gr.BarPlot(
        x="word", y="spread", x_title=" ", x_label_angle=-45, y_lim=[0, 1], height=280, buttons=[],
        **_titled("How wide each word looked"),
    )  # fmt: skip
    table = gr.Dataframe(label="The words in numbers", interactive=False, elem_id="facts", buttons=[])
    given, shown = [picture, kind, layer, head, session], [text, table, session]
    looked = gr.on([button.click, kind.input], report_errors(does.look), given, shown, api_name="look", **MODEL)
    came = tab.select(report_errors(does.look_if_said), given, shown, **HELPER)
    for event in (looked, came):
        event.success(events.look_shown, [session], [word, heat, bits, saved, spread], **PRIVATE)
    picture.change(lambda: ("", None, events.no_words(), None, "", None, None), None,
                   [text, table, word, heat, bits, saved, spread], **PRIVATE)  # fmt: skip
    gr.on(
        [word.input, layer.input, head.input], report_errors(does.word), [picture, word, kind, layer, head, session],
        [heat, bits, session], api_name="word", **MODEL,
    )  # fmt: skip


def _encoders_tab(tab: gr.Tab) -> None:
    gr.Markdown("What can be mounted on the decoder here, and what is broken and why.")
    rows = gr.JSON(label="Encoders", visible=False)
    table = gr.HTML("Asking each of them ...", elem_id="encoders")
    asked = gr.on(
        [tab.select], report_errors(events.encoders), None, [rows], api_name="encoders", concurrency_id="survey",
        show_progress_on=table,
    )  # fmt: skip
    asked.success(events.encoder_table, [rows], [table], **PRIVATE)


def _titled(text: str) -> dict[str, Any]:
    """The title of a plot within it: a label above would cut off what stands below its axis."""
    return {"title": text, "label": text, "show_label": False}


def _numbered(name: str, count: int) -> gr.Dropdown:
    numbers = [("all", -1), *((str(number), number) for number in range(count))]
    return gr.Dropdown(numbers, value=-1, label=name.capitalize(), min_width=100, elem_id=name)
