"""Test fair queueing: what two users get while both wait, whatever one floods or is preempted."""

from __future__ import annotations

import random
from collections import Counter
from itertools import count
from typing import Any

import pytest

from quire.engine.config import SchedulingPolicy
from quire.engine.outputs import SequenceOutput
from quire.engine.scheduling import fair_queue
from quire.engine.scheduling.fair_queue import OUTPUT_WEIGHT, PROMPT_WEIGHT, FairQueue
from quire.engine.scheduling.request_table import RequestTable

from ..harness import Harness, make_request

_ids = count()


class Users(Harness):
    """A harness that counts each user's service from the outputs, independently of the queue."""

    def __init__(self, policy: SchedulingPolicy = "fair", **fields: Any) -> None:
        super().__init__(policy=policy, **fields)
        self.user_of: dict[str, str] = {}
        self.prompts: dict[str, int] = {}
        self.service: Counter[str] = Counter()
        self.done: list[str] = []
        """Users of the requests that have ended, in order."""

    def ask(self, user: str, num_prompt: int, max_tokens: int, **fields: Any) -> str:
        prompt = [next(_ids) % 4000 + 100 for _ in range(num_prompt)]
        request = self.add(prompt, max_tokens, user=user, **fields)
        self.user_of[request.request_id] = user
        self.prompts[request.request_id] = num_prompt
        return request.request_id

    def step(self) -> list[SequenceOutput]:
        self.time += 1.0
        waiting = set(self.prompts) & {s.request.request_id for s in self.sequences_waiting()}
        outputs = super().step()
        for request_id in waiting - {s.request.request_id for s in self.sequences_waiting()}:
            self.service[self.user_of[request_id]] += PROMPT_WEIGHT * self.prompts.pop(request_id)
        for output in outputs:
            user = self.user_of[output.request_id]
            self.service[user] += OUTPUT_WEIGHT * len(output.token_ids)
            if output.finish_reason is not None:
                self.done.append(user)
        return outputs

    def sequences_waiting(self) -> list[Any]:
        table = self.scheduler.requests._sequences.values()
        return [s for sequences in table for s in sequences if s in self.scheduler.waiting]

    def users_waiting(self) -> set[str]:
        return {self.user_of[s.request.request_id] for s in self.sequences_waiting()}


def flood(policy: SchedulingPolicy, **fields: Any) -> Users:
    """User a sends 100 requests, and user b sends 5 a little later."""
    users = Users(policy, max_num_seqs=4, **fields)
    for _ in range(100):
        users.ask("a", 20, 8)
    for _ in range(10):
        users.step()
    for _ in range(5):
        users.ask("b", 20, 8)
    users.run()
    users.assert_all_free()
    return users


def test_a_user_who_floods_does_not_starve_another() -> None:
    in_order = flood("fcfs").done
    assert in_order.index("b") == 100
    fair = flood("fair").done
    assert sorted(fair) == sorted(in_order)
    last_b = len(fair) - fair[::-1].index("b") - 1
    assert last_b < 20  # of 105: while b waits, one of two is b's


def test_free_capacity_is_used() -> None:
    steps = {}
    for policy in ("fcfs", "fair"):
        users = Users(policy, max_num_seqs=4)
        for _ in range(40):
            users.ask("a", 20, 8)
        users.run()
        steps[policy] = users.time
    assert steps["fair"] == steps["fcfs"]


@pytest.mark.parametrize("policy", ["fair", "fcfs"])
@pytest.mark.parametrize("seed", range(6))
def test_the_difference_in_service_is_bounded_while_both_wait(
    policy: SchedulingPolicy, seed: int
) -> None:
    rng = random.Random(seed)
    max_num_seqs, longest_prompt, longest_output = 4, 40, 16
    users = Users(policy, max_num_seqs=max_num_seqs, num_blocks=200, prefix_caching=False)
    for _ in range(150):
        users.ask("a", rng.randint(1, longest_prompt), rng.randint(1, longest_output))
    for _ in range(rng.randint(1, 30)):
        users.step()
    for _ in range(80):  # of other lengths
        users.ask("b", rng.randint(1, longest_prompt), rng.randint(8, longest_output))
    begin = users.service["b"] - users.service["a"]
    differences = []
    while users.users_waiting() == {"a", "b"}:
        users.step()
        differences.append(abs(users.service["b"] - users.service["a"] - begin))
    assert len(differences) > 100
    # Theorem 4.4: 2 · max(weight · longest prompt, weight · tokens of a batch).
    batch = max_num_seqs * (longest_prompt + longest_output)
    bound = 2 * max(PROMPT_WEIGHT * longest_prompt, OUTPUT_WEIGHT * batch)
    assert (max(differences) <= bound) == (policy == "fair")
    users.run()
    users.assert_all_free()


