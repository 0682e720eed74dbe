"""A process is told dead from alive, and a lease from an expired one."""

from __future__ import annotations

import subprocess
import sys

import psutil

from lorasweep.search.lease import LEASE_SECONDS, Lease, Owner


def test_this_process_lives():
    assert not Owner.current().is_dead


def test_a_process_that_ended_is_dead_even_before_its_parent_notices():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = Owner(Owner.current().host, child.pid, _start_of(child.pid))
    assert not owner.is_dead
    child.stdin.close()
    while psutil.pid_exists(child.pid) and psutil.Process(child.pid).status() != "zombie":
        pass  # it is ending
    assert owner.is_dead
    child.wait()
    assert owner.is_dead


def _start_of(pid: int) -> float:
    return psutil.Process(pid).create_time()


def test_a_later_process_with_the_same_id_is_another_one():
    here = Owner.current()
    assert Owner(here.host, here.pid, here.started - 60).is_dead


def test_a_process_of_another_machine_is_believed_until_its_lease_ends():
    lease = Lease.until(Owner("elsewhere", 1, 0.0), now=100.0)
    assert lease.why_over(100.0 + LEASE_SECONDS) == ""
    assert "elsewhere" in lease.why_over(101.0 + LEASE_SECONDS)


def test_a_lease_survives_storage():
    lease = Lease.until(Owner.current(), now=5.0)
    assert Lease.from_json(lease.to_json()) == lease
    assert Lease.from_json(None).why_over(1.0)


def test_a_lease_is_renewed_rarely_and_in_time():
    lease = Lease.until(Owner.current(), now=0.0)
    assert not lease.is_worth_renewing(0.1 * LEASE_SECONDS)
    assert lease.is_worth_renewing(0.5 * LEASE_SECONDS)
