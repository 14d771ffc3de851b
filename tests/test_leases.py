"""Leases: who may write where no system ends a lock with its process; judged by the reader's own clock alone."""

import doctest
import functools
import itertools
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cn_clip import leases
from cn_clip.data.storage import LEASE, open_storage
from cn_clip.errors import ConfigError, DataError
from cn_clip.leases import Claim, Lease, LeaseLostError, Sight, held

TTL = 30.0


class Time:
    """A clock that only sleeping moves, and what happens at a time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[tuple[float, object]] = []

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        while self.events and self.events[0][0] <= self.now:
            _, event = self.events.pop(0)
            event()  # type: ignore[operator]


class Sheet:
    """A board in memory; is_away: the store does not answer."""

    def __init__(self, text: str | None = None) -> None:
        self.text, self.is_away = text, False

    def read(self) -> str | None:
        if self.is_away:
            raise DataError("away")
        return self.text

    def write(self, text: str) -> None:
        self.text = text

    def erase(self) -> None:
        self.text = None


def lease(sheet: Sheet, clock: Time) -> Lease:
    return Lease(sheet, "s3://b/f: busy", ttl_s=TTL, clock=lambda: clock.now, sleep=clock.sleep)


def test_the_example_holds() -> None:
    assert doctest.testmod(leases) == (0, 4)


gaps = st.lists(st.floats(0.01, TTL - 0.01), min_size=1, max_size=30)


@given(gaps, st.lists(st.floats(0.01, 3 * TTL), min_size=1, max_size=60), st.floats(-1e6, 1e6))
def test_a_lease_that_is_renewed_in_time_is_never_free_whatever_the_clocks_say(
    renewals: list[float], looks: list[float], offset: float
) -> None:
    times = list(itertools.accumulate(renewals))
    sight, now = Sight(lambda: now + offset), 0.0
    for step in looks:
        now += step
        if now > times[-1]:
            break
        assert not sight.is_free(Claim("a", sum(one <= now for one in times), TTL))


@given(st.lists(st.floats(0.01, TTL), min_size=1, max_size=30), st.floats(-1e6, 1e6))
def test_a_lease_of_a_dead_owner_is_free_once_it_was_seen_for_as_long_as_it_holds(
    looks: list[float], offset: float
) -> None:
    now = 0.0
    sight = Sight(lambda: now + offset)
    sight.is_free(Claim("a", 7, TTL))
    for step in looks:
        now += step
        if abs(now - TTL) > 1e-6 * max(1.0, abs(offset)):  # the clock's own rounding
            assert sight.is_free(Claim("a", 7, TTL)) == (now >= TTL)
    assert not sight.has_risen


@given(st.text(max_size=200))
def test_whatever_lies_there_is_a_claim_that_runs_out(text: str) -> None:
    claim = Claim.of_text(text)
    assert (claim is None) == (not text)
    assert claim is None or 0 < claim.ttl_s < float("inf")


def test_a_claim_reads_back_as_it_was_written() -> None:
    claim = Claim("a", 7, 30.0, "pid 1 on 主机, since 2026-01-31 12:00:00")
    assert Claim.of_text(claim.to_text()) == claim
    assert Claim.of_text(claim.to_text().replace("30.0", "NaN")) not in (claim, None)


def test_the_second_is_refused_once_it_has_seen_the_first_alive() -> None:
    sheet, clock = Sheet(), Time()
    first, told = lease(sheet, clock), list[str]()
    first.take()
    clock.events = [(clock.now + 10, first.renew)]
    with pytest.raises(ConfigError, match=r"^s3://b/f: busy \(pid \d+ on .*, since .*\); wait until it has ended"):
        lease(sheet, clock).take(waiting=told.append)
    assert len(told) == 1
    assert clock.now < 13
    first.confirm()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux says which process is which")
def test_a_process_of_this_machine_that_was_killed_is_not_waited_for() -> None:
    code = (
        "from cn_clip import leases; import os, time; print(leases._process(os.getpid()), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        claim = Claim("a", 7, TTL, "", process.stdout.readline().strip())
        assert Claim.of_text(claim.to_text()) == claim
        assert not Sight().is_free(claim)
        process.kill()
    assert Sight().is_free(claim)
    boot, numbered_by, pid, start = claim.process.split()
    # Of another machine, or of another numbering on this one, nothing is known.
    assert not Sight().is_free(replace(claim, process=f"0{boot} {numbered_by} {pid} {start}"))
    assert not Sight().is_free(replace(claim, process=f"{boot} pid:[1] {pid} {start}"))
    # A number that was given again.
    assert Sight().is_free(replace(claim, process=f"{boot} {numbered_by} {os.getpid()} {start}"))
    assert not Sight().is_free(replace(claim, process=leases._process(os.getpid())))


def test_the_lease_of_one_that_was_killed_is_taken_and_the_one_that_wakes_up_learns_it() -> None:
    sheet, clock = Sheet(), Time()
    first, second = lease(sheet, clock), lease(sheet, clock)
    first.take()
    second.take()
    assert TTL <= clock.now < TTL + 3
    for late in (first.confirm, first.renew):
        with pytest.raises(LeaseLostError, match="since this one did not answer for 30 s"):
            late()
    first.release()  # is no longer its own
    second.confirm()
    second.release()
    assert sheet.text is None


def test_of_two_that_claim_in_the_same_moment_one_has_it() -> None:
    sheet, clock = Sheet(), Time()
    first, second = lease(sheet, clock), lease(sheet, clock)
    clock.events = [(0.1, lambda: sheet.write(second.claim.to_text()))]
    with pytest.raises(ConfigError, match="busy"):
        first.take()
    second.confirm()


def test_a_block_renews_its_lease_over_an_absence_of_the_store_and_gives_it_back() -> None:
    sheet, away = Sheet(), threading.Event()
    with held(Lease(sheet, "busy", ttl_s=0.03)) as one:
        first = one.claim.number
        sheet.is_away = True
        away.wait(0.05)
        sheet.is_away = False
        while one.claim.number <= first + 2:
            time.sleep(0.005)
        one.confirm()
    assert sheet.text is None


# --- folders of object stores


def test_one_process_at_a_time_writes_below_a_folder_of_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SETTLING_S", 0.01)
    monkeypatch.setattr("cn_clip.data.storage.Lease", functools.partial(Lease, ttl_s=2.0))
    folder, told = open_storage("memory://leases/features"), list[str]()
    with folder.alone("another process is extracting into it") as confirm:
        confirm()
        assert folder.list_files() == []  # the claim is hidden
        with (
            pytest.raises(ConfigError, match=r"^memory://leases/features: another process is extracting into it \(pid"),
            folder.alone("another process is extracting into it", waiting=told.append),
        ):
            pass
        assert len(told) == 1
        confirm()
        folder.child(LEASE).write(Claim("other", 1, 30.0, "pid 7 on there").to_text().encode())
        with pytest.raises(LeaseLostError, match=r"extracting into it \(pid 7 on there\), since this one did not"):
            confirm()
    folder.child(LEASE).delete()  # of the other one, which this one has left alone
    with folder.alone("busy"):
        pass
    assert folder.child(LEASE).find() is None
