"""The demo over its API: every endpoint, what is refused and how, what never leaves the house."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from threading import Thread

import httpx
import pytest
from cli_cases import draw
from demo_cases import Visitor, as_uploaded, free_port, heard, numbers, put, upload
from gradio_client.exceptions import AppError
from PIL import Image

import mmx
from mmx.demo import actions, events
from mmx.demo.server import serve
from mmx.encoders.registry import EncoderDescription, EncoderEntry
from mmx.errors import MmxError
from mmx.inference.pipeline import Pipeline
from mmx.testing import tiny_model


@pytest.fixture
def visitor(address) -> Visitor:
    return Visitor(address)


@pytest.fixture
def photo(tmp_path) -> Path:
    return draw(tmp_path / "a.png", 3)


def refused(call, *given, **more) -> str:
    """The one line that a visitor is told, in which no place on the server and no trace stands."""
    with pytest.raises(AppError) as raised:
        call(*given, **more)
    told = str(raised.value)
    assert "\n" not in told and "Traceback" not in told and "/tmp" not in told and "mmx-demo" not in told, told
    return told


# ---- every endpoint --------------------------------------------------------------------------------------------


def test_the_api_is_these_six_and_no_more(visitor) -> None:
    named = visitor.client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(named) == {"/caption", "/ask", "/rank", "/look", "/word", "/encoders"}
    assert visitor.client.view_api(return_format="dict", print_info=False)["unnamed_endpoints"] == {}


def test_caption_grows_and_says_what_the_pipeline_says(visitor, tiny, photo) -> None:
    from gradio_client import handle_file

    job = visitor.client.submit(handle_file(photo), 1, 1, 1.0, 1.0, 6, api_name="/caption")
    text, every = job.result(20)
    assert text == every == tiny.caption(str(photo))
    assert [out[0] for out in job.outputs()][-1] == text and len(job.outputs()) > 1
    assert visitor.caption(photo, beams=3, samples=2)[1].splitlines() == tiny.caption(
        str(photo), num_beams=3, num_return_sequences=2
    )


def test_ask_and_rank_say_what_the_pipeline_says(visitor, tiny, photo) -> None:
    answer, seconds = visitor.ask(photo, "what is this?")
    assert answer == tiny.ask(str(photo), "what is this?") and 0 < seconds < 5
    part = (0.0, 0.0, 0.5, 0.5)
    assert visitor.ask(photo, "what is this?", part)[0] == tiny.ask(str(photo), "what is this?", part)
    table = visitor.rank(photo, "is it?", "yes, no", part)
    expected = tiny.rank(str(photo), "is it?", ["yes", "no"], part)
    assert table["headers"] == ["answer", "probability"]
    assert table["data"] == [[one.answer, pytest.approx(one.probability, abs=1e-4)] for one in expected]


def test_look_and_word_follow_the_last_text(visitor, tiny, photo) -> None:
    assert "nothing was said of this picture yet" in refused(visitor.look, photo)
    answer, _ = visitor.ask(photo, "what?")
    text, table = visitor.look(photo, "both", 0, 1)
    assert text == f"what? {answer}".strip()
    look = tiny.look(str(photo), "what?", text=answer)
    assert [row[0] for row in table["data"]] == [word.text for word in look.words]
    heat, sentence = visitor.word(photo, 0, "attention", 1)
    with Image.open(heat) as shown:
        assert max(shown.size) == 480
    assert sentence.startswith(f"{look.words[0].text}: looking ")


def test_encoders_are_told_as_plain_rows(visitor, monkeypatch) -> None:
    found = [EncoderDescription(EncoderEntry("toy", "toys:Toy", "toy-box", "1.2"), "text", {"size": 3})]
    monkeypatch.setattr("mmx.encoders.discovery.survey", lambda: found)
    events.encoders.cache_clear()
    [row] = visitor.client.predict(api_name="/encoders")
    assert row == actions.encoder_rows(found)[0] and row["address"] == "toys:Toy"
    events.encoders.cache_clear()


def test_two_visitors_do_not_see_each_others_pictures(address, photo, tmp_path) -> None:
    one, two = Visitor(address), Visitor(address)
    one.caption(photo)
    one.look(photo)
    other = draw(tmp_path / "b.png", 9)
    assert "nothing was said of this picture yet" in refused(two.look, photo), "though the other has said something"
    said = two.ask(other, "what?")[0]
    assert two.look(other)[0] == f"what? {said}".strip()
    assert not one.look(photo)[0].startswith("what?")


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/etc/passwd", "/dev/zero", "../../etc/passwd", "/nope\0x", "photo"])
def test_no_file_of_the_server_is_read_that_was_not_uploaded(address, photo, path) -> None:
    """As by hand, without what the client adds and gradio looks at."""
    place = {"path": str(photo) if path == "photo" else path}
    with httpx.Client(base_url=address, timeout=20) as client:
        called = client.post("/gradio_api/call/caption", json={"data": [place, 1, 1, 1.0, 1.0, 6]}).json()
        heard = client.get(f"/gradio_api/call/caption/{called['event_id']}").text
    assert "event: error" in heard and "was not uploaded here" in heard, heard


def test_a_file_that_is_no_picture_is_one_friendly_line(visitor, tmp_path, capfd) -> None:
    for name, data in (("a.png", b"no picture"), ("b.svg", b"<svg/>"), ("c.png", b""), ("d", b"\x89PNG\r\n\x1a\n")):
        path = tmp_path / name
        path.write_bytes(data)
        assert refused(visitor.caption, path).startswith("a picture of")
    assert "Traceback" not in capfd.readouterr().err


def test_what_is_missing_or_of_the_wrong_kind_is_one_line(visitor, photo) -> None:
    assert "no picture was given; drop one" in refused(visitor.caption, None)
    assert "nothing was typed; expected a question" in refused(visitor.ask, photo, "")
    assert "nothing was typed" in refused(visitor.ask, photo, 12)
    assert "left before right" in refused(visitor.ask, photo, "what?", (0.5, 0, 0.2, 1))
    assert "four numbers" in refused(visitor.ask, photo, "what?", ("a", 0, 1, 1))
    assert "expected a whole number in 1..10" in refused(visitor.caption, photo, beams=99)
    assert "beams is 'x'" in refused(visitor.caption, photo, beams="x")
    visitor.caption(photo)
    assert "expected one of weighted" in refused(visitor.look, photo, "nothing")
    assert "layer 9 is not there" in refused(visitor.look, photo, layer=9)
    assert "has no word 99" in refused(visitor.word, photo, 99)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../../../etc/passwd", "http://192.0.2.1/a.png", "file:///etc/passwd", "empty", ""]
)
def test_a_picture_that_was_never_uploaded_is_not_opened(address, path) -> None:
    put(address, "caption", [as_uploaded(path), 1, 1, 1.0, 1.0, 6, None], f"liar-{path}")
    told = heard(address, f"liar-{path}", "process_completed")
    assert told["success"] is False
    assert "root:" not in str(told) and "a picture of" not in str(told) and "mmx-demo" not in str(told), told


def test_what_nobody_foresaw_shows_no_trace_to_the_visitor(visitor, tiny, photo, monkeypatch, capfd) -> None:
    def broken(*given, **more):
        raise RuntimeError("secret at /home/someone")

    monkeypatch.setattr(Pipeline, "ask", broken)
    told = refused(visitor.ask, photo, "what?")
    assert "nobody foresaw" in told and "secret" not in told
    assert "secret at /home/someone" in capfd.readouterr().err, "the server's log has it"


def test_an_upload_over_the_limit_is_refused(address) -> None:
    big = {"files": ("big.png", b"0" * (20 * 2**20 + 1), "image/png")}
    answer = httpx.post(f"{address}gradio_api/upload", files=big, timeout=30)
    assert answer.status_code == 413
    assert "/tmp" not in answer.text


FORMS = ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "/etc/passwd", "%2fetc%2fpasswd",
         "..%252f..%252fetc%252fpasswd", "....//....//etc/passwd", "..\\..\\etc\\passwd", "file:///etc/passwd",
         "http://127.0.0.1/", "C:/Windows/win.ini", "pyproject.toml", "."]  # fmt: skip


@pytest.mark.parametrize(
    "door", ["gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/", "gradio_api/proxy="]
)
def test_no_form_of_a_path_leads_out(address, door) -> None:
    for form in FORMS:
        target = httpx.URL(address).copy_with(raw_path=f"/{door}{form}".encode())
        answer = httpx.get(target, timeout=20)
        assert answer.status_code != 200 or "<!doctype html>" in answer.text[:200].lower(), (door, form)
        assert "root:" not in answer.text and "[project]" not in answer.text, (door, form)


def test_the_files_where_it_was_started_are_not_served(address) -> None:
    for path in (Path(mmx.__file__), Path(mmx.__file__).parent.parent / "pyproject.toml"):
        assert httpx.get(f"{address}gradio_api/file={path}").status_code == 403


# ---- how it is served ------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_and_a_model_without_pictures_are_told(tiny, address) -> None:
    before = (os.getcwd(), dict(os.environ))
    with (
        pytest.raises(MmxError, match="cannot be had; give another --port"),
        serve(tiny, port=httpx.URL(address).port),
    ):
        pass
    with pytest.raises(MmxError, match="shows pictures, which no source"), serve(Pipeline(tiny_model())):
        pass
    assert (os.getcwd(), dict(os.environ)) == before


def test_an_address_of_another_machine_is_told_at_once(tiny) -> None:
    with pytest.raises(MmxError, match="'999.1.1.1' is no address of this machine"), serve(tiny, "999.1.1.1"):
        pass


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_end_leaves_nothing_behind_whenever_it_comes(tiny, tmp_path, monkeypatch, name) -> None:
    def launched(*_: object, **__: object) -> None:
        assert list(tmp_path.glob("mmx-demo-*"))
        os.kill(os.getpid(), getattr(signal, name))  # while the page is being built
        time.sleep(5)

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("mmx.demo.page.build", launched)
    answered = signal.getsignal(getattr(signal, name))
    with pytest.raises(SystemExit) as left, serve(tiny):
        pass
    assert left.value.code == 0 and list(tmp_path.iterdir()) == []
    assert signal.getsignal(getattr(signal, name)) == answered


def test_what_looks_like_html_is_shown_as_it_was_asked() -> None:
    spoken = actions.DemoText("<b>yes</b>", "is 1 <b or c> 2?")
    session = actions.Session("", Image.new("RGB", (9, 9)), None, 0.0, turns=(actions.ChatTurn(spoken, 0.1),))
    asked, answered = (message["content"] for message in events.messages(session))
    assert asked == "is 1 &lt;b or c&gt; 2?" and answered.startswith("&lt;b&gt;yes&lt;/b&gt;")


def test_the_page_names_no_other_host(address) -> None:
    page = httpx.get(address).text
    theme = httpx.get(f"{address}theme.css").text
    assert "fonts.googleapis" not in page + theme and "cdnjs" not in page + theme


STARTED = """
import socket, sys
connect = socket.socket.connect
look_up = socket.getaddrinfo
def guarded(self, to):
    if isinstance(to, tuple) and to[0] not in ("127.0.0.1", "::1"): print("reached", to, flush=True)
    return connect(self, to)
