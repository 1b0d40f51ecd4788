"""World Models on CarRacing: the pictures, the networks, the search, rollouts, and whole runs as a user makes them."""

import json
import sys
import time
import types

import imageio.v3
import numpy as np
import pytest
import torch
from conftest import SIGINT, SIGKILL, alive, metrics, run, start_and_signal
from gymnasium.envs.box2d.car_racing import PLAYFIELD, CarRacing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_networks import source
from torch import distributions

import ppo_tuxkart
import worldmodel_carracing as wm

SCRIPT = {"script": "worldmodel_carracing"}


# --- The environment


def random_actions(seed, count):
    rng, noise = np.random.default_rng(seed), np.zeros(3)
    for _ in range(count):
        noise = 0.9 * noise + 0.3 * rng.standard_normal(3)
        yield np.clip(noise + (0, 0.5, -0.3), (-1, 0, 0), 1).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_tracks_physics_and_rewards_are_gymnasiums(seed):
    fast, real = wm.FastCarRacing(), CarRacing()
    fast.reset(seed=seed)
    real.reset(seed=seed)
    assert fast.track == real.track
    for action in random_actions(seed, 120):
        ours, theirs = fast.step(action), real.step(action)
        assert ours[1:] == theirs[1:] and fast.tile_visited_count == real.tile_visited_count
        assert tuple(fast.car.hull.position) == tuple(real.car.hull.position)
        assert fast.car.hull.angle == real.car.hull.angle
    assert fast.tile_visited_count > 3
    assert [tuple(tile.color.astype(int)) for tile in fast.road] == [
        tuple(tile.color.astype(int)) for tile in real.road
    ]


def test_pictures_are_near_gymnasiums():
    """Many tracks, the zoom at the start, on and off the road, at the lawn's edge, turned every way."""
    rng, errors = np.random.default_rng(0), {"zoom": [], "drive": [], "anywhere": []}
    for seed in range(6):
        env = wm.FastCarRacing()
        env.reset(seed=seed, options={"place": rng.random()})
        for t, action in enumerate(random_actions(seed, 140)):
            env.step(action)
            if t % 12 == 0:
                errors["zoom" if t < 50 else "drive"].append(picture_error(env))
        for _ in range(8):  # without physics: wherever, whatever the wheels do
            moved = rng.uniform(-1, 1, 2) * PLAYFIELD * 0.95 - np.array(env.car.hull.position)
            turn = rng.uniform(-np.pi, np.pi)
            for body in (env.car.hull, *env.car.wheels):
                body.position = tuple(np.array(body.position) + moved)
            centre = np.array(env.car.hull.position)
            rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
            for body in (env.car.hull, *env.car.wheels):
                body.position = tuple(rotation @ (np.array(body.position) - centre) + centre)
                body.angle += turn
            for wheel in env.car.wheels:
                wheel.phase = rng.uniform(0, 20)
            errors["anywhere"].append(picture_error(env))
    print({name: f"mean {np.mean(values):.2f}, worst {max(values):.2f}" for name, values in errors.items()})
    assert np.mean(errors["drive"]) < 0.8 and max(errors["drive"]) < 1.5
    assert np.mean(errors["anywhere"]) < 0.8 and max(errors["anywhere"]) < 1.5
    assert np.mean(errors["zoom"]) < 1.2 and max(errors["zoom"]) < 3


def picture_error(env):
    """Mean absolute error, in levels of 255, of FastCarRacing's picture of this very moment."""
    theirs = wm.shrink(CarRacing._render(env, "state_pixels"))
    ours = env._render("state_pixels")
    assert ours.shape == theirs.shape == (64, 64, 3) and ours.dtype == theirs.dtype == np.uint8
    return np.abs(ours.astype(int) - theirs).mean()


def test_shrinking_averages_areas():
    picture = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    large = picture[:84].repeat(16, 0).repeat(2, 1).astype(float)  # 84 * 16 and 96 * 2 are multiples of 64
    means = large.reshape(64, 21, 64, 3, 3).mean((1, 3))
    assert np.abs(wm.shrink(picture) - means).max() <= 0.5 + 1e-3


