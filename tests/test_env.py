"""The environment, on the real game."""

import copy
import ctypes
import itertools
import sys

import gymnasium as gym
import numpy as np
import pytest
from conftest import INSTALLED, in_process
from gymnasium.utils.env_checker import check_env

import ppo_tuxkart
from ppo_tuxkart import Moment, TrackGeometry, TuxKartEnv, progress_reward

GAS, COAST, BRAKE = 0, 1, 2
LEFT, STRAIGHT, RIGHT = 0, 2, 4
FULL_THROTTLE = [[STRAIGHT, GAS, 0, 0]]


def square_track(reverse=False):
    """A square of 4 x 100 m, 10 m wide, driven clockwise as seen from above (first towards +z)."""
    corners = np.array([[0, 0, 0], [0, 0, 100], [100, 0, 100], [100, 0, 0]], float)
    corners = corners[[0, 3, 2, 1]] if reverse else corners
    nodes = np.stack([corners, np.roll(corners, -1, 0)], 1)
    distances = np.stack([np.arange(4) * 100.0, np.arange(1, 5) * 100.0], 1)
    return TrackGeometry(nodes, np.full((4, 1), 10.0), distances, 400.0)


def locate_all(track, points):
    return np.array([track.locate(point) for point in points]).T


def test_locate_on_a_square():
    along, offset, heading, width = locate_all(square_track(), [[2, 0, 30], [-3, 1, 60], [40, 0, 101], [50, 0, -4]])
    np.testing.assert_allclose(along, [30, 60, 140, 350])
    np.testing.assert_allclose(offset, [2, -3, -1, -4])  # right of the road is positive
    np.testing.assert_allclose(heading, [0, 0, np.pi / 2, -np.pi / 2])
    np.testing.assert_allclose(width, 10)


def test_locate_on_a_reversed_square():
    along, offset, heading, _ = locate_all(square_track(reverse=True), [[2, 0, 30], [50, 0, -4]])
    np.testing.assert_allclose(along, [370, 50])
    np.testing.assert_allclose(offset, [-2, 4])
    np.testing.assert_allclose(np.cos(heading), [-1, 0], atol=1e-12)


def test_locate_finds_the_nearest_segment_and_level():
    track, points = square_track(), np.random.default_rng(0).uniform(-10, 110, (100, 3))
    share = np.linspace(0, 1, 2001)[:, None, None]  # 0.05 m apart
    line = (track.starts + share * track.vectors).reshape(-1, 3)
    for point, offset in zip(points, locate_all(track, points)[1], strict=True):
        nearest = line[np.linalg.norm(point - line, axis=-1).argmin()]
        assert abs(offset) == pytest.approx(np.hypot(*(point - nearest)[[0, 2]]), abs=0.05)
    nodes = [[[0, 0, 0], [0, 0, 50]], [[0, 9, 0], [0, 9, 50]]]  # a bridge over the road
    bridge = TrackGeometry(nodes, [8, 8], [[0, 50], [50, 100]], 100)
    np.testing.assert_allclose(locate_all(bridge, [[1, 0.5, 10], [1, 8.5, 10]])[0], [10, 60])


def test_locate_stays_on_the_road_that_it_was_on():
    """Beside the way back and below a bridge, whose middles are nearer; on another road, it is there."""
    out = [[0, 0, z] for z in range(0, 401, 20)]
    way_back = [[14 if z > 200 else 4, 0 if z > 200 else 6, z] for z in range(400, -1, -20)]
    nodes = np.array([*itertools.pairwise(out), *itertools.pairwise(way_back)], float)
    distances = np.stack([np.arange(40) * 20.0, np.arange(1, 41) * 20.0], 1)
    track = TrackGeometry(nodes, np.full(40, 20.0), distances, 800.0)
    for point in ([8, 0.5, 305], [9, 3.5, 105], [12, 1, 105], [-11, 0, 55], [0, 3, 55]):  # the last two: off the road
        x, _, z = point
        assert track.locate(point, z)[:2] == pytest.approx((z, x))
    assert track.locate([8, 0.5, 305])[0] == pytest.approx(495)
    assert track.locate([8, 0.5, 305], 500.0)[:2] == pytest.approx((495, 6))
    assert track.locate([8, 5.5, 105], 690.0)[:2] == pytest.approx((695, -4))  # on the bridge
    assert track.locate([13, 0, 305], 300.0)[0] == pytest.approx(495)  # it has crossed over
    assert track.locate([2, 0, 1], 795.0)[0] == pytest.approx(1)  # over the line
    assert track.locate([0, 0, 305], 100.0)[0] == pytest.approx(305)  # as after a jump
    assert track.locate([40, 0, 305], 300.0)[0] == pytest.approx(495)  # too far off: the nearest