def test_no_user_earns_credit_while_idle() -> None:
    users = Users(max_num_seqs=2)
    users.ask("b", 10, 2)
    users.run()
    for _ in range(60):
        users.ask("a", 10, 8)
    for _ in range(60):
        users.step()
    away = users.service["a"] - users.service["b"]
    assert away > 200
    for _ in range(30):
        users.ask("b", 10, 8)
    begin = Counter(users.service)
    for _ in range(60):
        users.step()
    got = {user: users.service[user] - begin[user] for user in "ab"}
    assert users.users_waiting() == {"a", "b"}
    assert abs(got["a"] - got["b"]) < away / 3
    users.run()


def test_several_users_get_equal_service() -> None:
    users = Users(max_num_seqs=6, num_blocks=200)
    for index, user in enumerate("abcd"):
        for _ in range(60 // (index + 1)):
            users.ask(user, 10, 4 * (index + 1))
    for _ in range(60):
        users.step()
    assert users.users_waiting() == set("abcd")
    assert max(users.service.values()) < 1.3 * min(users.service.values())
    users.run()
    users.assert_all_free()


def test_the_most_served_user_is_preempted_if_blocks_run_out() -> None:
    """User b comes last, so by order of arrival b would be preempted again and again."""
    preempted = {}
    for policy in ("fcfs", "fair"):
        users = Users(policy, num_blocks=24, max_num_seqs=16, prefix_caching=False)
        for _ in range(10):
            users.ask("a", 16, 60)
        for _ in range(12):
            users.step()
        users.ask("b", 16, 60)
        of_b = [s for s in users.sequences_waiting() if s.request.user == "b"]
        of_b += [s for s in users.scheduler.running if s.request.user == "b"]
        users.run()
        assert users.scheduler.stats().preemptions > 0
        preempted[policy] = of_b[0].num_preemptions
        if policy == "fair":
            assert users.done.index("b") < 6
    assert preempted["fair"] == 0 < preempted["fcfs"]


def test_prompt_tokens_from_the_cache_cost_nothing() -> None:
    harness = Harness(policy="fair")
    prompt = list(range(100, 148))
    for user in ("a", "b"):
        harness.add(prompt, 1, user=user)
        harness.run()
    queue = harness.scheduler.waiting
    assert isinstance(queue, FairQueue)
    assert queue._accounts["a"].service == 48 * PROMPT_WEIGHT + OUTPUT_WEIGHT
    # lifted to a's when it came; all but the last token were found
    of_a, of_b = (queue._accounts[user].service for user in ("a", "b"))
    assert of_b == of_a + PROMPT_WEIGHT + OUTPUT_WEIGHT


def test_counters_of_users_who_left_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_queue, "MAX_USERS", 10)
    users = Users(max_num_seqs=2)
    users.ask("kept", 4, 40)
    for number in range(100):
        users.ask(f"u{number}", 4, 1)
        users.ask("kept", 4, 1)
        users.step()
    users.run()
    queue = users.scheduler.waiting
    assert isinstance(queue, FairQueue) and len(queue._accounts) <= 10
    assert queue._accounts["kept"].service > 0


def test_order_within_a_user_and_removal() -> None:
    queue, table = FairQueue(), RequestTable((), None)
    [a1], [a2], [b1], [none] = (
        table.add(make_request([5], user=user), 0) for user in ("a", "a", "b", None)
    )
    for sequence in (a2, a1, b1, none):
        queue.push(sequence)
    assert len(queue) == 4 and all(sequence in queue for sequence in (a1, a2, b1, none))
    assert queue.peek() is a1
    queue.charge_prompt(a1)
    assert queue.peek() is b1
    queue.remove(b1)
    assert b1 not in queue and queue.pop() is none and queue.pop() is a1 and queue.pop() is a2
    assert not queue


def test_many_users_of_one_key_do_not_starve_another_key() -> None:
    users = Users(max_num_seqs=4)
    for number in range(50):
        users.ask(f"one:u{number}", 20, 8)
        users.ask(f"one:u{number}", 20, 8)
    for _ in range(10):
        users.step()
    for _ in range(5):
        users.ask("two:", 20, 8)
    users.run()
    # From its arrival on, the other key gets every second turn.
    assert max(index for index, user in enumerate(users.done) if user == "two:") < 25
    # The users of the first key are fair to each other.
    ones = [user for user in users.done if user != "two:"]
    assert len(set(ones[:45])) == 45
    users.assert_all_free()
