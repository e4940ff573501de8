"""A driver of a run by a clock that tests set: it tells a ledger what happens, and when."""

from helpers import tiny_config

from raybert.entry import FINISHED
from raybert.events import Event
from raybert.ledger import Ledger

G = 32  # of tiny_config


class Driver:
    """A ledger and its clock, which tells the events of a driver at their times."""

    def __init__(self, run, now_s=1000.0, number=0):
        self.now_s, self.number, self.warnings = now_s, number, []
        config = tiny_config(run.uri, "")
        self.ledger = Ledger(run, config, self.warnings.append, lambda: self.now_s)

    def at(self, now_s):
        self.now_s = now_s
        return self

    def begin(self, world_size, step=0, **more):
        self.number += 1
        self.ledger.show(Event("attempt", step, "", {"number": self.number, "world_size": world_size, **more}))

    def train(self, step, seconds_a_step, data_wait=0.0, attempt=None):
        metrics = {"samples_per_s": G / seconds_a_step, "data_wait": data_wait}
        self.ledger.show(Event("train", step, metrics=metrics, attempt=attempt or self.number))

    def checkpoint(self, step, attempt=None):
        self.ledger.show(Event("checkpoint", step, f"step-{step}", attempt=attempt or self.number))


def a_driver(run):
    """Two workers reach step 10 of a checkpoint at 8, one dies; one worker goes on to 20."""
    driver = Driver(run)
    driver.at(1010).begin(2)
    driver.at(1025).train(5, 2.0)  # first step at 1015
    driver.at(1035).train(10, 2.0)
    driver.at(1036).checkpoint(8)
    driver.at(1040).ledger.show(Event("failure", text="a worker died"))
    driver.at(1060).begin(1, 8)
    driver.at(1110).train(18, 4.0)  # first step at 1070
    driver.at(1118).train(20, 4.0)
    driver.at(1119).checkpoint(20)
    driver.at(1120).ledger.end(FINISHED)
    return driver
