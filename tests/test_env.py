"""The environment: its track, rewards and actions by themselves, then the real game."""

import itertools
import math
import os
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, in_own_process, slow
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3
from stable_baselines3.common.vec_env import SubprocVecEnv

import ppo_tuxkart
import worldmodel_carracing
from ppo_tuxkart import ACTIONS, REWARDS, Moment, TrackGeometry, TuxKartEnv, progress_reward

GAS, COAST, BRAKE = 0, 1, 2
STRAIGHT = 2
FORWARD = [STRAIGHT, GAS, 0, 0]


def square_track(reverse=False):
    """A square of 4 x 100 m, 10 m wide, driven clockwise as seen from above (first towards +z)."""
    corners = np.array([[0, 0, 0], [0, 0, 100], [100, 0, 100], [100, 0, 0]], float)
    corners = corners[[0, 3, 2, 1]] if reverse else corners
    nodes = np.stack([corners, np.roll(corners, -1, 0)], 1)
    distances = np.stack([np.arange(4) * 100.0, np.arange(1, 5) * 100.0], 1)
    return TrackGeometry(nodes, np.full((4, 1), 10.0), distances, 400.0)


def locate_all(track, points, along=0.0):
    return np.array([track.locate(point, along) for point in points]).T


def test_locate_on_a_square():
    points = [[2, 0, 30], [-3, 1, 60], [40, 0, 101], [50, 0, -4]]
    along, offset, heading, width = locate_all(square_track(), points)
    np.testing.assert_allclose(along, [30, 60, 140, 350])
    np.testing.assert_allclose(offset, [2, -3, -1, -4])  # right of the road is positive
    np.testing.assert_allclose(heading, [0, 0, np.pi / 2, -np.pi / 2])
    np.testing.assert_allclose(width, 10)
    along, offset, heading, _ = locate_all(square_track(reverse=True), [[2, 0, 30], [50, 0, -4]])
    np.testing.assert_allclose(along, [370, 50])
    np.testing.assert_allclose(offset, [-2, 4])
    np.testing.assert_allclose(np.cos(heading), [-1, 0], atol=1e-12)
    gains = [square_track().gain(*places) for places in ((398.0, 3.0), (3.0, 398.0), (100.0, 90.0))]
    assert gains == [5.0, -5.0, -10.0]  # the shorter way over the line


def test_locate_stays_on_the_road_that_it_was_on():
    """Beside the way back and below a bridge, whose middles are nearer; on another road, it is there."""
    out = [[0, 0, z] for z in range(0, 401, 20)]
    way_back = [[14 if z > 200 else 4, 0 if z > 200 else 6, z] for z in range(400, -1, -20)]
    nodes = np.array([*itertools.pairwise(out), *itertools.pairwise(way_back)], float)
    distances = np.stack([np.arange(40) * 20.0, np.arange(1, 41) * 20.0], 1)
    track = TrackGeometry(nodes, np.full(40, 20.0), distances, 800.0)
    # the last two are off the road
    for x, y, z in ([8, 0.5, 305], [9, 3.5, 105], [12, 1, 105], [-11, 0, 55], [0, 3, 55]):
        assert track.locate([x, y, z], z)[:2] == pytest.approx((z, x))
    assert track.locate([8, 0.5, 305], 0.0)[0] == pytest.approx(495)
    assert track.locate([8, 0.5, 305], 500.0)[:2] == pytest.approx((495, 6))
    assert track.locate([8, 5.5, 105], 690.0)[:2] == pytest.approx((695, -4))  # on the bridge
    assert track.locate([13, 0, 305], 300.0)[0] == pytest.approx(495)  # it has crossed over
    assert track.locate([2, 0, 1], 795.0)[0] == pytest.approx(1)  # over the start line
    assert track.locate([0, 0, 305], 100.0)[0] == pytest.approx(305)  # as after a jump
    assert track.locate([40, 0, 305], 300.0)[0] == pytest.approx(495)  # too far off: the nearest


def bent_track(mirrored=False):
    """A lap whose half from 200 to 400 m crosses above the first one."""
    sign = -1.0 if mirrored else 1.0
    points = [[0, 0, 0], [0, 0, 100], [sign * 50, 5, 100], [sign * 50, 8, 50], [sign * -50, 8, 50], [sign * -50, 0, 0]]
    nodes = np.array([*itertools.pairwise([*points, points[0]])], float)
    ends = np.linalg.norm(nodes[:, 1] - nodes[:, 0], axis=-1).cumsum()
    distances = np.stack([np.append(0, ends[:-1]), ends], 1)
    return TrackGeometry(nodes, [[10], [10], [12], [12], [14], [14]], distances, ends[-1])


