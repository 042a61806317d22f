import logging

import pytest

from sparse_exp.tracking import Metrics, Tags
from sparse_exp.tracking.delivery import Delivery, Sent
from sparse_exp.tracking.messages import one_line


class Server:
    def __init__(self):
        self.up, self.got, self.refused, self.seconds, self.attempts = True, [], set(), 0.0, 0

    def send(self, event, milliseconds):
        self.attempts += 1
        if not self.up or id(event) in self.refused:
            self.clock += self.seconds
            raise ConnectionError("no route to\nhost.")
        self.got.append((event, milliseconds))

    clock = 0.0


def steps(*numbers):
    return [Metrics({"loss": 1.0}, number) for number in numbers]


def test_an_event_is_sent_with_the_time_at_which_it_happened():
    server = Server()
    delivery = Delivery(server.send)
    (event,) = steps(1)
    delivery.put(event, 12.3456)
    assert server.got == [(event, 12346)]
    assert not delivery.missed


def test_what_was_missed_is_sent_again_with_all_that_was_told_in_order_and_with_its_times():
    server = Server()
    delivery = Delivery(server.send)
    told = [(event, float(number)) for number, event in enumerate(steps(1, 2, 3))]
    delivery.put(*told[0])
    server.up = False
    delivery.put(*told[1])
    assert delivery.missed
    server.up = True
    assert delivery.send_again(told, 1.0) == Sent(3, 0)
    assert server.got == [(told[0][0], 0), *((event, round(1000 * at)) for event, at in told)]
    assert not delivery.missed


def test_an_event_that_is_always_refused_holds_up_no_other():
    server = Server()
    delivery = Delivery(server.send)
    bad, good = steps(1, 2)
    server.refused = {id(bad)}
    delivery.put(bad, 1.0)
    delivery.put(good, 2.0)
    assert server.got == [(good, 2000)]
    assert delivery.send_again([(bad, 1.0), (good, 2.0)], 1.0) == Sent(1, 1, "no route to host")
    assert delivery.missed


def test_a_slow_failure_ends_the_pass_and_holds_back_the_next(monkeypatch):
    server = Server()
    monkeypatch.setattr("sparse_exp.tracking.delivery.time.monotonic", lambda: server.clock)
    delivery = Delivery(server.send)
    server.up, server.seconds = False, 3.0
    for event in steps(1, 2, 3):
        delivery.put(event, 0.0)
    assert server.attempts == 1  # 2 and 3 came within thirty seconds of the failure
    server.clock += 30
    delivery.put(*steps(4), 0.0)
    assert server.attempts == 2
    again = delivery.send_again([(event, 0.0) for event in steps(1, 2, 3, 4)], patience=7.0)
    assert server.attempts == 5  # three failures of three seconds
    assert (again.sent, again.left) == (0, 4)


def test_each_kind_is_warned_of_once_in_one_line(caplog):
    server = Server()
    server.up = False
    delivery = Delivery(server.send)
    with caplog.at_level(logging.WARNING):
        for event in [*steps(1, 2), Tags({"a": "b"})]:
            delivery._not_before = 0.0
            delivery.put(event, 0.0)
    assert ["metrics" in record.message for record in caplog.records] == [True, False]
    assert all("no route to host" in r.message and "\n" not in r.message for r in caplog.records)


@pytest.mark.parametrize("missed", [False, True])
def test_what_an_earlier_start_missed_is_known_from_the_beginning(missed):
    assert Delivery(Server().send, missed=missed).missed is missed


def test_passwords_are_not_repeated():
    error = ConnectionError("http://me:secret@host:5000/api refused\nthe connection.")
    assert one_line(error) == "http://***@host:5000/api refused the connection"
    assert one_line(ConnectionError()) == "ConnectionError"
