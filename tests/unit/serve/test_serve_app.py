"""Requests and their answers, with a stand-in for the engine."""

from __future__ import annotations

import asyncio
import io
import logging
import time

import httpx
import pytest
from hostile import encoded, png_of, scans, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from served import FORM, form, png, until

from sparse_exp.errors import EngineError
from sparse_exp.serve import service as service_module
from sparse_exp.serve import uploads as uploads_module
from sparse_exp.serve.app import create_app
from sparse_exp.serve.log import Sparing
from sparse_exp.serve.worker import WorkerDied


def corners(answer: dict) -> list[float]:
    """The stand-in's reading of an image's colour."""
    best = answer["detections"][0]
    return [best["x1"], best["y1"], best["x2"], best["y2"]]


def test_an_answer_says_all_of_each_image_in_order(make_client):
    client = make_client()
    files = [("images", ("red.png", png((200, 0, 9), (40, 20)))), ("images", ("b.png", png((3, 4, 5))))]
    answer = client.post("/predict", files=files)
    assert answer.status_code == 200
    first, second = answer.json()["images"]
    assert (first["name"], first["width"], first["height"]) == ("red.png", 40, 20)
    expected = {"x1": 200, "y1": 0, "x2": 9, "y2": 255, "confidence": 0.9, "class_id": 1, "class": "car"}
    assert first["detections"][0] == expected
    assert (second["name"], corners(second)) == ("b.png", [3, 4, 5, 255])
    assert set(first["milliseconds"]) == {"decode", "wait", "engine"}


def test_the_orientation_of_a_photo_counts(make_client):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # it is to be turned by 90 degrees
    Image.new("RGB", (40, 20)).save(file, "JPEG", exif=exif)
    (image,) = make_client().post("/predict", content=form(file.getvalue()), headers=FORM).json()["images"]
    assert (image["width"], image["height"]) == (20, 40)


def test_a_threshold_may_be_raised_and_not_lowered(make_client):
    client = make_client()

    def ask(conf: float) -> httpx.Response:
        return client.post("/predict", params={"conf": conf}, content=form(png((1, 2, 3))), headers=FORM)

    counts = [len(ask(conf).json()["images"][0]["detections"]) for conf in (0.25, 0.39, 0.41, 0.95)]
    assert counts == [2, 2, 1, 0]
    assert ask(0.1).status_code == 422
    assert "0.25" in ask(0.1).json()["error"]


# By name: headers, body, the status, and what the message names.
JPEG_START = b"\xff\xd8\xff\xe0" + bytes(50)
TEXT = {"Content-Type": "text/plain"}
BAD = {
    "a text": (TEXT, b"hello", 415, "multipart/form-data"),
    "no content type": ({}, b"hello", 415, "multipart/form-data"),
    "an encoded body": (FORM | {"Content-Encoding": "gzip"}, form(png((1, 2, 3))), 415, "Content-Encoding"),
    "no boundary": ({"Content-Type": "multipart/form-data"}, form(b"x"), 400, "boundary"),
    "an endless boundary": ({"Content-Type": f"multipart/form-data; boundary={'b' * 999}"}, b"", 400, "form"),
    "no body": (FORM, b"", 400, "last boundary"),
    "another boundary": (FORM, form(b"x").replace(b"--x", b"--y"), 400, "form"),
    "no last boundary": (FORM, form(png((1, 2, 3)))[:-6], 400, "last boundary"),
    "a form of nothing": (FORM, b"--x--\r\n", 422, "no image"),
    "another field": (FORM, form(b"x", field="file"), 422, "'images', but got 'file'"),
    "no disposition": (FORM, b"--x\r\nA: b\r\n\r\ndata\r\n--x--\r\n", 422, "'images'"),
    "an empty file": (FORM, form(b""), 422, "a.png is empty"),
    "a text file": (FORM, form(b"hello", name="b.txt"), 422, "b.txt is no image"),
    "a drawing that is a program": (FORM, form(b"%!PS-Adobe-3.0 EPSF-3.0\n"), 422, "no image"),
    "the start of a JPEG": (FORM, form(JPEG_START), 422, "a.png"),
    "half a PNG": (FORM, form(png((1, 2, 3), (90, 90))[:80]), 422, "a.png"),
    "one bad of two": (FORM, form(png((1, 2, 3)), b"hello"), 422, "no image"),
    "too many files": (FORM, form(*[png((1, 2, 3))] * 5), 413, "more than 4"),
    "too long": (FORM, form(bytes(30_000)), 413, "--max-bytes"),
    "too many pixels": (FORM, form(png((1, 2, 3), (101, 100))), 413, "10100 pixels"),
    "too many pixels together": (FORM, form(*[png((1, 2, 3), (60, 60))] * 3), 413, "10800 pixels together"),
    "a kind that is not taken": (FORM, form(encoded("WEBP"), name="b.webp"), 422, "--image-formats"),
    "endless scans": (FORM, form(scans(1000)), 413, "scans"),
    "texts that unpack": (FORM, form(png_of(8, texts(2))), 422, "header"),
}