def state_at(track, location, heading, velocity, items=((), ()), **changes):
    """What a kart would be told there, by name, without the game."""
    env = TuxKartEnv(observe="state")
    env.geometry, env.heading, env.world, env.best_at = track, heading, SimpleNamespace(time=3.0), 1.0
    env.held, env.drifted = {"steer": 0.0, "nitro": 0.0, **changes}, 0.3
    front = np.array(location) + 0.7 * np.array([math.sin(heading), 0.1, math.cos(heading)])
    env.kart = SimpleNamespace(location=location, front=front, velocity=velocity, jumping=False)
    env.spot = track.locate(location, 0.0)
    places = [sorted((track.locate(p, 0.0)[0], *p) for p in points) for points in items]
    env.items = [np.array([*rows, (math.inf, 0, 0, 0), (math.inf, 0, 0, 0)]) for rows in places]
    numbers = env.state()
    assert env.observation_space.contains(numbers)
    n = len(ppo_tuxkart.AHEAD)
    parts = {"right": numbers[14 : 14 + n], "forward": numbers[14 + n : 14 + 2 * n]}
    parts |= {"up": numbers[14 + 2 * n : 14 + 3 * n], "width": numbers[14 + 3 * n : 14 + 4 * n]}
    return {"all": numbers, "first": numbers[:14], **parts, "items": numbers[14 + 4 * n :]}


def test_what_a_teacher_is_told():
    items = ([(1.0, 0.0, 30.0), (0.0, 0.0, 95.0)], [(-2.0, 0.0, 60.0)])
    told = state_at(bent_track(), [2.0, 0.0, 20.0], 0.0, (1.0, 2.0, 10.0), items)
    expected = [0, 1, 0.4, 0.2, 0.5, 0.5, 0.1, 0.2, 0.07, 0, 0.5, 0.3, 0, 0]
    np.testing.assert_allclose(told["first"], expected, atol=1e-6)
    ahead = ppo_tuxkart.AHEAD
    straight = ahead <= 80
    np.testing.assert_allclose(told["right"][straight], -2 / ahead[straight], rtol=1e-5)
    np.testing.assert_allclose(told["forward"][straight], 1, rtol=1e-5)
    at = list(ahead).index(100)  # 20 m behind the corner, on the slope
    along = 20 / math.hypot(50, 5)
    np.testing.assert_allclose(told["right"][at], (50 * along - 2) / 100, rtol=1e-4)
    np.testing.assert_allclose([told["forward"][at], told["up"][at]], [0.8, 5 * along / 100], rtol=1e-4)
    assert told["width"][0] == 0.5 and told["width"][-1] == pytest.approx(0.5 + 0.1 * 40 / math.hypot(50, 5))
    # the items: to the right of the next two of either kind, then forward; none further
    np.testing.assert_allclose(told["items"], [-0.1, -0.2, -0.4, 0, 0.2, 1.5, 0.8, 2], rtol=1e-5)


@in_own_process
def test_every_set_of_actions_has_a_state():
    for name in ACTIONS:
        env = TuxKartEnv(observe="state", actions=name)
        env.action_space.seed(0)
        env.reset(seed=0)
        for _ in range(5):
            assert env.observation_space.contains(env.step(env.action_space.sample())[0])


@in_own_process
def test_games_that_draw_nothing_begin_again(engine):
    env = TuxKartEnv(engine=engine, observe="state")
    for seed in range(3):
        env.reset(seed=seed)
        env.step(FORWARD)
        env.reset()
        assert env.observation_space.contains(env.step(FORWARD)[0])


