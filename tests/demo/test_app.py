"""The demo over its API: every endpoint, refused values, file access, and how it starts and stops."""

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
from demo_cases import User, as_uploaded, endpoint_ids, free_port, join_queue, upload, wait_for_message
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
def user(address) -> User:
    return User(address)


@pytest.fixture
def image(tmp_path) -> Path:
    return draw(tmp_path / "a.png", 3)


def refused(call, *args, **kwargs) -> str:
    """The message of a refused call: one line without a traceback and without a path of the server."""
    with pytest.raises(AppError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert not any(text in message for text in ("\n", "Traceback", "/tmp", "mmx-demo")), message
    return message


# ---- every endpoint --------------------------------------------------------------------------------------------


def test_the_api_has_six_endpoints(user) -> None:
    named = user.client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(named) == {"/caption", "/ask", "/rank", "/look", "/word", "/encoders"}
    assert user.client.view_api(return_format="dict", print_info=False)["unnamed_endpoints"] == {}


def test_caption_streams_the_text_of_the_pipeline(user, tiny, image) -> None:
    from gradio_client import handle_file

    job = user.client.submit(handle_file(image), 1, 1, 1.0, 1.0, 6, api_name="/caption")
    text, all_captions = job.result(20)
    assert text == all_captions == tiny.caption(str(image))
    assert [out[0] for out in job.outputs()][-1] == text and len(job.outputs()) > 1
    expected = tiny.generate(str(image), num_beams=3, num_return_sequences=2)
    assert user.caption(image, beams=3, captions=2)[1].splitlines() == [text.text for text in expected]


def test_ask_and_rank_return_what_the_pipeline_returns(user, tiny, image) -> None:
    answer, seconds = user.ask(image, "what is this?")
    assert answer == tiny.ask(str(image), "what is this?") and 0 < seconds < 5
    box = (0.0, 0.0, 0.5, 0.5)
    assert user.ask(image, "what is this?", box)[0] == tiny.ask(str(image), "what is this?", box)
    table = user.rank(image, "is it?", "yes, no", box)
    expected = tiny.rank(str(image), "is it?", ["yes", "no"], box)
    assert table["headers"] == ["answer", "probability"]
    assert table["data"] == [[ranked.answer, pytest.approx(ranked.probability, abs=1e-4)] for ranked in expected]


def test_look_and_word_explain_the_current_text(user, tiny, image) -> None:
    refused(user.look, image)
    answer, _ = user.ask(image, "what?")
    text, table = user.look(image, "both", 0, 1)
    assert text == f"what? {answer}".strip()
    look = tiny.look(str(image), "what?", text=answer)
    assert [row[0] for row in table["data"]] == [word.text for word in look.words]
    heatmap, sentence = user.word(image, 0, "attention", 1)
    with Image.open(heatmap) as shown:
        assert max(shown.size) == 480
    assert sentence.startswith(f"{look.words[0].text}: information gain ")


def test_encoders_are_returned_as_rows(user, monkeypatch) -> None:
    found = [EncoderDescription(EncoderEntry("toy", "toys:Toy", "toy-box", "1.2"), "text", {"size": 3})]
    monkeypatch.setattr("mmx.encoders.discovery.discover_encoders", lambda: found)
    events.encoders.cache_clear()
    [row] = user.client.predict(api_name="/encoders")
    assert row == actions.encoder_rows(found)[0] and row["address"] == "toys:Toy"
    events.encoders.cache_clear()


def test_sessions_are_separate(address, image, tmp_path) -> None:
    one = User(address)
    two = User(address)
    one.caption(image)
    one.look(image)
    other = draw(tmp_path / "b.png", 9)
    assert "there is no text for this image yet" in refused(two.look, image)
    answer = two.ask(other, "what?")[0]
    assert two.look(other)[0] == f"what? {answer}".strip()
    assert not one.look(image)[0].startswith("what?")


# ---- refused values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/etc/passwd", "/dev/zero", "../../etc/passwd", "/nope\0x", "image"])
def test_only_uploaded_files_are_read(address, image, path) -> None:
    """Without the fields that the client adds, which gradio checks."""
    file = {"path": str(image) if path == "image" else path}
    with httpx.Client(base_url=address, timeout=20) as client:
        called = client.post("/gradio_api/call/caption", json={"data": [file, 1, 1, 1.0, 1.0, 6]}).json()
        events_text = client.get(f"/gradio_api/call/caption/{called['event_id']}").text
    assert "event: error" in events_text and "was not uploaded here" in events_text, events_text


def test_a_file_that_is_not_an_image_is_one_line(user, tmp_path, capfd) -> None:
    for name, data in (("a.png", b"not an image"), ("b.svg", b"<svg/>"), ("c.png", b""), ("d", b"\x89PNG\r\n\x1a\n")):
        path = tmp_path / name
        path.write_bytes(data)
        assert refused(user.caption, path).startswith("image data of")
    assert "Traceback" not in capfd.readouterr().err


def test_missing_and_wrong_values_are_one_line(user, image) -> None:
    refused(user.caption, None)
    refused(user.ask, image, "")
    refused(user.ask, image, 12)
    refused(user.ask, image, "what?", (0.5, 0, 0.2, 1))
    refused(user.ask, image, "what?", ("a", 0, 1, 1))
    assert "1..10" in refused(user.caption, image, beams=99)
    assert "'x'" in refused(user.caption, image, beams="x")
    user.caption(image)
    refused(user.look, image, "nothing")
    refused(user.look, image, layer=9)
    refused(user.word, image, 99)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../../../etc/passwd", "http://192.0.2.1/a.png", "file:///etc/passwd", "empty", ""]
)
def test_an_image_that_was_not_uploaded_is_not_opened(address, path) -> None:
    join_queue(address, "caption", [as_uploaded(path), 1, 1, 1.0, 1.0, 6, None], f"client-{path}")
    message = wait_for_message(address, f"client-{path}", "process_completed")
    assert message["success"] is False
    assert not any(text in str(message) for text in ("root:", "image data of", "mmx-demo")), message


