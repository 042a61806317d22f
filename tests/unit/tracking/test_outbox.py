import json
import logging

from sparse_exp.tracking import Artifact, Metrics, Tags
from sparse_exp.tracking.outbox import Outbox, one_line


class Server:
    def __init__(self):
        self.up, self.got, self.refused, self.seconds, self.attempts = True, [], set(), 0.0, 0

    def send(self, event, milliseconds):
        self.attempts += 1
        if not self.up or id(event) in self.refused:
            self.clock += self.seconds
            raise ConnectionError("no route to\nhost.")
        self.got.append(event)

    clock = 0.0


def steps(*numbers):
    return [Metrics({"loss": 1.0}, number) for number in numbers]


def test_events_arrive_late_but_in_order():
    server = Server()
    outbox = Outbox(server.send)
    first, second, third, fourth = steps(1, 2, 3, 4)
    outbox.put(first)
    server.up = False
    outbox.put(second)
    outbox.put(third)
    assert server.got == [first]
    server.up = True
    outbox.put(fourth)
    assert server.got == [first, second, third, fourth]


def test_an_event_that_is_always_refused_holds_up_no_other(tmp_path):
    server = Server()
    outbox = Outbox(server.send)
    bad, good = steps(1, 2)
    server.refused = {id(bad)}
    outbox.put(bad)
    outbox.put(good)
    assert server.got == [good]
    assert outbox.write_unsent(tmp_path / "unsent") == 1


def test_a_slow_failure_ends_the_pass_and_holds_back_the_next(monkeypatch):
    server = Server()
    monkeypatch.setattr("sparse_exp.tracking.outbox.time.monotonic", lambda: server.clock)
    outbox = Outbox(server.send)
    server.up, server.seconds = False, 3.0
    for event in steps(1, 2, 3):
        outbox.put(event)
    assert server.attempts == 1  # 2 and 3 came within thirty seconds of the failure
    server.clock += 30
    outbox.put(*steps(4))
    assert server.attempts == 2
    outbox.flush(patience=7.0)
    assert server.attempts == 5  # three failures of three seconds


def test_each_kind_is_warned_of_once_in_one_line(caplog):
    server = Server()
    server.up = False
    outbox = Outbox(server.send)
    with caplog.at_level(logging.WARNING):
        for event in [*steps(1, 2), Tags({"a": "b"})]:
            outbox.put(event)
    assert ["metrics" in record.message for record in caplog.records] == [True, False]
    assert all("no route to host" in r.message and "\n" not in r.message for r in caplog.records)


def test_unsent_events_can_be_read_back(tmp_path):
    server = Server()
    server.up = False
    outbox = Outbox(server.send)
    outbox.put(Metrics({"val/map50": 0.5}, 3))
    outbox.put(Artifact(tmp_path / "ü.md", "report"))
    path = tmp_path / "new" / "unsent.jsonl"
    assert outbox.write_unsent(path) == 2
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert first.pop("time_ms") > 1.7e12
    assert first == {"event": "metrics", "values": {"val/map50": 0.5}, "step": 3}
    assert (second["event"], second["path"], second["folder"]) == (
        "artifact",
        str(tmp_path / "ü.md"),
        "report",
    )


def test_no_file_is_written_when_all_was_sent(tmp_path):
    outbox = Outbox(Server().send)
    outbox.put(Tags({}))
    assert outbox.write_unsent(tmp_path / "unsent") == 0
    assert list(tmp_path.iterdir()) == []


def test_passwords_are_not_repeated():
    error = ConnectionError("http://me:secret@host:5000/api refused\nthe connection.")
    assert one_line(error) == "http://***@host:5000/api refused the connection"
    assert one_line(ConnectionError()) == "ConnectionError"