def one_line(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    assert error
    assert "\n" not in error
    return error


def test_bad_requests_are_told_what_is_wrong_and_the_service_lives_on(make_client):
    client = make_client(max_bytes=20_000, max_pixels=10_000, max_files=4)
    for name, (headers, body, status, said) in BAD.items():
        answer = client.post("/predict", content=body, headers=headers)
        assert (name, answer.status_code) == (name, status)
        assert said in one_line(answer), name
    for largest in (form(png((1, 2, 3), (100, 100))), form(*[png((1, 2, 3), (50, 50))] * 4)):
        assert client.post("/predict", content=largest, headers=FORM).status_code == 200


def test_other_paths_and_methods(make_client):
    client = make_client()
    for method, path, status in (("GET", "/predict", 405), ("POST", "/health", 405), ("GET", "/other", 404)):
        answer = client.request(method, path)
        assert answer.status_code == status
        assert "POST /predict" in one_line(answer)
    assert client.get("/docs").status_code == 200
    body = client.get("/openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]
    assert list(body["content"]) == ["multipart/form-data"]


def test_a_bomb_is_refused_before_it_is_unpacked(make_client):
    for side in (8_000, 60_000):  # over our bound; over Pillow's own
        answer = make_client().post("/predict", content=form(png_of(side)), headers=FORM)
        assert answer.status_code == 413
        assert "pixels" in one_line(answer)


WHOLE = form(png((10, 20, 30), (12, 12)), png((4, 5, 6)))
EDITS = st.lists(
    st.tuples(st.integers(0, len(WHOLE)), st.integers(0, 40), st.binary(max_size=40)), min_size=1, max_size=4
)


def test_mutilated_bodies_are_never_our_fault(make_client):
    client = make_client()

    @settings(max_examples=80, deadline=None, database=None)
    @given(EDITS)
    def mutilate(edits):
        body = WHOLE
        for start, length, inserted in edits:
            body = body[:start] + inserted + body[start + length :]
        answer = client.post("/predict", content=body, headers=FORM)
        assert answer.status_code in (200, 400, 413, 422)
        if answer.status_code != 200:
            one_line(answer)

    mutilate()
    assert client.post("/predict", content=WHOLE, headers=FORM).status_code == 200


def run_with(service, scenario) -> None:
    """Run a coroutine function of an asynchronous client, with the service open."""

    async def run() -> None:
        app = create_app(service)
        async with service.open():
            while not service.ready:
                await asyncio.sleep(0.001)
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
                await asyncio.wait_for(scenario(client), 20)

    asyncio.run(run())


@pytest.mark.parametrize(("batch_size", "streams"), [(1, 1), (4, 1), (3, 2)])
def test_of_64_at_once_each_gets_its_own_answer(make_service, stand_in, batch_size, streams):
    colours = [(3 * i, 255 - i, i) for i in range(64)]

    async def scenario(client):
        asked = [client.post("/predict", content=form(png(colour)), headers=FORM) for colour in colours]
        answers = await asyncio.gather(*asked)
        assert [corners(a.json()["images"][0]) for a in answers] == [[*colour, 255] for colour in colours]

    run_with(make_service(batch_size=batch_size, streams=streams), scenario)
    assert sum(stand_in.batches) == 64
    assert max(stand_in.batches) == batch_size


def test_who_comes_when_it_is_full_is_sent_away_and_nobody_inside_is_lost(make_service, stand_in):
    async def scenario(client):
        stand_in.hold = asyncio.Event()
        inside = [
            asyncio.create_task(client.post("/predict", content=form(png((i, 0, 0))), headers=FORM))
            for i in range(3)
        ]
        while not stand_in.batches:
            await asyncio.sleep(0.001)
        refused = await client.post("/predict", content=form(png((9, 0, 0))), headers=FORM)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert "busy" in one_line(refused)
        stand_in.hold.set()
        answers = await asyncio.gather(*inside)
        assert [corners(answer.json()["images"][0])[0] for answer in answers] == [0, 1, 2]
        again = await client.post("/predict", content=form(png((9, 0, 0))), headers=FORM)
        assert again.status_code == 200

    run_with(make_service(queue=3), scenario)


async def drip():
    """A body of which a part comes at once, and no more."""
    yield form(png((1, 2, 3)))[:50]
    await asyncio.sleep(60)


def post(client: httpx.AsyncClient, *colours: int):
    return client.post("/predict", content=form(*[png((colour, 2, 3)) for colour in colours]), headers=FORM)


def test_time_is_up_for_slow_senders(make_service, monkeypatch):
    async def scenario(client):
        slow = await client.post("/predict", content=drip(), headers=FORM)
        assert slow.status_code == 408
        assert "only 50 bytes arrived within 0.2 s" in one_line(slow)

    run_with(make_service(timeout=0.2), scenario)
    monkeypatch.setattr(uploads_module, "PATIENCE", 0.1)
    run_with(make_service(timeout=60, min_rate=500), scenario)


def test_a_body_may_take_as_long_as_its_rate_allows(make_service, monkeypatch):
    monkeypatch.setattr(uploads_module, "PATIENCE", 0.1)
    body = form(png((1, 2, 3)))

    async def scenario(client):
        async def steadily():
            for start in range(0, len(body), 20):
                yield body[start : start + 20]
                await asyncio.sleep(0.05)

        assert (await client.post("/predict", content=steadily(), headers=FORM)).status_code == 200

    run_with(make_service(min_rate=100), scenario)


def test_a_deadline_of_clients_leaves_the_engine_alone(make_service, stand_in):
    async def scenario(client):
        stand_in.hold = asyncio.Event()
        late = await post(client, 1)
        assert late.status_code == 503
        assert "--timeout" in one_line(late)
        stand_in.hold.set()
        assert corners((await post(client, 7)).json()["images"][0])[0] == 7
        assert stand_in.made == 1

    run_with(make_service(timeout=0.3), scenario)


def test_an_engine_that_hangs_is_replaced(make_service, stand_in):
    async def scenario(client):
        stand_in.hold = asyncio.Event()
        stuck = await post(client, 1)
        assert stuck.status_code == 503
        assert "did not answer within 0.3 s" in one_line(stuck)
        stand_in.hold = None
        while stand_in.made == 1 or (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.01)
        assert corners((await post(client, 7)).json()["images"][0])[0] == 7

    run_with(make_service(engine_timeout=0.3), scenario)


def test_who_only_begins_to_send_takes_no_place_in_the_queue(make_service):
    async def scenario(client):
        slow = [asyncio.create_task(client.post("/predict", content=drip(), headers=FORM)) for _ in range(8)]
        await asyncio.sleep(0.1)
        assert (await post(client, 7)).status_code == 200
        for task in slow:
            task.cancel()

    run_with(make_service(queue=2), scenario)


def test_the_bodies_of_all_requests_together_are_bounded(make_service):
    async def scenario(client):
        async def half():
            yield form(png((1, 2, 3)))[:-8] + bytes(600)
            await asyncio.sleep(60)

        slow = asyncio.create_task(client.post("/predict", content=half(), headers=FORM))
        await asyncio.sleep(0.1)
        refused = await client.post("/predict", content=form(bytes(600)), headers=FORM)
        assert refused.status_code == 503
        assert "fill the service" in one_line(refused)
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        assert (await client.post("/predict", content=form(bytes(600)), headers=FORM)).status_code == 422

    run_with(make_service(queue=1, max_bytes=1000), scenario)


def test_who_has_gone_is_not_worked_for(make_service, stand_in):
    """Two images are in the engine when thirty clients give up; one that stays is next."""
    service = make_service()

    async def ask(colour: int, gone: asyncio.Event) -> list[dict]:
        app, sent, body = create_app(service), [], form(png((colour, 0, 0)))
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        headers = [(name.lower().encode(), value.encode()) for name, value in FORM.items()]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/predict",
            "headers": headers,
            "query_string": b"",
        }
        await app(scope, receive, send)
        return sent

    async def run() -> None:
        async with service.open():
            while not service.ready:
                await asyncio.sleep(0.001)
            stand_in.hold, never, gone = asyncio.Event(), asyncio.Event(), asyncio.Event()
            first = [asyncio.create_task(ask(colour, never)) for colour in (1, 2)]
            await asyncio.sleep(0.2)
            leaving = [asyncio.create_task(ask(colour, gone)) for colour in range(100, 130)]
            await asyncio.sleep(0.2)
            gone.set()
            answers = await asyncio.gather(*leaving)
            assert {answer[0]["status"] for answer in answers} == {499}
            last = asyncio.create_task(ask(3, never))
            await asyncio.sleep(0.1)
            stand_in.hold.set()
            answered = await asyncio.gather(*first, last)
            assert [answer[0]["status"] for answer in answered] == [200] * 3

    asyncio.run(asyncio.wait_for(run(), 20))
    assert stand_in.batches == [1, 1, 1]
    assert service.metrics.queue._value.get() == 0


def test_no_image_is_decoded_where_one_of_a_request_is_refused(make_service, stand_in, monkeypatch):
    decoded = []
    monkeypatch.setattr(service_module, "read_square", lambda *given: decoded.append(given))

    async def scenario(client):
        body = form(*[png((1, 2, 3))] * 15, b"no image")
        assert (await client.post("/predict", content=body, headers=FORM)).status_code == 422

    run_with(make_service(), scenario)
    assert decoded == stand_in.batches == []


def test_the_pixels_that_are_being_decoded_at_once_are_bounded(make_service, monkeypatch):
    now, most, real = 0, 0, service_module.read_square

    def read(path, imgsz, content):
        nonlocal now, most
        now += 400
        most = max(most, now)
        time.sleep(0.02)
        try:
            return real(path, imgsz, content)
        finally:
            now -= 400

    monkeypatch.setattr(service_module, "read_square", read)
    monkeypatch.setattr(service_module, "usable_physical_cores", lambda: 8)

    async def scenario(client):
        body = form(png((1, 2, 3), (20, 20)))
        asked = [client.post("/predict", content=body, headers=FORM) for _ in range(12)]
        assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}

    run_with(make_service(max_pixels=800, batch_size=8), scenario)
    assert most == 800


