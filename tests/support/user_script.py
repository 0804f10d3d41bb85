"""A user's script over the public API. It is type-checked with `mypy --strict` and run by the tests."""

import sys
from pathlib import Path

from PIL import Image

import mmx


def describe(result: mmx.GeneratedText | mmx.MmxError) -> str:
    return result.text if isinstance(result, mmx.GeneratedText) else f"{result.code}: {result}"


def main(path: str, folder: Path) -> list[str]:
    model: mmx.Pipeline = mmx.load()
    caption: str = model.caption(path, num_beams=2)
    best: list[mmx.GeneratedText] = model.generate(path, num_beams=2, num_return_sequences=2)
    memory: mmx.Memory = model.encode(image=[path])
    answer: str = model.ask(memory, "what color is the cross?")
    answers: list[str] = model.ask(memory, ["how many shapes are there?", "is there a star?"], max_new_tokens=4)
    region: mmx.Memory = memory.focus((0.0, 0.0, 0.5, 0.5))
    ranked: list[mmx.RankedAnswer] = model.rank(region, "is there a star?", ["yes", "no"])
    streamed: str = "".join(list(model.stream(path))[-1:])
    photo: Image.Image = mmx.load_image(path)
    captions = [describe(result) for _, result in model.captions([photo, photo.copy()], batch_size=2)]
    corner = mmx.Question(path, "what is this?", box=(0.0, 0.0, 0.5, 0.5))
    found = [describe(result) for result in model.answers([corner, (photo, "is there a star?")])]
    look: mmx.Look = model.look(path, "what color is the cross?", method="both")
    look.save(folder / "look.png")
    memory.save(folder / "memory.safetensors")
    again = mmx.Memory.load(folder / "memory.safetensors")
    options: mmx.DecodingOptions = {"do_sample": True, "num_beams": 1, "temperature": 0.7, "seed": 3}
    sampled: str = model.caption(mmx.cat(again), **options)
    try:
        model.caption(str(folder / "missing.jpg"))
    except mmx.MmxError as error:
        return [
            caption,
            best[0].text,
            answer,
            *answers,
            ranked[0].answer,
            streamed,
            *captions,
            *found,
            sampled,
            error.code,
        ]
    raise AssertionError("a missing image must be an error")


if __name__ == "__main__":
    print("\n".join(main(sys.argv[1], Path(sys.argv[2]))))
