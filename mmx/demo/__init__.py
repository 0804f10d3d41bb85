"""The demo: a web page over a Pipeline.

`actions` are functions without a page, `events` connects them to components, `page` lays the components out, `server`
serves the page. Only `mmx demo` and a hosted copy import this package; gradio is imported nowhere else.
"""