def test_gain_goes_the_shorter_way_over_the_line():
    track = square_track()
    assert track.gain(398.0, 3.0) == 5.0
    assert track.gain(3.0, 398.0) == -5.0
    assert track.gain(100.0, 90.0) == -10.0


def test_of_two_laps_the_faster_one_earns_more():
    def lap(speeds):
        distances = np.asarray(speeds, float) * 0.15
        distances *= 1300 / distances.sum()
        return sum(progress_reward(Moment(d, 0.15)) for d in distances) + progress_reward(Moment(0, 0, finished=True))

    slow, fast = lap(np.ones(400)), lap(np.random.default_rng(0).uniform(0.2, 1, 350))
    assert fast - slow == pytest.approx(50 * 0.15 * 0.5)
    assert progress_reward(Moment(0.0, 1.0)) < 0  # standing still never pays
    assert progress_reward(Moment(0.0, 0.0, failed=True)) < 0 < progress_reward(Moment(0.0, 0.0, finished=True))


def every_track(engine, nth):
    """On each (nth) race track, both ways: the geometry at the start, the line, in the middle, and on an AI's drive."""
    assets, _ = ppo_tuxkart.find_assets(engine)
    reversible, findings = ppo_tuxkart.race_tracks(assets), {}
    env = TuxKartEnv(engine=engine, driver="ai", step_size=0.1)
    for name, can_reverse in sorted(reversible.items())[::nth]:
        for reverse in [False, True] if can_reverse else [False]:
            env.track, env.reverse = name, reverse
            env.reset(seed=0)
            geometry, length = env.geometry, env.geometry.length
            middles = geometry.starts + geometry.vectors / 2
            along, offset, heading, _ = locate_all(geometry, middles)
            expected = geometry.distances.mean(1) % length
            start = min(env._along, length - env._along)
            at_ends = locate_all(geometry, geometry.starts[:1] + [[-1e-3], [1e-3]])[0]
            jumps = []  # of a kart that goes round at either edge of the road
            right = np.stack([np.cos(geometry.headings), 0 * middles[:, 0], -np.sin(geometry.headings)], 1)
            for points in (middles + side * geometry.widths[:, None] * right for side in (-0.48, 0.48)):
                here = 0.0
                for point, place in zip(points, expected, strict=True):
                    if abs(geometry.gain(here, place)) > ppo_tuxkart.NEAR_METRES:  # a road of its own begins
                        here = place
                    here = geometry.locate(point, here)[0]
                    jumps.append(abs(geometry.gain(here, place)))
            ours, engines = [], []
            for _ in range(100):
                env.step([STRAIGHT, GAS, 0, 0])
                ours.append(env._along)
                engines.append(env._world.karts[0].distance_down_track % length)
            difference = np.abs(geometry.gain(np.array(ours), np.array(engines)))
            findings[name, reverse] = {
                "middle_error": np.median(np.abs(geometry.gain(along, expected))),
                "middle_offset": np.median(np.abs(offset)),
                "heading_error": np.median(np.abs(np.angle(np.exp(1j * (heading - geometry.headings))))),
                "start_distance": start,
                "line_jump": abs(geometry.gain(*at_ends)),
                "edge_jump": max(jumps),
                "progress": env._progress,
                "engine_difference": np.median(difference[20:]),
            }
    env.close()
    return findings


def test_geometry_on_every_race_track(engine):
    nth = 1 if engine == INSTALLED[0] else 3  # the second engine has the same tracks
    findings = in_process(every_track, engine, nth)
    assert len({name for name, _ in findings}) >= 15 // nth
    assert any(reverse for _, reverse in findings)
    for (name, reverse), found in findings.items():
        where = f"{name}{' reversed' if reverse else ''}: {found}"
        assert found["middle_error"] < 0.01 and found["middle_offset"] < 0.01 and found["heading_error"] < 0.01, where
        assert found["start_distance"] < 40, where
        assert found["line_jump"] < 1 and found["edge_jump"] < 60, where
        assert found["progress"] > 60, where  # 10 s of the AI's driving
        assert found["engine_difference"] < 5, where