@in_own_process
def test_a_drift_is_held_until_it_brings_a_boost():
    for actions, decisions in {"skid": 8, "drive": 1}.items():  # 1.1 s of 0.15 s each
        env = TuxKartEnv(observe="state", actions=actions, random_start=0.0)
        env.reset(seed=0)
        held = []
        for drift in [1] + 9 * [0]:
            env.step([0, GAS, drift, 0])
            held.append(bool(env.held["drift"]))
        assert held == decisions * [True] + (10 - decisions) * [False]
        env.step([STRAIGHT, GAS, 1, 0])
        assert env.held["drift"] == (actions == "drive")  # where it lasts, it begins in full steering alone
        agent = ppo_tuxkart.make_agent(ppo_tuxkart.Args(observe="state", actions=actions), None)  # that knows nothing
        drifts = agent(torch.tensor(env.state())[None])[0][0, 8:10].softmax(-1)[1]
        begun = drifts * (2 / 5 if actions == "skid" else 1)  # by two of five steers, or by all
        assert begun < 0.1 if actions == "skid" else begun > 0.4


def test_a_mirrored_kart_is_told_the_mirrored_state_and_decides_the_mirrored_action():
    here = state_at(bent_track(), [2, 0, 70], 0.2, (1, 0, 9), (((3, 0, 80),), ()), steer=0.5)["all"]
    there = state_at(bent_track(True), [-2, 0, 70], -0.2, (-1, 0, 9), (((-3, 0, 80),), ()), steer=-0.5)["all"]
    mirrored = np.where(np.isin(np.arange(66), [0, 2, 3, 6, 12, *range(14, 25), *range(58, 62)]), -here, here)
    np.testing.assert_allclose(there, mirrored, atol=1e-6)
    for mirror in (True, False):
        agent = ppo_tuxkart.make_agent(ppo_tuxkart.Args(observe="state", mirror=mirror), None)
        logits, values = agent(torch.tensor(np.stack([here, there])))
        expected = torch.cat([logits[0, :5].flip(0), logits[0, 5:], values[:1]])
        assert torch.allclose(torch.cat([logits[1], values[1:]]), expected, atol=1e-5) is mirror


def test_the_road_ahead_goes_on_over_the_line_and_below_a_bridge():
    track = bent_track()
    start = state_at(track, [0.0, 0.0, 0.0], 0.0, (0.0, 0.0, 0.0))
    before = math.atan2(50, 0)  # the last stretch leads towards +x
    last = state_at(track, [-10.0, 0.0, 0.0], before, (0.0, 0.0, 0.0))
    twenty = list(ppo_tuxkart.AHEAD).index(20)
    assert last["forward"][twenty] == pytest.approx(0.5) and last["right"][twenty] == pytest.approx(-0.5)
    below = state_at(track, [0.0, 0.0, 45.0], 0.0, (0.0, 0.0, 0.0))
    above = state_at(track, [0.0, 8.0, 50.0], -math.pi / 2, (0.0, 0.0, 0.0))
    assert abs(below["up"][:6]).max() < 1e-6 and start["width"][0] == 0.5  # not the bridge's road
    assert above["first"][1] == pytest.approx(1, abs=1e-3) and above["width"][0] == pytest.approx(0.655)


@in_own_process
def test_a_student_at_the_wheel_never_touches_the_state():
    """A race by shipped weights that see pictures, as it is between two iterations with a teacher."""
    checkpoint = ppo_tuxkart.load_checkpoint(ROOT / "pretrained" / "scotland.pt")
    args = checkpoint["args"]
    agent = ppo_tuxkart.make_agent(args, checkpoint)
    agent.teaching = 1.0
    with mock.patch.object(TuxKartEnv, "state", side_effect=AssertionError("a state was asked for")):
        envs = ppo_tuxkart.make_envs(args, 1)
        (run,) = ppo_tuxkart.race(envs, agent, [1000], args.track, greedy=True)
        assert run["finished"]
        with pytest.raises(AssertionError, match="a state was asked for"):  # as learning does
            ppo_tuxkart.rollout(envs, agent, ppo_tuxkart.reset_games(envs, [0]), 1)
    ppo_tuxkart.end_games(envs)


# --- Rewards and actions


def test_of_two_laps_the_faster_one_earns_more():
    def lap(speeds):
        distances = np.asarray(speeds, float) * 0.15
        distances *= 1300 / distances.sum()
        driven = sum(progress_reward(Moment(distance, 0.15)) for distance in distances)
        return driven + progress_reward(Moment(0, 0, finished=True))

    slower, faster = lap(np.ones(400)), lap(np.random.default_rng(0).uniform(0.2, 1, 350))
    assert faster - slower == pytest.approx(50 * 0.15 * 0.5)
    assert progress_reward(Moment(0.0, 1.0)) < 0  # standing still never pays
    assert progress_reward(Moment(0.0, 0.0, failed=True)) < 0 < progress_reward(Moment(0.0, 0.0, finished=True))