def test_other_kinds_of_images_are_taken_by_choice(make_client):
    client = make_client(formats=("WEBP", "TIFF"))
    for kind in ("WEBP", "TIFF"):
        assert client.post("/predict", content=form(encoded(kind)), headers=FORM).status_code == 200
    assert "WEBP, TIFF" in one_line(client.post("/predict", content=form(png((1, 2, 3))), headers=FORM))


def test_probes(make_client, stand_in):
    client = make_client()
    for path in ("/live", "/ready", "/health", "/metrics"):
        answers = client.get(path), client.head(path)
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[1].content == b""
    health = client.get("/health").json()
    assert (health["engine"], health["licence"], health["production"]) == ("onnxruntime", "MIT", True)


def test_while_the_service_drains_it_still_answers(make_service):
    service = make_service()

    async def scenario(client):
        service.draining = True
        assert (await client.get("/live")).status_code == 200
        for path in ("/ready", "/health"):
            answer = await client.get(path)
            assert (answer.status_code, answer.json()["status"]) == (503, "draining")
        assert (await post(client, 7)).status_code == 200

    run_with(service, scenario)


def test_a_key_is_asked_for(make_service):
    service = make_service()

    async def scenario(_):
        transport = httpx.ASGITransport(create_app(service, api_key="sécret"))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            right = {b"X-API-Key": "sécret".encode()}, {b"Authorization": "bearer sécret".encode()}
            for headers in right:
                kind = {name.encode(): value.encode() for name, value in FORM.items()}
                body = form(png((1, 2, 3)))
                answer = await client.post("/predict", content=body, headers={**kind, **headers})
                assert answer.status_code == 200
            for headers in (
                {},
                {"X-API-Key": "secret"},
                {"Authorization": "Basic x"},
                {"X-API-Key": "long" * 50},
            ):
                for path in ("/predict", "/health", "/metrics", "/docs"):
                    answer = await client.get(path, headers=headers)
                    assert answer.status_code == 401
                    assert answer.headers["WWW-Authenticate"] == "Bearer"
                    assert "X-API-Key" in one_line(answer)
            for path in ("/live", "/ready"):
                assert (await client.get(path)).status_code == 200

    run_with(service, scenario)