def test_an_unexpected_error_shows_no_traceback_to_the_user(user, tiny, image, monkeypatch, capfd) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("secret at /home/someone")

    monkeypatch.setattr(Pipeline, "generate", broken)
    assert "secret" not in refused(user.ask, image, "what?")
    assert "secret at /home/someone" in capfd.readouterr().err, "it is in the log of the server"


def test_an_upload_over_the_limit_is_refused(address) -> None:
    big = {"files": ("big.png", b"0" * (20 * 2**20 + 1), "image/png")}
    answer = httpx.post(f"{address}gradio_api/upload", files=big, timeout=30)
    assert answer.status_code == 413
    assert "/tmp" not in answer.text


PATHS = ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "/etc/passwd", "%2fetc%2fpasswd",
         "..%252f..%252fetc%252fpasswd", "....//....//etc/passwd", "..\\..\\etc\\passwd", "file:///etc/passwd",
         "http://127.0.0.1/", "C:/Windows/win.ini", "pyproject.toml", "."]  # fmt: skip


@pytest.mark.parametrize(
    "route", ["gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/", "gradio_api/proxy="]
)
def test_path_traversal_is_refused(address, route) -> None:
    for path in PATHS:
        target = httpx.URL(address).copy_with(raw_path=f"/{route}{path}".encode())
        answer = httpx.get(target, timeout=20)
        assert answer.status_code != 200 or "<!doctype html>" in answer.text[:200].lower(), (route, path)
        assert "root:" not in answer.text and "[project]" not in answer.text, (route, path)


def test_files_of_the_working_directory_are_not_served(address) -> None:
    for path in (Path(mmx.__file__), Path(mmx.__file__).parent.parent / "pyproject.toml"):
        assert httpx.get(f"{address}gradio_api/file={path}").status_code == 403