def contract(engine):
    env = gym.make("TuxKart-v0", engine=engine, render_mode="rgb_array", random_start=0.5)
    check_env(env.unwrapped, skip_render_check=True)  # that check starts a second game
    env.reset(seed=0)
    picture = env.render()
    env.close()
    kart = "tux" if engine == "pystk" else "gnu"  # pystk has loaded the first one's alone
    env = gym.make("TuxKart-v0", engine=engine, frame_stack=3, kart=kart)  # a second environment in the process
    env.reset(seed=0)
    refused = []
    for settings in [{"width": 96}] * 2 + [{"kart": "gnu"}] * (engine == "pystk"):
        with pytest.raises(RuntimeError) as error:
            TuxKartEnv(engine=engine, **settings).reset()
        refused.append(str(error.value))
        env.close()
    return picture, refused


def wide(engine):
    env = TuxKartEnv(engine=engine, width=96, height=48, frame_stack=3)
    observation, _ = env.reset(seed=0)
    return observation.shape, env.observation_space.contains(observation)


def test_gymnasium_contract(engine):
    picture, (while_one_runs, *of_another_kind) = in_process(contract, engine)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8 and picture.std() > 10
    assert "One game runs per process" in while_one_runs and len(of_another_kind) >= 1
    assert all("A process keeps its first game" in refusal for refusal in of_another_kind)
    assert in_process(wide, engine) == ((9, 48, 96), True)


def drive(engine, actions, random_start=0.0, seed=0, settings=None, options=None):
    """One episode with a fixed action: observations, rewards, the last info, and positions."""
    env = TuxKartEnv(engine=engine, random_start=random_start, **settings or {})
    observations, rewards, positions = [env.reset(seed=seed, options=options)[0]], [], [env.location]
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        observations.append(observation.copy())
        rewards.append(reward)
        positions.append(env.location)
        if terminated or truncated:
            break
    env.close()
    return np.stack(observations), rewards, (terminated, truncated, info), np.stack(positions)


def test_full_throttle_drives_and_pays(engine):
    observations, rewards, (terminated, truncated, _), positions = in_process(drive, engine, FULL_THROTTLE * 14)
    assert not terminated and not truncated
    assert 5 < np.linalg.norm(positions[-1] - positions[0]) < 60
    assert max(rewards) > 0.1 and rewards[0] < 0
    old, new = observations[5, :3], observations[5, 3:]
    assert (observations[4, 3:] == old).all() and (old != new).mean() > 0.1  # a stack of the last two pictures


def test_standing_still_is_stuck(engine):
    _, rewards, (terminated, truncated, info), _ = in_process(drive, engine, [[STRAIGHT, COAST, 0, 0]] * 60)
    assert terminated and not truncated and info["end"] == "stuck" and not info["finished"]
    assert 4.0 <= info["seconds"] <= 4.4 and rewards[-1] < -3
    assert info["return"] == pytest.approx(sum(rewards))
    assert np.isnan(info["lap_time"]) and abs(info["progress"]) < 0.01


def test_reversing_ends_as_backwards_or_stuck_and_off_the_road_as_off_track(engine):
    _, _, (terminated, _, info), _ = in_process(drive, engine, [[STRAIGHT, BRAKE, 0, 0]] * 80)
    assert terminated and info["end"] in ("backwards", "stuck") and info["progress"] < 0
    settings = {"track": "lighthouse"}  # open ground beside the road
    _, _, (terminated, _, info), _ = in_process(drive, engine, [[3, GAS, 0, 0]] * 300, 0.0, 0, settings)
    assert terminated and info["off_track_m"] > 0 and info["off_track_seconds"] > 0


def test_time_limit_truncates(engine):
    settings = {"max_seconds": 2.0}
    _, _, (terminated, truncated, info), _ = in_process(drive, engine, FULL_THROTTLE * 60, 0.0, 0, settings)
    assert truncated and not terminated and info["end"] == "time limit" and 2.0 <= info["seconds"] <= 2.2


def time_limits(engine):
    """Of three laps, the same under a cap on the speed, and as asked for; and the distance; runs the game."""
    env = ppo_tuxkart.TuxKartEnv(engine=engine, laps=3)
    limits = []
    for cap, asked in ((None, None), (6.0, None), (6.0, 9.0)):
        env.speed_cap, env.max_seconds = cap, asked
        env.reset(seed=1)
        limits.append(env._limit)
    env.close()
    return limits, env._distance


def test_the_time_limit_leaves_time_for_laps_and_a_cap(engine):
    limits, distance = in_process(time_limits, engine)
    assert 3000 < distance < 4500 and limits == [450.0, distance / 3, 9.0]


