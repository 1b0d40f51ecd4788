"""Rewards, action sets, exploration, the speed curriculum, opponents and diagnostics."""

import dataclasses
import json
import math
import threading

import numpy as np
import pytest
import torch
from conftest import in_process, run

import ppo_tuxkart
from ppo_tuxkart import ACTIONS, REWARDS, Moment, TuxKartEnv

WIDTH = 10.0


def at(offset, **values):
    return Moment(0.0, 0.15, offset=offset, width=WIDTH, **values)


def test_centerline_and_borders_at_every_threshold():
    for share, reward in ((0.1, 1.0), (0.25, 0.5), (0.5, 0.1)):
        for side in (-1, 1):
            assert REWARDS["centerline"](at(side * share * WIDTH)) == reward
            assert REWARDS["centerline"](at(side * (share * WIDTH + 1e-6))) < reward
    assert REWARDS["centerline"](at(5.1)) == 1e-3
    assert REWARDS["borders"](at(4.9499)) == REWARDS["borders"](at(-4.9499)) == 1.0
    assert REWARDS["borders"](at(4.9501)) == REWARDS["borders"](at(-4.9501)) == 1e-3


def test_zigzag_heading_and_speed_at_every_threshold():
    assert REWARDS["zigzag"](at(0.0, steering=15.0)) == 1.0
    assert REWARDS["zigzag"](at(0.0, steering=-15.1)) == 0.8
    assert REWARDS["zigzag"](at(2.0, steering=30.0)) == 0.5 * 0.8
    assert REWARDS["heading"](at(0.0, heading=-10.0)) == 1.0
    assert REWARDS["heading"](at(0.0, heading=10.1)) == 0.5
    assert REWARDS["speed"](at(0.0, speed=0.25)) == 1.0
    assert REWARDS["speed"](at(0.0, speed=0.249)) == 0.5
    assert REWARDS["speed"](at(5.1, speed=1.0)) == 1e-3


def test_ec418_pays_neither_for_standing_nor_far_from_the_middle():
    assert REWARDS["ec418"](Moment(2.0, 0.15, offset=5.9)) == 0.1 * 2.0
    assert REWARDS["ec418"](Moment(2.0, 0.15, offset=6.0)) == REWARDS["ec418"](Moment(0.0, 0.15)) == 0.0
    assert REWARDS["ec418"](Moment(-2.0, 0.15)) == 0.0


def test_tuxkart_pays_for_what_begins():
    reward = REWARDS["tuxkart"]
    assert reward(Moment(2.0, 0.15)) == 2.0
    assert reward(Moment(0.0, 0.15, finished=True)) == 10.0
    assert reward(Moment(0.0, 0.15, places=-2)) == -10.0
    prices = {"powerup": 3, "use": 1, "nitro": 3, "drift": 3, "jump": -3, "rescue": -5}
    for event, price in prices.items():
        assert reward(Moment(0.0, 0.15, events=(event,))) == price
    assert reward(Moment(1.0, 0.15, events=tuple(prices))) == 1.0 + sum(prices.values())


def test_a_weighted_sum_by_name():
    assert ppo_tuxkart.parse_reward(("progress", "zigzag:0.1")) == {"progress": 1.0, "zigzag": 0.1}
    for part, hint in (("zigzg:1", "zigzag"), ("zigzag:much", "zigzag:0.5")):
        with pytest.raises(ppo_tuxkart.UsageError, match=hint):
            ppo_tuxkart.parse_reward((part,))


SPEEDS = (8.0, 16.0, 24.0)


@pytest.mark.parametrize("name", ACTIONS)
def test_no_two_choices_are_the_same(name):
    sizes = ppo_tuxkart.action_sizes(name, SPEEDS)
    choices = [ACTIONS[name][1](choice, 4.0, SPEEDS) for choice in np.ndindex(*sizes.values())]
    assert len(set(choices)) == len(choices) == math.prod(sizes.values())
    steer = [controls.steer for controls in choices]
    assert sum(steer) == 0 and min(steer) == -1 and max(steer) == 1


def test_action_sets_have_the_sizes_of_their_sources():
    sizes = {name: sum(ppo_tuxkart.action_sizes(name, SPEEDS).values()) for name in ACTIONS}
    assert sizes == {"drive": 12, "ec418": 16, "tuxkart": 13, "tuxkart_rescue": 15, "deepracer": 21}