def test_a_start_anywhere_is_on_the_track():
    env = wm.FastCarRacing()
    env.reset(seed=4)
    track = env.track
    env.reset(seed=4, options={"place": 0.5})
    assert env.track[0] == track[len(track) // 2] and sorted(env.track) == sorted(track)
    assert np.hypot(*(np.array(env.car.hull.position) - env.track[0][2:])) < 1


# --- Networks


def learnt(module):
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def test_parameter_counts_are_the_papers():
    agent = wm.Agent("zh")
    assert learnt(agent.vision) == 4_348_547
    assert learnt(agent.memory) - learnt(agent.memory.outcome) == 422_368
    assert agent.controller.numel() == 867 and wm.Agent("z").controller.numel() == 99
    mu, logvar = agent.vision.encode(torch.zeros(2, 64, 64, 3, dtype=torch.uint8))
    assert mu.shape == logvar.shape == (2, 32) and agent.vision.decode(mu).shape == (2, 3, 64, 64)


def test_vision_loss_is_its_formula():
    torch.manual_seed(0)
    decoded, pictures = torch.rand(2, 5, 3, 64, 64)
    for scale in (0.05, 3.0):  # below and above the floor
        mu, logvar = scale * torch.randn(5, 32), scale * torch.randn(5, 32) / 3
        posterior = distributions.Normal(mu, torch.exp(logvar / 2))
        kl = distributions.kl_divergence(posterior, distributions.Normal(0.0, 1.0)).sum(1)
        error = ((decoded - pictures) ** 2).reshape(5, -1).sum(1)
        ours = wm.vision_loss(decoded, pictures, mu, logvar)
        torch.testing.assert_close(ours[0], (error + kl.clamp(min=16.0)).mean())
        torch.testing.assert_close(ours[1], error.mean())
        torch.testing.assert_close(ours[2], kl.mean())
        assert (kl.mean() < 16) == (scale < 1)


def test_mixture_likelihood_is_torchs():
    torch.manual_seed(0)
    memory = wm.Memory()
    log_pi, mu, log_sigma, _, _ = memory.foretell(20 * torch.randn(7, 4, 256))
    assert log_sigma.min() == wm.LOG_SIGMA[0] and log_sigma.max() <= wm.LOG_SIGMA[1]
    z = torch.randn(7, 4, 32) * 3
    mixture = distributions.MixtureSameFamily(
        distributions.Categorical(logits=log_pi), distributions.Normal(mu, log_sigma.exp())
    )
    torch.testing.assert_close(wm.mixture_nll(z, log_pi, mu, log_sigma), -mixture.log_prob(z).sum(-1))
    far = wm.mixture_nll(z + 1e4, log_pi, mu, log_sigma)
    assert far.isfinite().all()


def test_memory_loss_ends_with_each_episode():
    torch.manual_seed(0)
    memory, lengths = wm.Memory(), torch.tensor([9, 4, 6])
    z, targets, actions = torch.randn(9, 3, 32), torch.randn(9, 3, 32), torch.rand(9, 3, 3)
    rewards, ends = torch.randn(9, 3), (torch.rand(9, 3) < 0.3).float()
    ours = wm.memory_loss(memory, z, targets, actions, rewards, ends, lengths)
    padding = torch.arange(9)[:, None] >= lengths
    for values in (z, targets, actions, rewards, ends):
        values[padding] = 77.0
    for before, after in zip(ours, wm.memory_loss(memory, z, targets, actions, rewards, ends, lengths), strict=True):
        torch.testing.assert_close(after, before)
    nll = []
    for i, length in enumerate(lengths.tolist()):  # one episode at a time, one frame at a time
        state = None
        for t in range(length - 1):
            hidden, state = memory(z[t : t + 1, i : i + 1], actions[t : t + 1, i : i + 1], state)
            foretold = memory.foretell(hidden[0, 0])[:3]
            nll.append(wm.mixture_nll(targets[t + 1, i], *foretold) / 32)
    torch.testing.assert_close(torch.stack(nll).mean(), ours[1])


def test_actions_are_in_carracings_range():
    actions = wm.squash(torch.tensor([[-99.0, -99, -99], [99, 99, 99], [0, 0, 0]]))
    assert actions.tolist() == [[-1, 0, 0], [1, 1, 1], [0, 0.5, 0]]


def test_chances_are_what_memory_foretells():
    torch.manual_seed(0)
    memory, hidden = wm.Memory(), torch.randn(1, 256).repeat(4000, 1) * 3
    with torch.no_grad():
        chance = {"generator": torch.Generator().manual_seed(1), "device": "cpu"}
        z, _, _ = wm.sample_next(memory, hidden, 4000, 1.0, chance)
        log_pi, mu, log_sigma, _, _ = memory.foretell(hidden[:1])
    mixture = distributions.MixtureSameFamily(
        distributions.Categorical(logits=log_pi), distributions.Normal(mu, log_sigma.exp())
    )
    off = (z.mean(0) - mixture.mean[0]) / (mixture.stddev[0] / 4000**0.5)
    assert off.abs().max() < 4.5
    torch.testing.assert_close(z.std(0), mixture.stddev[0], rtol=0.15, atol=0)


@torch.no_grad()
def test_a_dream_of_many_is_many_dreams():
    torch.manual_seed(0)
    memory, controllers = wm.Memory(), torch.randn(3, 3, 289) * 0.3
    z, state = torch.randn(5, 32), (torch.randn(1, 5, 256), torch.randn(1, 5, 256))

    def dream(some, seed=0):
        chance = torch.Generator().manual_seed(seed)
        return wm.dream_returns(memory, some, z, state, 20, 1.2, 0.1, chance)

    together = dream(controllers)
    torch.testing.assert_close(
        together, torch.cat([dream(controllers[i : i + 1]) for i in range(3)]), rtol=1e-3, atol=1e-4
    )
    assert torch.equal(together, dream(controllers)) and not torch.allclose(together, dream(controllers, 1))
    assert together.std() > 0


def run_with_footage(folder):
    """What the stages need of a run: two rounds of 600 frames, the first of them black, in episodes of 20."""
    torch.manual_seed(0)
    agent, chance = wm.Agent("zh"), np.random.default_rng(0)
    with torch.no_grad():
        agent.vision.mu.weight *= 30  # an untrained V hardly tells pictures apart
    footage = wm.Footage(folder / "data", 600)
    footage.open(2)
    footage.pictures[1][:] = chance.integers(0, 256, footage.pictures[1].shape)
    for rows in footage.rows:
        rows[:, :3] = chance.uniform(0, 1, (600, 3))
        rows[::20, 4] = 1
    settings = {"agent": agent, "footage": footage, "device": torch.device("cpu"), "args": wm.Args(dream_starts=30)}
    settings |= {"randomness": lambda *numbers: np.random.default_rng(numbers), "tqdm": lambda things, **_: things}
    return types.SimpleNamespace(**settings)


@torch.no_grad()
def test_dreams_start_where_the_newest_footage_was(tmp_path):
    run = run_with_footage(tmp_path)
    z, (hidden, _) = wm.dream_starts(run, 2, 0)
    newest = run.agent.vision.encode(run.footage.take(np.arange(600, 1200)))[0]
    found = torch.cdist(z, newest).min(1)
    torch.testing.assert_close(z, newest[found.indices], rtol=1e-4, atol=1e-4)
    for start, frame in enumerate(found.indices.tolist()):  # with the state that M has when it comes there
        first, state = frame // 20 * 20, None
        actions = torch.from_numpy(run.footage.rows[1][first:frame, None, :3])
        if frame > first:
            _, state = run.agent.memory(newest[first:frame, None], actions)
        expected = state[0][0, 0] if state else torch.zeros(256)
        torch.testing.assert_close(hidden[0, start], expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_controller_is_translated_to_ask_for_the_same(tmp_path):
    run = run_with_footage(tmp_path)
    z, controller = run.agent.vision.encode(run.footage.take(np.arange(600, 1200)))[0], torch.zeros(3, 289)
    controller[:, :32], controller[:, -1] = torch.randn(3, 32), torch.tensor([1.0, 0.0, -1.0])
    wanted = wm.wanted_actions(z, torch.zeros(600, 256), controller.expand(600, 3, 289))
    run.footage.rows[1][:, 6:] = wanted.numpy()
    translated = wm.translate_controller(run, 2)
    hidden = torch.zeros(30, 20, 256)
    actions = torch.from_numpy(run.footage.rows[1][:, :3]).view(30, 20, 3)
    hidden[:, 1:] = run.agent.memory(z.view(30, 20, 32).transpose(0, 1), actions.transpose(0, 1))[0][:-1].transpose(
        0, 1
    )
    again = wm.wanted_actions(z, hidden.flatten(0, 1), translated.expand(600, 3, 289))
    assert (again - wanted).square().mean() < 0.05 * wanted.var()


def test_memory_meets_all_frames_equally_often(tmp_path, monkeypatch):
    run, caught = run_with_footage(tmp_path), []
    run.footage.rows[1][:, 4] = np.arange(600) % 300 == 0  # as many frames as in the first round, in 2 episodes, not 30
    monkeypatch.setattr(wm, "learn", lambda run, round_, stage, minibatch, *rest, **more: caught.append(minibatch))
    monkeypatch.setattr(wm, "memory_loss", lambda *inputs: inputs[6])
    wm.stage_memory(run, 2)
    lengths = torch.cat([caught[0](np.random.default_rng(seed)) for seed in range(60)])
    assert set(lengths.tolist()) == {20, 300}
    assert abs((lengths == 300).float().mean() - 0.5) < 0.08  # 960 draws


def test_a_dream_ends_when_real_tracks_find_nothing_better(tmp_path, monkeypatch):
    run, rows, seen = run_with_footage(tmp_path), [], []
    run.args = wm.Args(dream_generations=40, eval_interval=2, population=4, dream_steps=2, dream_starts=2)
    run.state = {"step": 0, "search": None, "stage_best": None, "best": None, "scores": [], "frames": 0, "elapsed": 0.0}
    run.workers = run.logger = run.bar = wm.Silence()
    run.start_bar, run.knows_nothing, run.save_best = lambda *_: run.bar, lambda round_: True, lambda score: None
    run.log, run.clock, run.iteration = rows.append, time.time(), 0
    scores = iter((0, 5, 3, 7, 6, 7, 6))  # 7 at the sixth generation
    monkeypatch.setattr(wm, "validate", lambda run, controller: (seen.append(controller.clone()), (next(scores), 0))[1])
    assert wm.stage_controller(run, 1)
    assert sum("dream/return_mean" in row for row in rows) == 6 + wm.DISBELIEF * 2
    assert len(seen) == 7 and torch.equal(run.agent.controller, seen[3]) and run.state["best"] == 7


# --- The search

FUNCTIONS = {
    "sphere": (lambda x: (x**2).sum(-1), 10, 1e-9, 1.0),
    "ellipsoid": (lambda x: (10 ** (6 * np.linspace(0, 1, 10)) * x**2).sum(-1), 10, 1e-9, 1.0),
    "rosenbrock": (
        lambda x: (100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 - x[..., :-1]) ** 2).sum(-1),
        10,
        1e-9,
        0.1,
    ),
    "rastrigin": (lambda x: (10 + x**2 - 10 * np.cos(2 * np.pi * x)).sum(-1), 400, 1e-3, 2.0),
}


def evaluations(function, population, target, sigma, seed, active, reference):
    """Evaluations until a candidate is below the target, or infinity."""
    start = np.random.default_rng(seed).uniform(-1, 1, 10) * (3 if population > 10 else 1)
    if reference:
        import cma

        options = {"popsize": population, "CMA_active": active, "seed": seed + 1, "verbose": -9, "tolfun": 0}
        search = cma.CMAEvolutionStrategy(start, sigma, options | {"tolfunhist": 0, "tolflatfitness": 99999})
    else:
        search = wm.CMAES(start, sigma, population, seed, active)
    for generation in range(1, (8000 if population < 20 else 48_000) // population):
        candidates = search.ask()
        costs = function(np.array(candidates))
        if costs.min() < target:
            return generation * population
        if reference:
            search.tell(candidates, costs.tolist())
        else:
            search.tell(costs)
    return np.inf


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_search_needs_as_many_evaluations_as_pycma(name, active):
    function, population, target, sigma = FUNCTIONS[name]
    ours, theirs = (
        [evaluations(function, population, target, sigma, seed, active, reference) for seed in range(7)]
        for reference in (False, True)
    )
    solved = [np.isfinite(counts).sum() for counts in (ours, theirs)]
    ratio = np.median(np.sort(ours)[: min(solved)]) / np.median(np.sort(theirs)[: min(solved)])
    print(f"{name}, active {active}: solved {solved} of 7, median evaluations {ratio:.2f} of pycma's")
    assert min(solved) >= 4 and abs(solved[0] - solved[1]) <= 3
    assert 0.8 < ratio < 1.25


def test_a_restored_search_goes_on_as_if_never_stopped():
    function = FUNCTIONS["ellipsoid"][0]
    first = wm.CMAES(np.ones(10), 0.5, 12, seed=3)
    for _ in range(7):
        first.tell(function(first.ask()))
    second = wm.CMAES(np.zeros(10), 9.0, 12, seed=3)
    second.restore(first.state())
    for _ in range(9):
        np.testing.assert_array_equal(first.ask(), second.ask())
        for search in (first, second):
            search.tell(function(search.ask()))
    assert first.sigma == second.sigma and (first.C == second.C).all()


def test_the_controllers_size_has_hansens_defaults():
    search = wm.CMAES(np.zeros(867), 0.1, 64)
    import cma

    theirs = cma.CMAEvolutionStrategy(867 * [0], 0.1, {"popsize": 64, "verbose": -9}).sp
    assert search.mu_eff == pytest.approx(theirs.weights.mueff)
    assert [search.c_1, search.c_mu, search.c_c] == pytest.approx([theirs.c1, theirs.cmu, theirs.cc], rel=0.05)
    np.testing.assert_allclose(search.weights, theirs.weights, rtol=0.05, atol=1e-3)


# --- Rollouts


@torch.no_grad()
def drive(slots, jobs, controllers, agent):
    for index, job in enumerate(jobs):
        job["index"] = index
    waiting = iter(jobs)
    envs = [wm.FastCarRacing() for _ in range(slots)]
    results = wm.drive(envs, agent, controllers, lambda: next(waiting, None))
    return sorted(results, key=lambda result: result["index"])


@pytest.mark.parametrize("sample_z", [False, True])
def test_rollouts_in_a_batch_are_rollouts_one_by_one(sample_z):
    torch.manual_seed(0)
    agent, controllers = wm.Agent("zh"), torch.randn(3, 3, 289) * 0.2
    agent.sample_z = sample_z
    jobs = [{"seed": 50 + i, "controller": i % 3, "limit": 40 + 9 * i, "keep": True} for i in range(5)]
    jobs[3]["noise"] = (4, 2)
    if not sample_z:
        jobs[4] |= {"controller": None, "noise": (4, 0), "place": 0.3}
    alone, together = drive(1, jobs, controllers, agent), drive(4, jobs, controllers, agent)
    assert [result["frames"] for result in alone] == [40, 49, 58, 67, 76]
    for one, other in zip(alone, together, strict=True):
        assert one["frames"] == other["frames"] and one["return"] == other["return"]  # to the last bit
        assert len(one["rows"]) == (one["frames"] + 1) // 2  # an action lasts two frames
        np.testing.assert_array_equal(one["rows"], other["rows"])
        np.testing.assert_array_equal(one["pictures"], other["pictures"])
    assert len({result["return"] for result in alone}) == 5


def test_giving_up_costs_what_standing_still_costs():
    controllers = torch.zeros(1, 3, 289)
    controllers[0, :, -1] = torch.tensor([0.0, -9.0, 0.0])  # no gas
    jobs = [{"seed": 7, "controller": 0, "limit": 150, "abort": abort} for abort in (True, False)]
    aborted, stood = drive(2, jobs, controllers, wm.Agent("zh"))
    assert aborted["frames"] == wm.GRACE + 2 and stood["frames"] == 150
    assert aborted["return"] == pytest.approx(stood["return"])


# --- Whole runs

LEARN = ("collect", "vision", "memory", "controller")
SMALL = ["--collect-frames", 300, "--vision-steps", 30, "--vision-batch", 20, "--memory-steps", 20]
SMALL += ["--memory-batch", 4, "--population", 6, "--tracks", 1, "--generations", 3]
SMALL += ["--dream-generations", 2, "--dream-starts", 2, "--dream-steps", 10, "--max-frames", 80]
SMALL += ["--validation-tracks", 2, "--eval-interval", 2, "--rounds", 2, "--eval-episodes", 2]


def rows_of(folder):
    clock = {"dream/frames_per_second", "real/frames_per_second", "real/tracks_per_hour"}
    return [{key: value for key, value in row.items() if key not in clock} for row in metrics(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All stages of two small rounds, never stopped: the working folder and the run's."""
    cwd = tmp_path_factory.mktemp("worldmodel")
    finished = run(*SMALL, "--name", "whole", "--workers", 2, cwd=cwd, **SCRIPT)
    assert finished.returncode == 0, finished.stderr
    assert "GB of disk" in finished.stdout and "CarRacing-v3: " in finished.stdout
    return cwd, cwd / "runs" / "whole"


def test_a_whole_run_leaves_what_it_should(whole):
    folder = whole[1]
    names = {path.name for path in folder.iterdir()} - {path.name for path in folder.glob("events.*")}
    assert names == {"config.json", "metrics.jsonl", "last.pt", "best.pt", "data", "evaluation.json", "best_lap.mp4"}
    last, best = (torch.load(folder / name, weights_only=True) for name in ("last.pt", "best.pt"))
    assert last["done"] == [[round_, stage] for round_ in (1, 2) for stage in LEARN]
    assert last["best"] == best["score"] == max(score for _, score in last["scores"])
    assert (folder / "best.pt").stat().st_size < 12e6
    kinds = {key: value.dtype for key, value in best["agent"].items()}
    assert kinds.pop("controller") == torch.float32 and set(kinds.values()) == {torch.float16}
    for key, value in last["agent"].items():  # rounded already, so that half precision changes nothing
        assert key == "controller" or torch.equal(value, value.half().float())
    assert json.loads((folder / "config.json").read_text())["made_on"]["gymnasium"]
    rows = rows_of(folder)
    losses = [row["vision/loss"] for row in rows if "vision/loss" in row]
    assert losses[-1] < losses[0] and len(losses) == 10 + 15  # 30 minibatches, then a half of them
    dreams, real = (sum(f"{kind}/return_mean" in row for row in rows) for kind in ("dream", "real"))
    assert (dreams, real) == (2 + 2, 3)  # every round dreams, the last one drives
    assert rows[-1]["charts/frames"] > 2 * 2 * 300  # driving for footage counts


def test_evaluation_is_gymnasiums_own(whole):
    cwd, folder = whole
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["seeds"] == [1000, 1001] and len(result["returns"]) == len(result["frames"]) == 2
    assert result["environment"] == "CarRacing-v3" and result["gymnasium"] and result["box2d"]
    assert result["mean"] == pytest.approx(np.mean(result["returns"]))
    assert result["standard_error"] == pytest.approx(np.std(result["returns"], ddof=1) / 2**0.5)
    film = imageio.v3.imread(folder / "best_lap.mp4")
    assert film.shape[1:] == (400, 600, 3) and film.std() > 20
    assert (
        len(film) == (result["frames"][int(np.argmax(result["returns"]))] + 1) // 2
    )  # it films the lap that it scored
    flags = ["--eval-episodes", 1, "--eval-seed", 1001, "--eval-fast"]
    finished = run("--evaluate", folder / "best.pt", *flags, cwd=cwd, **SCRIPT)
    assert finished.returncode == 0, finished.stderr
    (written,) = (cwd / "runs").glob("best-carracing-*")
    again = json.loads((written / "evaluation.json").read_text())
    assert again["returns"] == result["returns"][1:] and len(again["fast"]["returns"]) == 1


def test_another_run_begins_with_a_checkpoints_weights(whole):
    cwd, folder = whole
    given = torch.load(folder / "best.pt", weights_only=True)
    given["agent"]["controller"] = torch.randn(3, 289, generator=torch.Generator().manual_seed(0)) / 10
    torch.save(given, cwd / "given.pt")
    flags = [*SMALL, "--rounds", 1, "--workers", 1, "--init-from", "given.pt", "--stages", *LEARN, "--name", "sequel"]
    refused = run(*flags, "--action-repeat", 3, cwd=cwd, **SCRIPT)
    assert refused.returncode == 2 and "type --action-repeat 2" in refused.stderr and not (cwd / "runs/sequel").exists()
    finished = run(*flags, "--vision-steps", 0, "--memory-steps", 0, cwd=cwd, **SCRIPT)
    assert finished.returncode == 0, finished.stderr
    sequel = torch.load(cwd / "runs/sequel/last.pt", weights_only=True)
    assert sequel["args"]["init_from"] == "given.pt" and sequel["scores"]
    for key, value in given["agent"].items():  # V and M learn no more here; C is searched on
        assert key == "controller" or torch.equal(sequel["agent"][key], value.float())
    wanted = np.load(cwd / "runs/sequel/data/rows-1.npy")[:, 6:]
    assert np.isfinite(wanted).all() and wanted.std() > 0.1  # the controller drove for the footage


def test_dreams_are_filmed(whole):
    cwd, folder = whole
    finished = run("--dream", folder / "best.pt", cwd=cwd, **SCRIPT)
    assert finished.returncode == 0, finished.stderr
    (written,) = (cwd / "runs").glob("best-dream-*")
    film = imageio.v3.imread(written / "dream.mp4")
    assert film.shape == (40, 320, 960, 3) and film[:, :, :320].std() > 20 and film[38, :, 640:].std() > 5
    assert imageio.v3.imread(written / "latents.png").shape == (16 * 64, 2 * 9 * 64, 3)


def test_tensorboard_says_what_metrics_jsonl_says(whole):
    board = EventAccumulator(str(whole[1]), size_guidance={"scalars": 0, "images": 0, "histograms": 0}).Reload()
    rows = [json.loads(line) for line in (whole[1] / "metrics.jsonl").read_text().splitlines()]
    tags = set(board.Tags()["scalars"]) - {"score_against_frames"}
    assert {"vision/KL", "memory/NLL_per_latent", "dream/return_mean", "real/return_best", "search/sigma"} <= tags
    for tag in tags:
        written = [(row["global_step"], row[tag]) for row in rows if tag in row]
        np.testing.assert_allclose([(event.step, event.value) for event in board.Scalars(tag)], written, rtol=1e-5)
    assert len(board.Scalars("score_against_frames")) >= 4
    assert "search/axes" in board.Tags()["histograms"]
    assert any(tag.startswith("vision/reconstruction") for tag in board.Tags()["images"])
    dreams = [imageio.v3.imread(event.encoded_image_string) for event in board.Images("dream")]
    assert [dream.shape for dream in dreams] == 2 * [(10, 64, 64, 3)] and np.ptp(dreams[0]) > 0  # one in each round


def test_killed_and_resumed_is_never_killed(whole):
    """Killed while V learns and while C is searched; with another number of workers than the run that it equals."""
    cwd, expected = whole[0], rows_of(whole[1])
    folder, where = cwd / "runs" / "killed", {"cwd": cwd, **SCRIPT}
    learn = ["--stages", *LEARN, "--workers", 1]
    process, _, workers = start_and_signal(SIGKILL, 4, folder, *SMALL, *learn, "--name", "killed", **where)
    assert process.returncode == -SIGKILL and workers and not alive(workers)
    assert torch.load(folder / "last.pt", weights_only=True)["done"] == [[1, "collect"]]
    real = next(number for number, row in enumerate(expected, 1) if "real/return_mean" in row)
    process, _, workers = start_and_signal(SIGKILL, real, folder, "--resume", folder, *learn, **where)
    assert process.returncode == -SIGKILL and not alive(workers)
    assert torch.load(folder / "last.pt", weights_only=True)["done"][-1] == [2, "memory"]
    resumed = run("--resume", folder, *learn, **where)
    assert resumed.returncode == 0, resumed.stderr
    assert rows_of(folder) == expected
    ours, theirs = (torch.load(path / "last.pt", weights_only=True) for path in (folder, whole[1]))
    for key, weights in theirs["agent"].items():
        assert torch.equal(ours["agent"][key], weights)
    assert ours["scores"] == theirs["scores"]


def test_ctrl_c_says_how_to_go_on(tmp_path):
    folder = tmp_path / "runs" / "stopped"
    process, output, workers = start_and_signal(SIGINT, 2, folder, *SMALL, "--name", "stopped", cwd=tmp_path, **SCRIPT)
    assert process.returncode == 0 and "Traceback" not in output, output
    assert f"--resume {folder.relative_to(tmp_path)}" in output and not alive(workers)
    refused = run("--resume", folder, "--population", 9, cwd=tmp_path, **SCRIPT)
    assert refused.returncode == 2 and "--population" in refused.stderr
    refused = run("--resume", folder, "--stages", "controller", cwd=tmp_path, **SCRIPT)
    assert refused.returncode == 2 and "--stages vision memory controller" in refused.stderr
    refused = run(*SMALL, "--name", "stopped", cwd=tmp_path, **SCRIPT)
    assert refused.returncode == 2 and "--resume" in refused.stderr


# --- The command line

MISTAKES = {
    "--population 1": "--population is 1: type a number from 4 to 10000",
    "--max-frames 2000": "from 60 to 1000",
    "--stages vision": "type --stages collect vision",
    "--stages evaluate": "type --stages collect vision memory controller evaluate",
    "--stages collect vision memory evaluate": "evaluate needs controller first: type --stages collect vision memory c",
    "--stages collect controller": "controller needs vision and memory first: type --stages collect vision memory c",
    "--stages drive": "Invalid choice",
    "--stages": "--stages names none: type some of collect vision",
    "--collect-frames 900000000000": "type a smaller --collect-frames",
    "--quick --temperature 0": "--temperature is 0.0",
    "--action-repeat 0": "--action-repeat is 0: type a number from 1 to 10",
    "--evaluate nothing.pt": "There is no checkpoint nothing.pt",
    "--dream text.pt": "text.pt is not a checkpoint",
    "--evaluate foreign.pt": "foreign.pt is not a checkpoint of this script",
    "--resume runs/nothing": "There is no checkpoint runs/nothing/last.pt",
    "--no-such-flag": "Unrecognized",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_are_one_sentence(arguments, tmp_path, monkeypatch, capfd):
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    files = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["worldmodel_carracing.py", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        wm.main()
    assert stop.value.code == 2
    said = "".join(capfd.readouterr())
    assert MISTAKES[arguments] in " ".join(said.replace("│", " ").split()) and "Traceback" not in said
    assert sorted(tmp_path.iterdir()) == files


def test_quick_leaves_what_was_typed():
    args, _ = wm.parse(["--quick", "--rounds", "2", "--tracks", "4"])
    assert (args.rounds, args.tracks, args.collect_frames) == (2, 4, wm.QUICK["collect_frames"])


def test_help_explains_every_flag(tmp_path):
    finished = run("--help", cwd=tmp_path, **SCRIPT)
    assert finished.returncode == 0
    said = " ".join(finished.stdout.replace("│", " ").split())
    for field in wm.dataclasses.fields(wm.Args):
        assert f"--{field.name.replace('_', '-')}" in said
    assert "python worldmodel_carracing.py --quick" in said


def test_what_the_scripts_share_is_the_same_to_the_letter():
    first, second = source(ppo_tuxkart), source(wm)
    same = {"UsageError", "save_atomically", "fits", "note_differences", "Logger", "pick_device", "join_ranks"}
    assert {name for name in first if first[name] == second.get(name)} == same