def test_requests_have_ids_and_are_logged(make_client, caplog):
    client = make_client()
    with caplog.at_level(logging.INFO, "sparse_exp"):
        given = client.get("/health", headers={"X-Request-ID": "order-7/a"})
        made = client.get("/other" + 300 * "x", headers={"X-Request-ID": "a b"})
    assert given.headers["X-Request-ID"] == "order-7/a"
    assert len(made.headers["X-Request-ID"]) == 32
    first, second = (record.values for record in caplog.records if record.message == "request")
    assert (first["method"], first["path"], first["status"]) == ("GET", "/health", 200)
    assert (len(second["path"]), second["status"]) == (200, 404)


def test_a_flood_of_lines_is_cut():
    def line(second: float) -> logging.LogRecord:
        record = logging.LogRecord("engine", logging.INFO, "", 0, "%d", (1,), None)
        record.created = second
        return record

    sparing = Sparing(2)
    passed = [sparing.filter(line(1.5)) for _ in range(5)]
    assert passed == [True, True, False, False, False]
    last = line(2.1)
    assert sparing.filter(last)
    assert last.getMessage() == "1 (3 lines before it were left out)"


def test_an_engine_that_dies_is_started_again(make_client, stand_in):
    client = make_client()
    stand_in.error = WorkerDied("The process of the engine died (signal 11).")
    answer = client.post("/predict", content=form(png((1, 2, 3))), headers=FORM)
    assert answer.status_code == 503
    assert "signal 11" in one_line(answer)
    assert "Retry-After" in answer.headers
    until(lambda: client.get("/health").status_code == 503)
    assert client.get("/health").json()["status"] == "restarting"
    assert client.post("/predict", content=form(png((1, 2, 3))), headers=FORM).status_code == 503
    stand_in.error = None
    until(lambda: client.get("/health").status_code == 200)
    assert client.post("/predict", content=form(png((1, 2, 3))), headers=FORM).status_code == 200