def test_deepracer_keeps_order_when_its_speeds_are_raised():
    controls = ACTIONS["deepracer"][1]
    for choice in range(21):
        slow, fast = controls([choice], 10.0, SPEEDS), controls([choice], 10.0, (10.0, 18.0, 30.0))
        assert slow.steer == fast.steer and slow.acceleration <= fast.acceleration
    assert [round(30 * controls([3 * i], 0.0, SPEEDS).steer) for i in range(7)] == [-30, -20, -10, 0, 10, 20, 30]


def test_the_governor():
    assert ppo_tuxkart.govern(10.0, 0.0) == (1.0, False)
    assert ppo_tuxkart.govern(10.0, 9.0) == (0.5, False)
    assert ppo_tuxkart.govern(10.0, 12.0) == (0.0, False)
    assert ppo_tuxkart.govern(10.0, 12.1) == (0.0, True)


@pytest.mark.parametrize("epsilon", [0.3, 1.0])
def test_epsilon_mixture_is_what_is_sampled(epsilon):
    torch.manual_seed(0)
    logits, nvec, rows = torch.randn(1, 5), [3, 2], 60_000
    actions = ppo_tuxkart.choose_actions(logits.expand(rows, -1), nvec, epsilon=epsilon)
    pure = torch.outer(logits[0, :3].softmax(0), logits[0, 3:].softmax(0))
    expected = (1 - epsilon) * pure + epsilon / 6
    counts = torch.zeros(3, 2).index_put_(tuple(actions.T), torch.ones(rows), accumulate=True)
    torch.testing.assert_close(counts / rows, expected, atol=0.01, rtol=0)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(2))
    logprobs, _ = ppo_tuxkart.evaluate_actions(logits.expand(6, -1), pairs, nvec, epsilon)
    torch.testing.assert_close(logprobs.exp().view(3, 2), expected)


def test_the_speed_curriculum():
    lesson = {"cap": 8.0, "passed": None, "increment": 2.0}
    assert ppo_tuxkart.next_lesson(lesson, False) == lesson
    lesson = ppo_tuxkart.next_lesson(lesson, True)
    assert lesson == {"cap": 10.0, "passed": 8.0, "increment": 2.0}
    lesson = ppo_tuxkart.next_lesson(lesson, False)
    assert lesson == {"cap": 9.0, "passed": 8.0, "increment": 1.0}
    for _ in range(5):
        lesson = ppo_tuxkart.next_lesson(lesson, False)
    assert lesson == {"cap": 8.25, "passed": 8.0, "increment": 0.25}


def test_diagnostics():
    low, high = ppo_tuxkart.wilson_interval(20, 20)
    assert (round(low, 4), round(high, 4)) == (0.8389, 1.0)  # by R's binom.confint(20, 20, methods = "wilson")
    laps = np.linspace(50, 60, 12)
    assert ppo_tuxkart.lap_correlation([(-lap, lap) for lap in laps]) == pytest.approx(-1)
    assert ppo_tuxkart.lap_correlation([(lap, lap) for lap in laps] + [(9.0, float("nan"))]) == pytest.approx(1)
    assert ppo_tuxkart.lap_correlation([(lap, lap) for lap in laps[:9]]) is None
    assert ppo_tuxkart.lap_correlation([(1.0, 50.0)] * 20) is None
    noise = np.random.default_rng(0).standard_normal((2, 100))
    assert ppo_tuxkart.lap_correlation(noise.T.tolist()) is None  # as chance has it
    assert ppo_tuxkart.lap_correlation((noise[0] + 0.5 * noise).T.tolist()) > 0.2


def test_a_track_that_is_never_finished_leaves_no_median():
    rest = {"position": 1, "return": 0.0, "progress": 0.5, "off_track_seconds": 0.0, "end": ""}
    race = [rest | {"track": track, "lap_time": lap, "finished": True} for track, lap in (("a", 20.0), ("b", 50.0))]
    both, one = (
        ppo_tuxkart.summarize(race * 2),
        ppo_tuxkart.summarize(race[:1] * 2 + [race[1] | {"finished": False}] * 2),
    )
    assert both["median"] == both["best"] == 35.0 and one["median"] is None and one["lap_times"] == [20.0, 20.0]
    rates = both | {"finished": 2}
    assert ppo_tuxkart.score(rates) > ppo_tuxkart.score(one)  # as many races, on both


