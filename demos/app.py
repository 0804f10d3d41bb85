"""The demo as a hosted copy runs it: open to whoever can reach the machine, with the bundled model."""

import os

import mmx
from mmx.demo.server import serve, wait

if __name__ == "__main__":
    with serve(mmx.load(), host="0.0.0.0", port=int(os.environ.get("PORT", "7860"))) as address:
        print(address, flush=True)
        wait()