def test_an_engine_that_never_starts_ends_the_service(make_service, stand_in):
    stand_in.error = EngineError("It cannot run here.")
    service, told = make_service(), []

    async def run() -> None:
        async with service.open(on_failure=lambda: told.append(service.failure)):
            while not told:
                await asyncio.sleep(0.001)

    asyncio.run(run())
    assert told == [stand_in.error]
    assert stand_in.made == 1


def test_metrics_count_what_happened(make_client):
    client = make_client()
    for files in (1, 2, 0):
        body = form(*[png((1, 2, 3))] * files) if files else b"nothing"
        client.post("/predict", content=body, headers=FORM)
    client.get("/secret")
    answer = client.get("/metrics")
    families = text_string_to_metric_families(answer.text)
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }
    assert samples["sparse_exp_requests_total", "/predict", "200"] == 2
    assert samples["sparse_exp_requests_total", "/predict", "400"] == 1
    assert samples["sparse_exp_requests_total", "404", "other"] == 1
    assert samples["sparse_exp_images_total",] == 3
    assert samples["sparse_exp_request_seconds_count",] == 3
    assert samples["sparse_exp_batch_images_sum",] == 3
    assert samples["sparse_exp_engine_seconds_count",] == samples["sparse_exp_batch_images_count",]
    assert samples["sparse_exp_queue_images",] == samples["sparse_exp_requests_in_service",] == 0
    assert not any(name.endswith("_created") for name, *_ in samples)
    assert samples["sparse_exp_model_info", "1.2", "my model", "onnxruntime"] == 1
