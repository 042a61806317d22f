import logging

import pytest

from sparse_exp.tracking import Metrics, Tags
from sparse_exp.tracking.outbox import Outbox, one_line
from sparse_exp.tracking.spool import Destination, Spool


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


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path, Destination("http://server", "id"))


def steps(*numbers):
    return [Metrics({"loss": 1.0}, number) for number in numbers]


def test_events_arrive_late_but_in_order(spool):
    server = Server()
    outbox = Outbox(server.send, spool)
    first, second, third, fourth = steps(1, 2, 3, 4)
    outbox.put(first)
    server.up = False
    outbox.put(second)
    outbox.put(third)
    assert server.got == [first]
    server.up = True
    outbox.put(fourth)
    assert server.got == [first, second, third, fourth]


def test_an_event_that_is_always_refused_holds_up_no_other(spool):
    server = Server()
    outbox = Outbox(server.send, spool)
    bad, good = steps(1, 2)
    server.refused = {id(bad)}
    outbox.put(bad)
    outbox.put(good)
    assert server.got == [good]
    assert outbox.waiting == 1
    assert [waiting.event for waiting in spool.read()] == [bad]


def test_a_slow_failure_ends_the_pass_and_holds_back_the_next(spool, monkeypatch):
    server = Server()
    monkeypatch.setattr("sparse_exp.tracking.outbox.time.monotonic", lambda: server.clock)
    outbox = Outbox(server.send, spool)
    server.up, server.seconds = False, 3.0
    for event in steps(1, 2, 3):
        outbox.put(event)
    assert server.attempts == 1  # 2 and 3 came within thirty seconds of the failure
    server.clock += 30
    outbox.put(*steps(4))
    assert server.attempts == 2
    outbox.flush(patience=7.0)
    assert server.attempts == 5  # three failures of three seconds


def test_each_kind_is_warned_of_once_in_one_line(spool, caplog):
    server = Server()
    server.up = False
    outbox = Outbox(server.send, spool)
    with caplog.at_level(logging.WARNING):
        for event in [*steps(1, 2), Tags({"a": "b"})]:
            outbox.put(event)
    assert ["metrics" in record.message for record in caplog.records] == [True, False]
    assert all("no route to host" in r.message and "\n" not in r.message for r in caplog.records)


def test_an_event_is_on_disk_before_it_is_sent_and_leaves_once_it_was(spool):
    seen = []
    outbox = Outbox(lambda event, _: seen.append([waiting.event for waiting in spool.read()]), spool)
    (event,) = steps(1)
    outbox.put(event)
    assert seen == [[event]]
    assert not spool.path.exists()


def test_a_kill_in_an_outage_loses_nothing_and_the_next_process_sends_it_in_order(spool, tmp_path):
    server, events = Server(), steps(1, 2, 3)
    server.up = False
    for event in events:
        Outbox(server.send, spool).put(event)  # each of them as if the one before had been killed
    server.up = True
    Outbox(server.send, spool).put(*steps(4))
    assert [event.step for event in server.got] == [1, 2, 3, 4]
    assert not spool.path.exists()


def test_a_disk_that_is_full_is_warned_of_once_and_the_event_is_sent_all_the_same(spool, caplog, monkeypatch):
    monkeypatch.setattr(spool, "append", full_disk)
    monkeypatch.setattr(spool, "replace", full_disk)
    server = Server()
    outbox = Outbox(server.send, spool)
    with caplog.at_level(logging.WARNING):
        for event in steps(1, 2):
            outbox.put(event)
    assert [event.step for event in server.got] == [1, 2]
    assert ["No space left" in record.getMessage() for record in caplog.records] == [True]


def full_disk(_):
    raise OSError(28, "No space left on device")


def test_passwords_are_not_repeated():
    error = ConnectionError("http://me:secret@host:5000/api refused\nthe connection.")
    assert one_line(error) == "http://***@host:5000/api refused the connection"
    assert one_line(ConnectionError()) == "ConnectionError"