# ---- start and stop ---------------------------------------------------------------------------------------------


def test_a_used_port_and_a_model_without_images_are_refused(tiny, address) -> None:
    before = (os.getcwd(), dict(os.environ))
    with pytest.raises(MmxError) as caught, serve(tiny, port=httpx.URL(address).port):
        pass
    assert caught.value.code == "demo.port"
    with pytest.raises(MmxError) as caught, serve(Pipeline(tiny_model())):
        pass
    assert caught.value.code == "demo.no_image_source"
    assert (os.getcwd(), dict(os.environ)) == before


def test_an_address_of_another_machine_is_refused(tiny) -> None:
    with pytest.raises(MmxError) as caught, serve(tiny, "999.1.1.1"):
        pass
    assert (caught.value.code, caught.value.details) == ("demo.host", {"host": "999.1.1.1"})


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_during_start_removes_temporary_files(tiny, tmp_path, monkeypatch, name) -> None:
    def build_page(*_: object, **__: object) -> None:
        assert list(tmp_path.glob("mmx-demo-*"))
        os.kill(os.getpid(), getattr(signal, name))  # while the page is being built
        time.sleep(5)

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("mmx.demo.page.build_page", build_page)
    handler = signal.getsignal(getattr(signal, name))
    with pytest.raises(SystemExit) as exit_info, serve(tiny):
        pass
    assert exit_info.value.code == 0 and list(tmp_path.iterdir()) == []
    assert signal.getsignal(getattr(signal, name)) == handler


def test_html_in_the_conversation_is_escaped() -> None:
    text = actions.DemoText("<b>yes</b>", "is 1 <b or c> 2?")
    session = actions.Session("", Image.new("RGB", (9, 9)), None, 0.0, turns=(actions.ChatTurn(text, 0.1),))
    question, answer = (message["content"] for message in events.messages(session))
    assert question == "is 1 &lt;b or c&gt; 2?" and answer.startswith("&lt;b&gt;yes&lt;/b&gt;")


def test_the_conversation_has_the_probability_of_an_answer() -> None:
    turn = actions.ChatTurn(actions.DemoText("yes", "is it?", probability=0.834), 0.1)
    session = actions.Session("", Image.new("RGB", (9, 9)), None, 0.0, turns=(turn,))
    assert "83%" in events.messages(session)[1]["content"]


def test_the_page_refers_to_no_other_host(address) -> None:
    page = httpx.get(address).text
    theme = httpx.get(f"{address}theme.css").text
    assert "fonts.googleapis" not in page + theme and "cdnjs" not in page + theme


PROGRAM = """
import socket, sys
connect = socket.socket.connect
getaddrinfo = socket.getaddrinfo
def logged_connect(self, target):
    if isinstance(target, tuple) and target[0] not in ("127.0.0.1", "::1"): print("connected to", target, flush=True)
    return connect(self, target)
def logged_getaddrinfo(host, *args, **kwargs):
    if host not in ("127.0.0.1", "::1", "localhost", None): print("resolved", host, flush=True)
    return getaddrinfo(host, *args, **kwargs)
socket.socket.connect = logged_connect
socket.getaddrinfo = logged_getaddrinfo
sys.argv = ["mmx", "demo", "--port", sys.argv[1]]
from mmx.cli.app import main
main()
"""


