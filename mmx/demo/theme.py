"""The theme of the demo: system fonts, so that the page loads nothing from other hosts, and some CSS."""

from __future__ import annotations

from gradio.themes import Base, Soft

SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")
MONOSPACE_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container { max-width: min(1240px, 100vw) !important; margin: 0 auto !important; }
.gradio-container :is(main, .main, .wrap, .row, .column, .tabs, .tabitem, .block) { max-width: 100%; min-width: 0; }
#header h1 { margin: 0; font-size: 1.6rem; }
#header p { margin: 0.2rem 0 0; }
#caption-words .wrap, #map-words .wrap { gap: 0.35rem; }
#caption-words label, #map-words label { padding: 0.25rem 0.7rem; border-radius: 1rem; }
#caption textarea { font-size: 1.15rem; }
#region img { cursor: crosshair; }
.note { min-height: 1.5rem; }
.gradio-container :focus-visible { outline: 2px solid var(--color-accent); outline-offset: 2px; }
table.encoders { width: 100%; border: 0 !important; }
table.encoders thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
table.encoders tr { display: block; padding: 0.7rem 0; border: 0 !important;
  border-bottom: 1px solid var(--border-color-primary) !important; }
table.encoders td { display: block; border: 0 !important; padding: 0.1rem 0 !important; overflow-wrap: anywhere; }
table.encoders td:first-child { font-weight: 700; }
table.encoders td:not(:first-child):not(:empty)::before { content: attr(data-name) ": "; opacity: 0.75; }
@media (max-width: 600px) {
  .gradio-container { padding: 0.5rem !important; }
  .tab-container button { padding: 0 0.45rem !important; font-size: 0.9rem; }
}
"""


def theme() -> Base:
    """Return gradio's Soft theme in violet and gray, with system fonts."""
    soft = Soft(
        primary_hue="violet", secondary_hue="violet", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=MONOSPACE_FONTS
    )
    return soft.set(  # labels and buttons have a contrast of at least 4.5, in light and dark mode
        block_title_text_color="*primary_700",
        block_label_text_color="*primary_700",
        block_title_text_color_dark="*primary_200",
        block_label_text_color_dark="*primary_200",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        checkbox_label_background_fill_selected="*primary_600",
        checkbox_label_background_fill_selected_dark="*primary_700",
    )