def asked(host, *more, **kinds):
    if host not in ("127.0.0.1", "::1", "localhost", None): print("looked up", host, flush=True)
    return look_up(host, *more, **kinds)
socket.socket.connect, socket.getaddrinfo = guarded, asked
sys.argv = ["mmx", "demo", "--port", sys.argv[1]]
from mmx.cli import main
main()
"""


@pytest.fixture(scope="module", autouse=True)
def command(tmp_path_factory) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str], int, Path]]:
    """`mmx demo` of the bundled model in a process of its own, which starts while other tests run; the line that it
    prints, which is waited for; its port, and where its temporary files lie."""
    port, temporary = free_port(), tmp_path_factory.mktemp("temporary")
    facts = {**os.environ, "TMPDIR": str(temporary), "GRADIO_ANALYTICS_ENABLED": "True"}
    words = [sys.executable, "-c", STARTED, str(port)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=facts) as process:
        yield process, cache(lambda: process.stdout.readline() if process.stdout else ""), port, temporary
        process.kill()


@pytest.mark.slow
def test_two_thousand_captions_leave_no_more_behind_than_a_hundred(command, tmp_path) -> None:
    process, line, port, _ = command
    assert line()
    visitor = Visitor(f"http://127.0.0.1:{port}/")
    photos = [draw(tmp_path / f"{number}.png", number) for number in range(50)]

    def resident() -> int:
        facts = Path(f"/proc/{process.pid}/status").read_text()
        return int(next(line.split()[1] for line in facts.splitlines() if line.startswith("VmRSS")))

    for number in range(100):
        visitor.caption(photos[number % 50], tokens=8)
    before = resident()
    for number in range(2000):
        visitor.caption(photos[number % 50], tokens=8)
    growth = resident() / before - 1
    print(f"{before} kB before, growth {growth:.1%}")
    assert growth <= 0.05


def test_the_command_prints_its_address_reaches_nobody_and_leaves_nothing(command, tmp_path) -> None:
    process, line, port, temporary = command
    assert line() == f"http://127.0.0.1:{port}/\n"
    text, _ = Visitor(f"http://127.0.0.1:{port}/").caption(draw(tmp_path / "a.png", 1), tokens=24)
    assert len(text.split()) > 2, "the bundled model speaks in words"
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "Ctrl+C ends it.\n"), "it would have told whom it reached"
    assert list(temporary.glob("mmx-demo-*")) == []


# ---- the long ones ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sixty_four_clients_each_get_their_own_answers(address, tiny, tmp_path) -> None:
    """64 x 20 requests at once: all end, with the visitor's own answer; who meets a full queue comes again."""
    photos = [draw(tmp_path / f"{number}.png", number) for number in range(64)]
    wanted = [[row.probability for row in tiny.rank(str(p), "is it?", [str(n), "no"])] for n, p in enumerate(photos)]
    uploads = [upload(address, path) for path in photos]
    ended: list[str] = []

    def visit(number: int) -> None:
        for turn in range(20):
            try:
                ended.append(asked(number, f"visitor-{number}-{turn}"))
            except Exception as error:
                ended.append(repr(error))

    def asked(number: int, session: str) -> str:
        given = [uploads[number], "is it?", f"{number}, no", 0, 0, 1, 1, None]
        while True:
            try:
                put(address, "rank", given, session)
                break
            except httpx.HTTPStatusError as error:
                if error.response.status_code != 503:
                    raise
                refusals.append(number)
                time.sleep(0.5)
        told = heard(address, session, "process_completed")
        rows = told["output"]["data"][0]["data"]
        own = {row[0] for row in rows} == {str(number), "no"}
        right = [row[1] for row in rows] == pytest.approx(wanted[number], abs=2e-4)
        return "own" if own and right else f"{number}: {rows}, not {wanted[number]}"

    refusals: list[int] = []
    numbers(address)  # asked for once, not by 64 at the same time
    threads = [Thread(target=visit, args=(number,), daemon=True) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    print(f"{len(ended)} ended; a full queue was met {len(refusals)} times")
    assert Counter(ended) == {"own": 64 * 20}


def test_a_visitor_who_goes_away_frees_the_place(address, photo, monkeypatch) -> None:
    """While a caption that would take minutes grows, its reader leaves; the next visitor is served within a second."""
    said: list[int] = []

    def endless(self, *given, **options):
        for number in range(6000):
            time.sleep(0.02)
            said.append(number)
            yield f"word {number}"

    other = Visitor(address)
    other.rank(photo, "is it?", "yes, no")
    monkeypatch.setattr(Pipeline, "stream", endless)
    put(address, "caption", [upload(address, photo), 1, 1, 1.0, 1.0, 6, None], "leaver")
    heard(address, "leaver", "process_generating")
    left = time.perf_counter()
    other.rank(photo, "is it?", "yes, no")
    waited = time.perf_counter() - left
    print(f"free after {waited:.2f} s")
    assert waited < 1.5 and len(said) < 300