def random_starts(engine):
    env = TuxKartEnv(engine=engine, random_start=1.0)
    rows = []
    for seed in range(12):
        env.reset(seed=seed)
        along, offset, heading, width = env.geometry.locate(env.location)
        askew = np.angle(np.exp(1j * (env._heading() - heading)))
        for _ in range(10):
            env.step([STRAIGHT, GAS, 0, 0])
        rows.append([along, abs(offset) / width, askew, env._progress])
    env.close()
    return np.array(rows)


def test_random_starts_are_all_over_the_track_and_face_along_it(engine):
    along, offset, askew, progress = in_process(random_starts, engine).T
    assert np.ptp(along) > 600 and len(np.unique(along.round())) > 8
    assert (offset < 0.5).all()
    assert (np.abs(askew) < np.radians(45)).all()
    assert np.median(progress) > 3


def races(engine, driver):
    """Where five disturbed races begin, and when they do; the AI, which does not wait, gets its delay on the clock.

    And when three begin beside an opponent, with the seeds that their games have.
    """
    env = TuxKartEnv(engine=engine, driver=driver)
    rows, beside = [], []
    for seed in range(5):
        env.reset(seed=seed, options={"race": True})
        rows.append([*env.location, env._heading(), env._world.time + env._handicap])
    env.num_karts = 2
    for seed in range(3):
        env.reset(seed=seed, options={"race": True})
        beside.append([env._world.time + env._handicap, env._race.config.seed])
    env.close()
    return np.array(rows), np.array(beside)


def test_no_two_races_start_alike_and_the_ai_starts_like_the_agent(engine):
    (agent, beside), (ai, _) = in_process(races, engine, "agent"), in_process(races, engine, "ai")
    np.testing.assert_allclose(agent, ai, atol=0.01)
    assert len(np.unique(agent.round(3), axis=0)) == 5
    assert np.ptp(agent[:, 0]) > 0.5 and np.ptp(agent[:, 3]) > np.radians(2)
    assert np.ptp(agent[:, 4]) > 0.04  # late
    assert np.abs(agent[:, :3] - agent[:, :3].mean(0)).max() < 4
    assert np.ptp(beside[:, 0]) == 0 and beside[:, 1].tolist() == [0, 1, 2]  # nobody waits for a kart that is late


def ai_lap(engine):
    env = TuxKartEnv(engine=engine, driver="ai", step_size=0.1)
    env.reset(seed=7, options={"race": True})
    done, total = False, 0.0
    while not done:
        _, reward, terminated, truncated, info = env.step([0, 0, 0, 0])
        done, total = terminated or truncated, total + reward
    distance = env._distance
    env.close()
    return info, total, distance


def test_the_games_ai_finishes_scotland(engine):
    """An end-to-end check of the race, its clock and the reward by a driver that is not ours."""
    info, total, distance = in_process(ai_lap, engine)
    assert info["finished"] and info["end"] == "finished" and info["progress"] == 1.0
    assert 42 < info["lap_time"] < 56  # 47.3 and 48.5 s were its medians
    assert info["lap_time"] == pytest.approx(info["seconds"], abs=0.6)
    assert total == pytest.approx(0.1 * distance + 25 - 0.5 * info["seconds"], abs=1e-6)


def play(env, generator, steps):
    """Random driving, episode after episode: the newest pictures."""
    pictures = []
    for _ in range(steps):
        observation, _, terminated, truncated, _ = env.step(generator.integers([5, 3, 2, 2]))
        pictures.append(observation[-3:].copy())
        if terminated or truncated:
            env.reset()
    return np.stack(pictures)


def drive_on(engine, steps):
    """Drives two loads of the track, takes a snapshot in the middle of an episode, and drives on."""
    env, generator = TuxKartEnv(engine=engine, random_start=0.5), np.random.default_rng(0)
    env.reset(seed=3)
    play(env, generator, 20)
    env.reset(seed=4)
    play(env, generator, 200)
    snapshot = copy.deepcopy(env.snapshot)
    position = np.array([env._world.time, *env.location, env._race.config.seed])
    pictures = play(env, generator, steps)
    env.close()
    return snapshot, position, pictures


def resume(engine, snapshot, steps):
    env, generator = TuxKartEnv(engine=engine, random_start=0.5), np.random.default_rng(0)
    generator.integers([5, 3, 2, 2], size=(220, 4))  # what was driven before
    env.snapshot = snapshot
    position = np.array([env._world.time, *env.location, env._race.config.seed])
    pictures = play(env, generator, steps)
    env.close()
    return position, pictures