def pay(name, offset=0.0, gain=0.0, **values):
    return REWARDS[name](Moment(gain, 0.15, offset=offset, width=10.0, **values))


def test_the_seeds_rewards_at_every_threshold():
    for side in (-1, 1):
        for edge, reward in ((1.0, 1.0), (2.5, 0.5), (5.0, 0.1)):
            assert pay("centerline", side * edge) == reward
            assert pay("centerline", side * (edge + 1e-6)) < reward
        assert pay("borders", side * 4.9499) == 1.0 and pay("borders", side * 4.9501) == 1e-3
    assert pay("centerline", 5.1) == 1e-3
    assert pay("zigzag", steering=15.0) == 1.0 and pay("zigzag", steering=-15.1) == 0.8
    assert pay("zigzag", 2.0, steering=30.0) == 0.5 * 0.8
    assert pay("heading", heading=-10.0) == 1.0 and pay("heading", heading=10.1) == 0.5
    assert pay("speed", pace=0.25) == 1.0 and pay("speed", pace=0.249) == 0.5
    assert pay("speed", 5.1, pace=1.0) == 1e-3
    assert pay("ec418", 5.9, gain=2.0) == 0.1 * 2.0
    assert pay("ec418", 6.0, gain=2.0) == pay("ec418") == pay("ec418", gain=-2.0) == 0.0


SPEEDS = (8.0, 16.0, 24.0)
SIZES = {"skid": 60, "drive": 60, "ec418": 16, "deepracer": 21}


@pytest.mark.parametrize("name", ACTIONS)
def test_no_two_choices_are_the_same(name):
    choices, controls = ACTIONS[name]
    told = [controls(list(choice), 4.0, SPEEDS) for choice in np.ndindex(*choices(len(SPEEDS)))]
    assert len({tuple(sorted(control.items())) for control in told}) == len(told) == SIZES[name]
    steer = [control["steer"] for control in told]
    assert sum(steer) == pytest.approx(0) and min(steer) == -1 and max(steer) == 1


def test_deepracers_angles_and_the_governor():
    angles = [round(30 * ACTIONS["deepracer"][1]([3 * i], 0.0, SPEEDS)["steer"]) for i in range(7)]
    assert angles == [-30, -20, -10, 0, 10, 20, 30]
    pedals = {0.0: (1.0, False), 9.0: (0.5, False), 12.0: (0.0, False), 12.1: (0.0, True)}
    for speed, (acceleration, brake) in pedals.items():
        assert ppo_tuxkart.govern(10.0, speed) == {"acceleration": acceleration, "brake": brake}


# --- The real game


def drive(env, actions, seed=0, options=None):
    """One episode: observations (T + 1, C, H, W), rewards, and the last of what `step` returned."""
    observations, rewards, last = [env.reset(seed=seed, options=options)[0]], [], ()
    for action in actions:
        observation, reward, *last = env.step(action)
        observations.append(observation.copy())
        rewards.append(reward)
        if last[0] or last[1]:
            break
    return np.stack(observations), rewards, last


def random_actions(count, seed=0):
    return np.random.default_rng(seed).integers([5, 3, 2, 2], size=(count, 4)).tolist()


@in_own_process
def test_gymnasiums_and_stable_baselines3s_checks(engine):
    with pytest.raises(ValueError, match="There is no track scotlnd: type"):
        gym.make("TuxKart-v0", track="scotlnd")
    env = gym.make("TuxKart-v0", engine=engine, render_mode="rgb_array")
    check_env(env.unwrapped)
    check_env_for_sb3(env.unwrapped, warn=False)
    env.reset(seed=0)
    picture = env.render()
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8 and picture.std() > 10
    env.close()
    second = TuxKartEnv(engine=engine, frame_stack=3)
    assert second.reset(seed=0)[0].shape == (9, 64, 64)
    with pytest.raises(RuntimeError, match="one game of one size"):
        TuxKartEnv(engine=engine, width=96).reset()


WRONG = {"difficulty": 9, "laps": 0, "reward": "speeed", "track": "battleisland", "driver": "me", "observe": "all"}


