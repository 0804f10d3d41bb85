"""The demo in a browser: what it does (`actions`), what an event gives back (`events`), how it looks (`page`), and how
it is served (`serve`). Only the command `mmx demo` and a hosted copy import it; gradio stays in this room."""