@pytest.fixture(scope="module", autouse=True)
def command(tmp_path_factory) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str], int, Path]]:
    """`mmx demo` with the bundled model in a process of its own, which starts while other tests run.

    Returns the process, a function that waits for its first line, its port, and the folder of its temporary files.
    """
    port = free_port()
    temporary = tmp_path_factory.mktemp("temporary")
    environment = {**os.environ, "TMPDIR": str(temporary), "GRADIO_ANALYTICS_ENABLED": "True"}
    words = [sys.executable, "-c", PROGRAM, str(port)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        yield process, cache(lambda: process.stdout.readline() if process.stdout else ""), port, temporary
        process.kill()


@pytest.mark.slow
def test_memory_grows_by_at_most_two_percent_in_four_hundred_captions(command, tmp_path) -> None:
    process, line, port, _ = command
    assert line()
    user = User(f"http://127.0.0.1:{port}/")
    images = [draw(tmp_path / f"{number}.png", number) for number in range(50)]

    def resident() -> int:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))

    for number in range(100):
        user.caption(images[number % 50], length=8)
    before = resident()
    for number in range(400):
        user.caption(images[number % 50], length=8)
    growth = resident() / before - 1
    print(f"{before} kB before, growth {growth:.1%}")
    assert growth <= 0.02


def test_the_command_prints_its_address_connects_nowhere_and_cleans_up(command, tmp_path) -> None:
    process, line, port, temporary = command
    assert line() == f"http://127.0.0.1:{port}/\n"
    text, _ = User(f"http://127.0.0.1:{port}/").caption(draw(tmp_path / "a.png", 1), length=24)
    assert len(text.split()) > 2, "the bundled model generates words"
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "", "Press Ctrl+C to stop.\n"), "a connection would have been printed"
    assert list(temporary.glob("mmx-demo-*")) == []


# ---- many users ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sixty_four_users_get_their_own_answers(address, tiny, tmp_path) -> None:
    """64 x 20 requests at once: all end with the answer to the own image; a full queue is tried again."""
    images = [draw(tmp_path / f"{number}.png", number) for number in range(64)]
    expected = [[row.probability for row in tiny.rank(str(p), "is it?", [str(n), "no"])] for n, p in enumerate(images)]
    uploads = [upload(address, path) for path in images]
    outcomes: list[str] = []

    def send_requests(number: int) -> None:
        for turn in range(20):
            try:
                outcomes.append(request(number, f"user-{number}-{turn}"))
            except Exception as error:
                outcomes.append(repr(error))

    def request(number: int, session: str) -> str:
        data = [uploads[number], "is it?", f"{number}, no", 0, 0, 1, 1, None]
        while True:
            try:
                join_queue(address, "rank", data, session)
                break
            except httpx.HTTPStatusError as error:
                if error.response.status_code != 503:
                    raise
                refusals.append(number)
                time.sleep(0.5)
        message = wait_for_message(address, session, "process_completed")
        rows = message["output"]["data"][0]["data"]
        own_answers = {row[0] for row in rows} == {str(number), "no"}
        own_image = [row[1] for row in rows] == pytest.approx(expected[number], abs=2e-4)
        return "own" if own_answers and own_image else f"{number}: {rows}, not {expected[number]}"

    refusals: list[int] = []
    endpoint_ids(address)  # cached before the threads start
    threads = [Thread(target=send_requests, args=(number,), daemon=True) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    print(f"{len(outcomes)} requests ended; the queue was full {len(refusals)} times")
    assert Counter(outcomes) == {"own": 64 * 20}


def test_a_disconnected_user_frees_the_queue(address, image, monkeypatch) -> None:
    """While a caption that would take minutes is generated, its client disconnects; the next one is served at once."""
    generated: list[int] = []

    def endless(self, *args, **options):
        for number in range(6000):
            time.sleep(0.02)
            generated.append(number)
            yield f"word {number}"

    other = User(address)
    other.rank(image, "is it?", "yes, no")
    monkeypatch.setattr(Pipeline, "stream", endless)
    join_queue(address, "caption", [upload(address, image), 1, 1, 1.0, 1.0, 6, None], "disconnected")
    wait_for_message(address, "disconnected", "process_generating")
    disconnected = time.perf_counter()
    other.rank(image, "is it?", "yes, no")
    waited = time.perf_counter() - disconnected
    print(f"free after {waited:.2f} s")
    assert waited < 1.5 and len(generated) < 300
