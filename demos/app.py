"""The demo for hosting: the bundled model, with connections from other machines accepted."""

import os

import mmx
from mmx.demo.server import serve, wait_for_signal

if __name__ == "__main__":
    with serve(mmx.load(), host="0.0.0.0", port=int(os.environ.get("PORT", "7860"))) as address:
        print(address, flush=True)
        wait_for_signal()