def test_the_map_shows_the_road_and_where_it_ended():
    """A straight road of 100 m, driven to its middle ever faster: gray, from blue to red, and a black cross there."""
    nodes = [[[0, 0, 0], [0, 0, 100]], [[0, 0, 100], [0, 0, 101]]]
    geometry = ppo_tuxkart.TrackGeometry(nodes, [20.0, 20.0], [[0, 100], [100, 101]], 101.0)
    race = {"trail": [(t, 0.0, 0.0, 5.0 * t, 2.0 * t) for t in range(11)], "finished": False}
    picture = ppo_tuxkart.draw_map(geometry, [race], size=281)[::-1]  # 2 pixels a metre, from 20 m before the start
    assert picture.shape == (281, 281, 3) and picture.dtype == np.uint8
    assert picture[40 + 120, 40 + 10].tolist() == [210] * 3 and picture[40 + 120, 40 + 30].tolist() == [255] * 3
    slow, fast = picture[40 + 12, 40].tolist(), picture[40 + 88, 40].tolist()
    assert slow[2] > slow[0] and fast[0] > fast[2]
    assert picture[40 + 100, 40].tolist() == [0, 0, 0]
    shares = ppo_tuxkart.action_shares([[0, 1], [2, 1], [2, 1], [2, 1]], {"steer": 3, "drift": 2})
    assert shares == {"steer": [0.25, 0.0, 0.75], "drift": [0.0, 1.0]}


def drifts(engine):
    """How often a drift is paid for: held; tapped; held a little more than a second with a decision between, which the
    game gives no second boost for; and let go for six. Runs the game."""
    REWARDS["tuxkart"] = lambda moment: float("drift" in moment.events)
    env, paid = TuxKartEnv(engine=engine, reward=("tuxkart",)), []
    for pattern in ([1] * 20, [1, 0] * 10, [*[1] * 7, 0, *[1] * 7], [*[1] * 8, *[0] * 6, *[1] * 8]):
        env.reset(seed=0)
        while env._speed <= 1.2 * ppo_tuxkart.BOOST_SPEED:
            env.step([2, 0, 0, 0])
        paid.append(sum(env.step([2, 0, drift, 0])[1] for drift in pattern))
    env.close()
    return paid


def test_a_drift_pays_when_it_earns_a_boost(engine):
    assert in_process(drifts, engine) == [1, 0, 1, 2]


def drive_school(engine, actions, choice, steps, settings):
    """Drives one choice for some steps. Returns speeds, rewards, the last info and the number of karts."""
    env = TuxKartEnv(engine=engine, actions=actions, **settings)
    env.reset(seed=0)
    speeds, rewards, info = [], [], {}
    for _ in range(steps):
        _, reward, terminated, truncated, info = env.step(choice)
        speeds.append(env._speed)
        rewards.append(reward)
        if terminated or truncated:
            break
    karts, position = len(env._world.karts), env.position
    env.close()
    return np.array(speeds), np.array(rewards), info, karts, position


def drive_all(engine, cases):
    return [drive_school(engine, *case) for case in cases]


def test_a_cap_and_deepracer_speeds_hold_on_the_game(engine):
    straight = 3 * 3  # no angle, the first of three speeds
    cases = [("drive", [2, 0, 0, 0], 17, {"speed_cap": 6.0})]
    cases += [("deepracer", [straight + pace], 17, {}) for pace in (0, 2)]
    (capped, *_), (slow, *_), (fast, *_) = in_process(drive_all, engine, cases)
    assert 5.0 < capped[-5:].mean() < 6.5
    assert 7.0 < slow[-5:].mean() < 8.5 < 12.0 < fast.max()