@pytest.mark.parametrize("name", WRONG)
def test_gym_make_checks_what_it_is_given(name):
    with pytest.raises(ValueError, match=f" {WRONG[name]}: type"):
        gym.make("TuxKart-v0", **{name: WRONG[name]})


@in_own_process
def test_a_cell_that_is_run_twice(engine):
    """The newest environment has the game; one that it was taken from says so, and gets it back by reset."""
    first = gym.make("TuxKart-v0", engine=engine, reward="progress").unwrapped
    first.reset()
    with pytest.raises(ValueError, match="There is no track"):
        gym.make("TuxKart-v0", engine=engine, track="nowhere")
    second = gym.make("TuxKart-v0", engine=engine, track="lighthouse").unwrapped
    second.reset()
    second.step(FORWARD)
    with pytest.raises(RuntimeError, match="call reset"):
        first.step(FORWARD)
    first.reset()
    first.step(FORWARD)
    with pytest.raises(AssertionError, match="forked from one that plays"):
        in_own_process(second.reset)()


@in_own_process
def play_at(home, engine):
    for name in ("SUPERTUXKART_SAVEDIR", "XDG_CONFIG_HOME"):
        os.environ.pop(name, None)
    os.environ["HOME"] = str(home)
    env = gym.make("TuxKart-v0", engine=engine)
    env.reset()
    env.step(FORWARD)
    env.close()
    env.unwrapped.stk.clean()  # where it would write