def test_a_snapshot_resumes_in_another_process_and_goes_on_the_same(engine):
    snapshot, position, pictures = in_process(drive_on, engine, 150)
    assert len(snapshot["episodes"]) > 1 and snapshot["loads"] == 2 and snapshot["episodes"][-1]["actions"]
    same_position, same_pictures = in_process(resume, engine, snapshot, 150)
    np.testing.assert_array_equal(position, same_position)
    np.testing.assert_array_equal(pictures, same_pictures)


def start_pictures(engine):
    env = TuxKartEnv(engine=engine)
    pictures = []
    for _ in range(2):
        pictures.append(env.reset(seed=5, options={"race": True})[0].copy())
        for _ in range(40):
            pictures.append(env.step([3, GAS, 0, 0])[0].copy())
    env.close()
    return np.stack(pictures)


def test_the_same_race_looks_the_same_in_every_process(engine):
    np.testing.assert_array_equal(in_process(start_pictures, engine), in_process(start_pictures, engine))


def filmed(engine):
    """The same race driven twice: with one picture a decision, and with three."""
    env, ways = TuxKartEnv(engine=engine), []
    for substeps in (1, 3):
        env.substeps, generator = substeps, np.random.default_rng(0)
        env.reset(seed=7, options={"race": True})
        play(env, generator, 40)
        ways.append(np.array([env._world.time, *env.location]))
    env.close()
    return ways


def test_a_film_shows_the_race_that_was_driven(engine):
    np.testing.assert_array_equal(*in_process(filmed, engine))


def test_software_rendering_hides_anisotropic_filtering(monkeypatch):
    """The environment that saves the 71-second frame is set in the worker only, and only where no GPU renders."""
    import os

    assert "MESA_EXTENSION_OVERRIDE" not in os.environ
    for gpu in (False, True):
        monkeypatch.setattr(ppo_tuxkart, "gpu_renders", lambda gpu=gpu: gpu)
        environment = {}
        monkeypatch.setattr(ppo_tuxkart.os, "environ", environment)
        monkeypatch.setattr(ppo_tuxkart, "find_assets", lambda *_: (ppo_tuxkart.Path("/"), ""))
        monkeypatch.setattr(ppo_tuxkart.importlib, "import_module", lambda name: ctypes)
        ppo_tuxkart.load_engine("pystk2", None)
        assert ("anisotropic" in environment.get("MESA_EXTENSION_OVERRIDE", "")) == (not gpu)
        assert environment.get("LP_NUM_THREADS") == (None if gpu else "0")


def with_karts(every):
    """Pictures and places of a drive, and the karts that the game has loaded."""
    find = ppo_tuxkart.find_assets
    ppo_tuxkart.find_assets = lambda engine, kart=None: find(engine, None if every else kart)
    observations, _, _, positions = drive("pystk", [[1, GAS, 1, 0]] * 40)
    return observations, positions, sys.modules["pystk"].list_karts()


@pytest.mark.skipif("pystk" not in INSTALLED, reason="pystk2 loads every kart")
def test_karts_that_do_not_race_are_not_loaded_and_make_no_difference():
    (*alone, karts), (*among_all, all_karts) = in_process(with_karts, False), in_process(with_karts, True)
    assert karts == ["tux"] and len(all_karts) > 10
    for ours, theirs in zip(alone, among_all, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def to_the_line(engine):
    """An episode that starts anywhere near the line and crosses it, and one step over the line from the start."""
    env = TuxKartEnv(engine=engine, random_start=1.0)
    for seed in range(200):
        env.reset(seed=seed)
        if env._distance < 150:
            break
    along, distance, length = env._along, env._distance, env.geometry.length
    rewards, info, line = [], {}, 0.0
    env.speed_cap = 12.0
    while not info:
        line = env._along
        heading = env._heading()
        target = env.geometry.locate(env.location)
        turn = np.angle(np.exp(1j * (target[2] - 0.03 * target[1] - heading)))
        _, reward, terminated, _, info = env.step([int(np.clip(round(2 + 4 * turn), 0, 4)), GAS, 0, 0])
        rewards.append(reward)
    env.close()
    return along, distance, length, line, rewards, terminated, info


def test_an_episode_from_anywhere_ends_at_the_line_like_a_lap(engine):
    along, distance, length, line, rewards, terminated, info = in_process(to_the_line, engine)
    assert distance == pytest.approx(length - along)
    assert info["end"] == "line" and terminated and not info["finished"] and np.isnan(info["lap_time"])
    assert length - line < 5.0  # the step before was just short of it
    assert rewards[-1] > 9.0 and max(rewards[:-1]) < 1.0