def test_every_action_set_drives_and_every_reward_pays(engine):
    choices = {"ec418": [2], "tuxkart": [1, 0, 1, 0, 0, 0], "tuxkart_rescue": [1, 0, 1, 0, 0, 0, 0], "deepracer": [11]}
    settings = {"reward": tuple(f"{name}:0.5" for name in REWARDS), "max_seconds": 2.0}
    for speeds, rewards, info, *_ in in_process(drive_all, engine, [(*pair, 40, settings) for pair in choices.items()]):
        assert speeds[-1] > 5.0 and info["end"] == "time limit"
        parts = {name: info[f"reward/{name}"] for name in REWARDS}
        assert sum(parts.values()) == pytest.approx(rewards.sum()) == pytest.approx(info["return"])
        assert all(part > 0 for part in parts.values())


def test_opponents_overtake_a_kart_that_waits(engine):
    settings = {"num_karts": 4, "max_seconds": 6.0, "reward": ("progress", "tuxkart")}
    _, _, info, karts, _ = in_process(drive_school, engine, "drive", [2, 1, 0, 0], 60, settings)
    assert karts == 4 and info["position"] == 4


SMALL = ("--num-envs", 2, "--num-steps", 16, "--num-minibatches", 2, "--total-timesteps", 64, "--eval-episodes", 2)


def test_a_lesson_under_the_cap_and_what_does_not_fit_is_refused(tmp_path):
    school = ("--actions", "deepracer", "--reward", "centerline:0.1", "progress", "--epsilon", 0.2)
    cap = ("--speed-cap", 8, "--speed-curriculum", 2, "--eval-interval", 1, "--max-seconds", 2, "--random-start", 0)
    result = run(*SMALL, *school, *cap, "--name", "lesson", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs/lesson/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["charts/speed_cap"] == 8 and rows[-1]["losses/ratio_error"] < 1e-6
    assert {"charts/reward/centerline", "charts/reward/progress"} <= rows[-1].keys()
    start = ("--init-from", "runs/lesson/last.pt", "--name", "other")
    refused = run(*SMALL, *start, cwd=tmp_path)
    assert refused.returncode == 2 and "--actions deepracer with 3 --speeds" in refused.stderr
    refused = run(*SMALL, *start, "--actions", "deepracer", "--speeds", 8, 9, cwd=tmp_path)
    assert refused.returncode == 2 and "3 --speeds" in refused.stderr
    assert not (tmp_path / "runs/other").exists()
    raised = run(*SMALL, *start, "--actions", "deepracer", "--speeds", 10, 20, 30, "--eval-interval", 0, cwd=tmp_path)
    assert raised.returncode == 0, raised.stderr


def test_the_cap_rises_with_what_passes_and_failing_goes_back_to_it(tmp_path, monkeypatch):
    """Evaluations that pass, fail and fail again; the games and the learning between them are real."""
    monkeypatch.chdir(tmp_path)
    passes, weights = iter((True, False, False)), []

    def exam(agent, device, args, logger, step):
        finished = 2 * next(passes)
        weights.append(({key: value.clone() for key, value in agent.state_dict().items()}, args.speed_cap))
        times = {"median": 50.0, "best": 50.0} if finished else {"median": None, "best": None}
        return {"finished": finished, "races": 2, "progress": 0.5, "off_track_seconds": 0.0} | times

    monkeypatch.setattr(ppo_tuxkart, "exam", exam)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # which the logger replaces
    args = ppo_tuxkart.Args(num_envs=2, num_steps=16, num_minibatches=2, total_timesteps=96, eval_interval=1)
    args = dataclasses.replace(args, speed_cap=8.0, speed_curriculum=2.0, name="school")
    ppo_tuxkart.train(args)
    rows = [json.loads(line) for line in (tmp_path / "runs/school/metrics.jsonl").read_text().splitlines()]
    assert [cap for _, cap in weights] == [8.0, 10.0, 9.0]
    assert [row["charts/speed_cap"] for row in rows] == [10.0, 9.0, 8.5]
    last = torch.load(tmp_path / "runs/school/last.pt", weights_only=True)
    assert last["lesson"] == {"cap": 8.5, "passed": 8.0, "increment": 0.5} and last["made_on"]["speed_cap"] == 8.0
    passed = weights[0][0]
    assert all(torch.equal(last["agent"][key], value) for key, value in passed.items())
    assert not all(torch.equal(weights[1][0][key], value) for key, value in passed.items())
    assert not last["optimizer"]["state"]