def test_a_players_own_game_is_left_alone(engine, tmp_path, monkeypatch):
    saves = tmp_path / ".config" / "supertuxkart" / "config-0.10"
    saves.mkdir(parents=True)
    (saves / "players.xml").write_text("<players><player name='me'/></players>")
    cache = Path.home() / ".cache" / "PySuperTuxKart2"
    (tmp_path / ".cache").mkdir()
    if cache.exists():
        (tmp_path / ".cache" / cache.name).symlink_to(cache)
    before = {path: (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")}
    monkeypatch.chdir(tmp_path)
    play_at(tmp_path, engine)
    after = {path: (path.lstat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")}
    assert after == before


@in_own_process
def test_what_linux_alone_has_is_not_needed():
    for module, name in ((os, "getuid"), (os, "sched_getaffinity"), (signal, "SIGHUP")):
        delattr(module, name)
    del os.environ["SUPERTUXKART_SAVEDIR"]
    with mock.patch("sys.platform", "darwin"), mock.patch("ctypes.CDLL", side_effect=OSError):
        env = TuxKartEnv(engine="pystk2")
        env.reset(seed=0)
        env.step(FORWARD)
        assert env.home == os.path.join(tempfile.gettempdir(), "tuxkart-0") and os.path.isdir(env.home)
        for main in (ppo_tuxkart.main, worldmodel_carracing.main):
            with mock.patch("sys.argv", ["script", "--no-such-flag"]), pytest.raises(SystemExit, match="2"):
                main()


@in_own_process
def test_driving_pays_and_standing_is_stuck(engine):
    env = TuxKartEnv(engine=engine, random_start=0.0)
    observations, rewards, (terminated, truncated, _) = drive(env, [FORWARD] * 14)
    assert not terminated and not truncated and 5 < env.progress < 60
    assert max(rewards) > 0.1 and rewards[0] < 0
    old, new = observations[5, :3], observations[5, 3:]
    assert (observations[4, 3:] == old).all() and (old != new).mean() > 0.1  # the last two pictures

    _, rewards, (terminated, truncated, info) = drive(env, [[STRAIGHT, COAST, 0, 0]] * 60)
    assert terminated and not truncated and info["end"] == "stuck" and not info["finished"]
    assert 4.0 <= 0.15 * len(rewards) <= 4.4 and rewards[-1] < -3
    assert info["return"] == info["reward/progress"] == pytest.approx(sum(rewards))
    assert math.isinf(info["lap_time"]) and abs(info["progress"]) < 0.01

    _, _, (terminated, _, info) = drive(env, [[STRAIGHT, BRAKE, 0, 0]] * 80)
    assert terminated and info["end"] in ("backwards", "stuck") and info["progress"] < 0
    env.close()
    env = TuxKartEnv("lighthouse", engine=engine, random_start=0.0)  # open ground beside the road
    _, _, (terminated, _, info) = drive(env, [[3, GAS, 0, 0]] * 300)
    assert terminated and info["end"] in ("off track", "stuck") and info["off_track_seconds"] > 0


@in_own_process
def test_the_same_seed_is_the_same_episode_whatever_came_before(engine):
    env, actions = TuxKartEnv(engine=engine), random_actions(60)
    first, rewards, _ = drive(env, actions, seed=5)
    drive(env, random_actions(40, seed=1), seed=6)
    again, same_rewards, _ = drive(env, actions, seed=5)
    np.testing.assert_array_equal(first, again)
    assert rewards == same_rewards


@in_own_process
def place_after(actions, engine, film):
    """Where a race's actions bring the kart, with one picture a decision or as they are filmed."""
    args = ppo_tuxkart.Args(engine=engine)
    env = ppo_tuxkart.make_env(args, "scotland", **({"width": 640, "height": 480} if film else {}))
    if film:
        with mock.patch("ppo_tuxkart.make_env", return_value=env):
            ppo_tuxkart.film_race(args, {"seed": 5, "track": "scotland", "actions": np.array(actions)}, film)
    else:
        drive(env, actions, seed=5, options={"race": True})
    return list(env.kart.location)


def test_a_film_shows_the_race_that_was_driven(engine, tmp_path):
    actions = random_actions(60)
    assert place_after(actions, engine, tmp_path / "film.mp4") == place_after(actions, engine, None)


@in_own_process
def test_random_starts_are_all_over_the_track_and_face_along_it(engine):
    env, rows = TuxKartEnv(engine=engine, random_start=1.0), []
    for seed in range(10):
        env.reset(seed=None if seed else 0)
        along, offset, heading, width = env.geometry.locate(env.kart.location, env.along)
        askew = np.angle(np.exp(1j * (env.heading - heading)))
        for _ in range(10):
            env.step(FORWARD)
        rows.append([along, abs(offset) / width, abs(askew), env.progress])
    along, offset, askew, progress = np.array(rows).T
    assert np.ptp(along) > 600 and len(np.unique(along.round())) > 7
    assert (offset < 0.5).all() and (askew < np.radians(45)).all() and np.median(progress) > 3


@in_own_process
def starts_of_races(driver, engine, num_karts=1):
    """Where and when disturbed races begin; the AI, which does not wait, gets its delay on the clock."""
    env, rows = TuxKartEnv(driver=driver, engine=engine, num_karts=num_karts), []
    for seed in range(5):
        env.reset(seed=seed, options={"race": True})
        rows.append([*env.kart.location, env.heading, env.world.time + env.handicap, env.race.config.seed])
    return np.array(rows)


def test_races_are_disturbed_alike_for_the_agent_and_the_ai(engine):
    agent, others = starts_of_races("agent", engine), starts_of_races("agent", engine, 3)
    np.testing.assert_allclose(agent, starts_of_races("ai", engine), atol=0.01)
    assert len(np.unique(agent.round(3), axis=0)) == 5
    assert np.ptp(agent[:, 0]) > 0.5 and np.ptp(agent[:, 3]) > np.radians(2)
    assert np.abs(agent[:, :3] - agent[:, :3].mean(0)).max() < 4
    assert np.ptp(agent[:, 4]) > 0.04  # late, but where others would not wait
    assert np.ptp(others[:, 4]) == 0 and others[:, 5].tolist() == [0, 1, 2, 3, 4]


@in_own_process
def test_the_games_ai_finishes_scotland(engine):
    """The race, its clock and the reward, by a driver that is not ours."""
    env = TuxKartEnv(driver="ai", engine=engine, step_size=0.1)
    _, rewards, (terminated, _, info) = drive(env, [FORWARD] * 1500, seed=7, options={"race": True})
    assert terminated and info["finished"] and info["end"] == "finished" and info["progress"] == 1.0
    assert 42 < info["lap_time"] < 56 and info["place"] == 1  # 47.3 and 48.5 s were its medians
    seconds = env.world.time - env.started_at
    assert info["lap_time"] == pytest.approx(seconds, abs=0.6)
    assert sum(rewards) == pytest.approx(0.1 * env.distance + 25 - 0.5 * seconds, abs=1e-6)


@in_own_process
def test_an_episode_from_anywhere_ends_at_the_line_and_pays_like_a_lap(engine):
    env = TuxKartEnv(engine=engine, random_start=1.0, speed_cap=12.0)
    env.reset(seed=0)
    while env.distance > 150:
        env.reset()
    assert env.distance == pytest.approx(env.geometry.length - env.along)
    rewards, speeds, info = [], [], {}
    while not info:
        before = env.along
        _, offset, road, _ = env.geometry.locate(env.kart.location, env.along)
        turn = np.angle(np.exp(1j * (road - 0.03 * offset - env.heading)))
        steer = int(np.clip(round(2 + 4 * turn), 0, 4))
        _, reward, terminated, _, info = env.step([steer, GAS, 0, 1])
        rewards.append(reward)
        speeds.append(env.speed)
    assert info["end"] == "line" and terminated and not info["finished"] and math.isinf(info["lap_time"])
    assert env.geometry.length - before < 5.0  # the step before was just short of it
    assert rewards[-1] > 9.0 and max(rewards[:-1]) < 1.0
    assert 10.0 < np.median(speeds) and max(speeds) < 13.0  # the cap holds, also with nitro
    env.close()


@slow
@in_own_process
def test_opponents_laps_a_cap_and_the_time_limit(engine):
    env = TuxKartEnv(engine=engine, laps=3, random_start=0.0, num_karts=4)
    _, _, (terminated, _, info) = drive(env, [[STRAIGHT, COAST, 0, 0]] * 60)
    assert terminated and len(env.world.karts) == 4 and info["place"] == 4
    env.reset(seed=1)
    assert 3000 < env.distance < 4500 and env.limit == 450.0
    env.speed_cap = 6.0
    env.reset(seed=1)
    assert env.limit == env.distance / 3  # enough at half of the cap
    env.limit = 2.0
    for _ in range(20):
        _, _, terminated, truncated, info = env.step(FORWARD)
        if truncated:
            break
    assert truncated and not terminated and info["end"] == "time limit"


@slow
@in_own_process
def test_the_geometry_of_every_race_track(engine):
    """At the start, in the middle of every road, at its edges, and on the AI's drive beside the engine's own."""
    names = ppo_tuxkart.find_game(engine)[1]
    assert len(names) >= 15 and not {"battleisland", "stadium", "tutorial"} & set(names)
    env = TuxKartEnv(driver="ai", engine=engine, step_size=0.1)
    for name, reverse in zip(names, itertools.cycle([False, False, True])):
        env.track, env.game.reverse, where = name, reverse, f"{name}, reversed {reverse}"
        env.reset(seed=0)
        geometry, length = env.geometry, env.geometry.length
        assert min(env.along, length - env.along) < 40, where
        places, middles = geometry.distances.mean(1) % length, geometry.nodes.mean(1)
        right = np.stack([np.cos(geometry.headings), 0 * places, -np.sin(geometry.headings)], 1)
        for side, most in ((0.0, 0.01), (-0.48, 60.0), (0.48, 60.0)):
            points = middles + side * geometry.widths[:, None] * right
            found = [geometry.locate(point, place)[0] for point, place in zip(points, places, strict=True)]
            errors = np.abs(geometry.gain(np.array(found), places))
            assert (errors.max() if side else np.median(errors)) < most, where
        differences = []
        for _ in range(100):
            env.step(FORWARD)
            theirs = env.world.karts[0].distance_down_track % length
            differences.append(abs(geometry.gain(env.along, theirs)))
        assert env.progress > 60 and np.median(differences[20:]) < 5, where


def make():
    return gym.make("TuxKart-v0", track="lighthouse")


@slow
@in_own_process
def test_stable_baselines3_and_gymnasiums_vector_environment_drive_it():
    torch.set_num_threads(1)
    envs = SubprocVecEnv([make, make], start_method="fork")
    model = PPO("CnnPolicy", envs, n_steps=64, batch_size=64, n_epochs=1, seed=0, device="cpu")
    before = [parameter.detach().clone() for parameter in model.policy.parameters()]
    model.learn(256)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    assert model.predict(envs.reset(), deterministic=True)[0].shape == (2, 4)
    envs.close()
    with ThreadPoolExecutor(1) as thread:  # which ends before they play on
        envs = thread.submit(gym.make_vec, "TuxKart-v0", 2, "async", track="lighthouse").result()
        observations, _ = thread.submit(envs.reset, seed=3).result()
    assert observations.shape == (2, 6, 64, 64) and (observations[0] != observations[1]).any()
    assert np.isfinite(envs.step(np.array([FORWARD, FORWARD]))[1]).all()
    envs.close(terminate=True)
