"""World Models on CarRacing: the pictures, the networks, the search, rollouts, and whole runs as a user makes them."""

import json
import math
import os
import shutil
import signal
import time
import types
from pathlib import Path

import cma
import conftest
import imageio.v3
import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, Started, alive, call_main, metrics, slow
from gymnasium.envs.box2d.car_racing import PLAYFIELD, CarRacing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import distributions

import worldmodel_carracing as wm

# --- The environment


def random_actions(seed, count):
    rng, noise = np.random.default_rng(seed), np.zeros(3)
    for _ in range(count):
        noise = 0.9 * noise + 0.3 * rng.standard_normal(3)
        yield np.clip(noise + (0, 0.5, -0.3), (-1, 0, 0), 1).astype(np.float32)


def test_tracks_physics_and_rewards_are_gymnasiums():
    fast, real = wm.FastCarRacing(), CarRacing()
    fast.place = 0.5
    fast.reset(seed=1)
    real.reset(seed=1)
    assert fast.track[0] == real.track[len(real.track) // 2] and sorted(fast.track) == sorted(real.track)
    fast.place = 0.0
    fast.reset(seed=1)
    assert fast.track == real.track
    for action in random_actions(1, 120):
        ours, theirs = fast.step(action), real.step(action)
        assert ours[1:] == theirs[1:] and fast.tile_visited_count == real.tile_visited_count
        assert tuple(fast.car.hull.position) == tuple(real.car.hull.position)
        assert fast.car.hull.angle == real.car.hull.angle
    assert fast.tile_visited_count > 3


def test_pictures_are_near_gymnasiums():
    """Many tracks, the zoom at the start, on and off the road, at the lawn's edge, turned every way."""
    rng, errors = np.random.default_rng(0), {"zoom": [], "drive": [], "anywhere": []}
    for seed in range(4):
        env = wm.FastCarRacing()
        env.place = rng.random()
        env.reset(seed=seed)
        for t, action in enumerate(random_actions(seed, 140)):
            env.step(action)
            if t % 12 == 0:
                errors["zoom" if t < 50 else "drive"].append(picture_error(env))
        for _ in range(8):  # without physics
            moved = rng.uniform(-1, 1, 2) * PLAYFIELD * 0.95 - np.array(env.car.hull.position)
            turn = rng.uniform(-np.pi, np.pi)
            rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
            centre = np.array(env.car.hull.position)
            for body in (env.car.hull, *env.car.wheels):
                body.position = tuple(rotation @ (np.array(body.position) - centre) + centre + moved)
                body.angle += turn
            errors["anywhere"].append(picture_error(env))
    print({name: f"mean {np.mean(values):.2f}, worst {max(values):.2f}" for name, values in errors.items()})
    assert np.mean(errors["drive"]) < 1 and max(errors["drive"]) < 1.5
    assert np.mean(errors["anywhere"]) < 1 and max(errors["anywhere"]) < 1.5
    assert np.mean(errors["zoom"]) < 1.2 and max(errors["zoom"]) < 3


def picture_error(env):
    """Mean absolute error, in levels of 255, of FastCarRacing's picture of this very moment."""
    theirs = wm.shrink(CarRacing._render(env, "state_pixels"))
    ours = env._render("state_pixels")
    assert ours.shape == theirs.shape == (64, 64, 3) and ours.dtype == theirs.dtype == np.uint8
    return np.abs(ours.astype(int) - theirs).mean()


# --- Networks


def learnt(module):
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def test_parameter_counts_are_the_papers():
    agent = wm.Agent(wm.Args())
    assert learnt(agent.vision) == 4_348_547
    assert learnt(agent.memory) - learnt(agent.memory.outcome) == 422_368
    assert agent.controller.numel() == 867 and wm.Agent(wm.Args(controller_input="z")).controller.numel() == 99
    mu, logvar = agent.vision.encode(torch.zeros(2, 64, 64, 3, dtype=torch.uint8))
    assert mu.shape == logvar.shape == (2, 32) and agent.vision.decode(mu).shape == (2, 3, 64, 64)


def test_vision_loss_is_its_formula():
    torch.manual_seed(0)
    decoded, pictures = torch.rand(5, 3, 64, 64), torch.randint(0, 256, (5, 64, 64, 3)).byte()
    for scale in (0.05, 3.0):  # below and above the floor
        mu, logvar = scale * torch.randn(5, 32), scale * torch.randn(5, 32) / 3
        posterior = distributions.Normal(mu, torch.exp(logvar / 2))
        kl = distributions.kl_divergence(posterior, distributions.Normal(0.0, 1.0)).sum(1)
        error = ((decoded - pictures.permute(0, 3, 1, 2).float() / 255) ** 2).reshape(5, -1).sum(1)
        ours = wm.vision_loss(decoded, pictures, mu, logvar)
        expected = ((error + kl.clamp(min=16.0)).mean(), error.mean(), kl.mean())
        torch.testing.assert_close(ours, expected)
        assert (kl.mean() < 16) == (scale < 1)


def mixture(log_pi, mu, log_sigma):
    components = distributions.Normal(mu, log_sigma.exp())
    return distributions.MixtureSameFamily(distributions.Categorical(logits=log_pi), components)


def test_mixture_likelihood_is_torchs():
    torch.manual_seed(0)
    foretold = wm.Memory().foretell(20 * torch.randn(7, 4, 256))[:3]
    assert foretold[2].min() == wm.LOG_SIGMA[0] and foretold[2].max() <= wm.LOG_SIGMA[1]
    z = torch.randn(7, 4, 32) * 3
    torch.testing.assert_close(wm.mixture_nll(z, *foretold), -mixture(*foretold).log_prob(z).sum(-1))
    assert wm.mixture_nll(z + 1e4, *foretold).isfinite().all()


def test_memory_loss_ends_with_each_episode():
    torch.manual_seed(0)
    memory, lengths = wm.Memory(), torch.tensor([9, 4, 6])
    z, targets, rows = torch.randn(9, 3, 32), torch.randn(9, 3, 32), torch.rand(9, 3, 9)
    ours = wm.memory_loss(memory, z, targets, rows, lengths)
    for values in (z, targets, rows):
        values[torch.arange(9)[:, None] >= lengths] = 77.0
    torch.testing.assert_close(wm.memory_loss(memory, z, targets, rows, lengths), ours)
    nll = []
    for i, length in enumerate(lengths.tolist()):  # one episode at a time, one frame at a time
        state = None
        for t in range(length - 1):
            hidden, state = memory(z[t : t + 1, i : i + 1], rows[t : t + 1, i : i + 1, :3], state)
            nll.append(wm.mixture_nll(targets[t + 1, i], *memory.foretell(hidden[0, 0])[:3]) / 32)
    torch.testing.assert_close(torch.stack(nll).mean(), ours[1])


@torch.no_grad()
def test_chances_are_what_memory_foretells():
    torch.manual_seed(0)
    memory, hidden = wm.Memory(), torch.randn(1, 256).repeat(4000, 1) * 3
    z, _, _ = wm.sample_next(memory, hidden, 4000, 1.0, torch.Generator().manual_seed(1))
    expected = mixture(*memory.foretell(hidden[:1])[:3])
    off = (z.mean(0) - expected.mean[0]) / (expected.stddev[0] / 4000**0.5)
    assert off.abs().max() < 4.5
    torch.testing.assert_close(z.std(0), expected.stddev[0], rtol=0.15, atol=0)


@torch.no_grad()
def test_a_dream_of_many_is_many_dreams():
    torch.manual_seed(0)
    memory, controllers, args = wm.Memory(), torch.randn(3, 3, 289) * 0.3, wm.Args(dream_steps=20)
    z, state = torch.randn(5, 32), (torch.randn(1, 5, 256), torch.randn(1, 5, 256))

    def dream(some, seed=0):
        return wm.dream_returns(args, memory, some, z, state, seed)

    together, alone = dream(controllers), torch.cat([dream(controllers[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)
    assert torch.equal(together, dream(controllers)) and not torch.allclose(together, dream(controllers, 1))
    assert together.std() > 0


# --- The stages


def journal_with_footage(**settings):
    """What the stages need of a run: two rounds of 600 frames, in episodes of 20."""
    torch.manual_seed(0)
    args, rows = wm.Args(**settings), torch.rand(1200, 9)
    episodes = np.stack([np.arange(0, 1200, 20), np.full(60, 20)], 1)
    latents = torch.cat([torch.randn(1200, 32), torch.full((1200, 32), -9.0)], 1)
    footage = types.SimpleNamespace(rows=rows, latents=latents, episodes=episodes, newest=episodes[30:])
    state = {"stage": {"name": "dream-2", "round": 2, "step": 0}, "seconds": 0.0, "frames": 0, "scores": []}
    journal = types.SimpleNamespace(args=args, agent=wm.Agent(args), state=state, clock=time.time(), device="cpu")
    journal.write, journal.save = lambda figures: None, lambda *args, **settings: None
    return journal, footage


@torch.no_grad()
def test_a_controller_is_translated_to_ask_for_the_same():
    journal, footage = journal_with_footage()
    z, controller = footage.latents[600:, :32], torch.zeros(3, 289)
    controller[:, :32], controller[:, -1] = torch.randn(3, 32), torch.tensor([1.0, 0.0, -1.0])
    wanted, _ = wm.act(z, torch.zeros(600, 256), controller.expand(600, 3, 289))
    footage.rows[600:, 6:] = wanted
    translated = wm.translate_controller(journal.agent, footage)
    hidden, actions = torch.zeros(20, 30, 256), footage.rows[600:, :3].view(30, 20, 3).transpose(0, 1)
    hidden[1:] = journal.agent.memory(z.view(30, 20, 32).transpose(0, 1), actions)[0][:-1]
    again, actions = wm.act(z, hidden.transpose(0, 1).flatten(0, 1), translated.expand(600, 3, 289))
    assert (again - wanted).square().mean() < 0.05 * wanted.var()
    low, high = torch.tensor([[-1.0, 0, 0], [1.0, 1, 1]])
    assert ((low <= actions) & (actions <= high)).all()


def test_a_dream_ends_when_real_tracks_find_nothing_better(monkeypatch):
    settings = {"dream_generations": 40, "eval_interval": 2, "population": 4, "dream_steps": 2, "dream_starts": 2}
    journal, footage = journal_with_footage(**settings)
    returns, seen = iter((0, 5, 3, 7, 6, 7, 6)), []  # 7 at the sixth generation

    def drive(agent, controllers, jobs):
        seen.append(controllers[0])
        return [{"return": next(returns), "frames": 1}]

    journal.drivers = types.SimpleNamespace(drive=drive)
    monkeypatch.setattr(wm, "Footage", lambda journal: footage)
    assert not wm.search_in_dream(journal)
    stage = journal.state["stage"]
    assert len(seen) == 7 and torch.equal(journal.agent.controller, seen[3]) and stage["found"]["step"] == 6
    assert stage["step"] == 6 + wm.DISBELIEF * 2


# --- The search

SLOPES = 10 ** (6 * torch.linspace(0, 1, 10).double())


def rosenbrock(x):
    return (100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 - x[..., :-1]) ** 2).sum(-1)


def rastrigin(x):
    return (10 + x**2 - 10 * torch.cos(2 * math.pi * x)).sum(-1)


FUNCTIONS = {  # sigma, dimensions, candidates
    "sphere": (lambda x: (x**2).sum(-1), 1.0, 10, 10),
    "ellipsoid": (lambda x: (SLOPES * x**2).sum(-1), 1.0, 10, 10),
    "rosenbrock": (rosenbrock, 0.1, 10, 10),
    "rastrigin": (rastrigin, 2.0, 3, 80),  # of many valleys
}


def evaluations(function, sigma, n, population, seed, reference):
    """Evaluations until a candidate is below 1e-9, or infinity."""
    start = np.random.default_rng(seed).uniform(-1, 1, n)
    search = wm.CMAES(torch.from_numpy(start), sigma, population, seed)
    if reference:
        options = {"popsize": population, "seed": seed + 1, "verbose": -9, "tolfun": 0, "tolfunhist": 0}
        search = cma.CMAEvolutionStrategy(start, sigma, options | {"tolflatfitness": 99999})
    for generation in range(1, 8000 // population):
        candidates = search.ask()
        costs = function(torch.as_tensor(np.stack(candidates) if reference else candidates).double())
        if costs.min() < 1e-9:
            return generation * population
        search.tell(*([candidates, costs.tolist()] if reference else [costs]))
    return np.inf


@pytest.mark.parametrize("name", FUNCTIONS)
def test_search_needs_as_many_evaluations_as_pycma(name):
    ours = [evaluations(*FUNCTIONS[name], seed, False) for seed in range(7)]
    theirs = [evaluations(*FUNCTIONS[name], seed, True) for seed in range(7)]
    solved = [np.isfinite(counts).sum() for counts in (ours, theirs)]
    ratio = np.median(np.sort(ours)[: min(solved)]) / np.median(np.sort(theirs)[: min(solved)])
    print(f"{name}: solved {solved} of 7, median evaluations {ratio:.2f} of pycma's")
    assert min(solved) >= 4 and abs(solved[0] - solved[1]) <= 3 and 0.8 < ratio < 1.25


def test_a_search_that_was_saved_goes_on_number_for_number(tmp_path):
    def minimize(search, generations):
        for _ in range(generations):
            search.tell(rosenbrock(search.ask().flatten(1).double()))

    search, again = wm.CMAES(torch.ones(2, 5), 0.3, 8, seed=4), wm.CMAES(torch.zeros(2, 5), 1.0, 8)
    minimize(search, 7)
    wm.save({"search": vars(search)}, tmp_path / "last.pt")
    vars(again).update(load(tmp_path / "last.pt")["search"])
    for one in (search, again):
        minimize(one, 30)
    assert search.generation == 37 and search.sigma == again.sigma
    for name in ("mean", "C", "basis", "scales", "path_sigma", "path_c"):
        assert torch.equal(getattr(search, name), getattr(again, name))


def test_the_controllers_size_has_hansens_defaults():
    search = wm.CMAES(torch.zeros(3, 289), 0.1, 64)
    theirs = cma.CMAEvolutionStrategy(867 * [0], 0.1, {"popsize": 64, "verbose": -9}).sp
    assert search.mu_eff == pytest.approx(theirs.weights.mueff)
    assert [search.c_1, search.c_mu, search.c_c] == pytest.approx([theirs.c1, theirs.cmu, theirs.cc], rel=0.05)
    np.testing.assert_allclose(search.weights, theirs.weights, rtol=0.05, atol=1e-3)


# --- Rollouts, and processes that drive


def drive(slots, jobs, controllers, agent):
    return wm.drive([wm.FastCarRacing() for _ in range(slots)], agent, controllers, jobs)


def test_rollouts_in_a_batch_are_rollouts_one_by_one():
    torch.manual_seed(0)
    agent, controllers = wm.Agent(wm.Args()), torch.randn(3, 3, 289) * 0.2
    jobs = [{"seed": 50 + i, "controller": i % 3, "limit": 40 + 9 * i, "film": True} for i in range(5)]
    for i in range(3):
        jobs[i + 2] |= {"noise": (4, i), "place": 0.3}
    alone, together = drive(1, jobs, controllers, agent), drive(4, jobs, controllers, agent)
    assert [result["frames"] for result in alone] == [40, 49, 58, 67, 76]
    for one, other in zip(alone, together, strict=True):
        assert one["frames"] == other["frames"] and one["return"] == other["return"]  # to the last bit
        assert one["rows"].shape == ((one["frames"] + 1) // 2, wm.COLUMNS)  # an action lasts two frames
        np.testing.assert_array_equal(one["rows"], other["rows"])
        np.testing.assert_array_equal(one["pictures"], other["pictures"])
    assert len({result["return"] for result in alone}) == 5


def test_a_broken_pool_drives_once_more_to_the_same_results():
    torch.manual_seed(0)
    agent, controllers = wm.Agent(wm.Args()), torch.randn(2, 3, 289) * 0.2
    jobs = [{"seed": 60 + i, "controller": i % 2, "limit": 30} for i in range(4)]
    drivers = wm.Drivers(2)
    first = drivers.drive(agent, controllers, jobs)
    pool, processes = drivers.pool, list(drivers.pool._processes)
    os.kill(processes[0], signal.SIGKILL)
    again = drivers.drive(agent, controllers, jobs)
    assert drivers.pool is not pool and len({result["return"] for result in first}) > 1
    assert [result["return"] for result in again] == [result["return"] for result in first]
    drivers.pool.shutdown()


def test_giving_up_costs_what_standing_still_costs():
    controllers = torch.zeros(1, 3, 289)
    controllers[0, :, -1] = torch.tensor([0.0, -9.0, 0.0])  # no gas
    jobs = [{"seed": 7, "controller": 0, "limit": 150, "abort": abort} for abort in (True, False)]
    aborted, stood = drive(2, jobs, controllers, wm.Agent(wm.Args()))
    assert aborted["frames"] == wm.GRACE + 2 and stood["frames"] == 150
    assert aborted["return"] == pytest.approx(stood["return"])


# --- Whole runs

SMALL = """--collect-frames 300 --vision-steps 20 --memory-steps 20 --population 6 --tracks 1 --generations 3
    --dream-generations 2 --dream-starts 2 --dream-steps 10 --max-frames 60 --validation-tracks 2
    --eval-interval 2 --eval-episodes 1""".split()
KILLER = """
import os, signal

def save_and_die(contents, path, save=script.save):
    save(contents, path)
    if path.name == "last.pt" and "{name} {step}".format(**contents["stage"]) == DIE:
        os.kill(os.getpid(), signal.SIGKILL)

script.save = save_and_die
"""


def run(*args, cwd, code=0, die=None):
    """What the script says until it has ended, or kills itself after saving the stage and step `die`."""
    patch = f"DIE = {die!r}{KILLER}" if die else ""
    finished = conftest.run(*args, cwd=cwd, script="worldmodel_carracing", patch=patch)
    assert finished.returncode == code, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(folder, other, names):
    for name in names:
        ours, theirs = load(folder / f"{name}.pt"), load(other / f"{name}.pt")
        for key in ("scores", "frames", "iteration"):
            assert ours[key] == theirs[key]
        for key, weights in theirs["agent"].items():
            assert torch.equal(ours["agent"][key], weights), (name, key)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All stages of one small round, never stopped: the run's folder."""
    cwd = tmp_path_factory.mktemp("worldmodel")
    said = run(*SMALL, "--rounds", 1, "--workers", 1, "--name", "whole", cwd=cwd)
    assert "CarRacing-v3: " in said and "--resume runs/whole" in said
    return cwd / "runs" / "whole"


def test_a_whole_run_leaves_what_it_should(whole):
    names = {path.name for path in whole.iterdir()} - {path.name for path in whole.glob("events.*")}
    results = {f"{stage}-1.pt" for stage in wm.LEARN} | {"pictures.bin", "last.pt", "best.pt"}
    assert names == results | {"evaluation.json", "best_lap.mp4"}
    last, best = load(whole / "last.pt"), load(whole / "best.pt")
    assert best["score"] == max(score for _, score in last["scores"])
    kinds = {key: value.dtype for key, value in best["agent"].items()}
    assert kinds.pop("controller") == torch.float32 and set(kinds.values()) == {torch.float16}
    for value in load(whole / "memory-1.pt")["agent"].values():  # rounded, so that half precision loses nothing
        assert torch.equal(value, value.half().float())
    result = json.loads((whole / "evaluation.json").read_text())
    keys = """gymnasium box2d pygame environment checkpoint iteration seeds returns mean std standard_error frames
        finished"""
    assert list(result) == keys.split() and result["seeds"] == [1000] and len(result["returns"]) == 1
    film = imageio.v3.imread(whole / "best_lap.mp4")
    assert film.shape == ((result["frames"][0] + 1) // 2, 400, 600, 3) and film.std() > 20


def test_tensorboard_shows_everything(whole):
    rows = list(metrics(whole).values())
    tags = """vision/loss vision/squared_error vision/KL memory/loss memory/NLL_per_latent memory/reward_error
        memory/end_error dream/return_mean dream/return_best real/return_mean real/return_best search/sigma
        search/longest_axis search/shortest_axis controller/validation controller/validation_std
        collect/reward_per_frame collect/episodes charts/frames"""
    assert set().union(*rows) == set(tags.split())
    losses = [row["vision/loss"] for row in rows if "vision/loss" in row]
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert [sum(f"{place}/return_mean" in row for row in rows) for place in ("dream", "real")] == [2, 3]
    (image,) = EventAccumulator(str(whole), size_guidance={"images": 0}).Reload().Images("vision/reconstruction")
    assert (image.height, image.width) == (128, 512)


@slow
def test_killed_in_every_stage_and_resumed_is_never_killed(tmp_path):
    """Two rounds; killed seven times, with another number of workers than the run that it equals."""
    flags = [*SMALL, "--collect-frames", 1500, "--rounds", 2, "--stages", *wm.LEARN]
    run(*flags, "--workers", 2, "--name", "whole", cwd=tmp_path)
    folder, whole = tmp_path / "runs" / "killed", tmp_path / "runs" / "whole"
    deaths = ["collect-1 960", "memory-1 4", "dream-1 1", "collect-2 0", "vision-2 4", "dream-2 0", "real-2 2"]
    for number, die in enumerate(deaths):
        which = ["--resume", folder] if number else [*flags, "--name", "killed"]
        run(*which, "--workers", 1, cwd=tmp_path, die=die, code=-signal.SIGKILL)
    run("--resume", folder, "--workers", 1, "--stages", "real", cwd=tmp_path)
    names = [f"{stage}-{number}" for number in (1, 2) for stage in ("collect", "vision", "memory", "dream")]
    assert_same(folder, whole, [*names, "real-2", "best"])
    assert metrics(folder) == metrics(whole)


@slow
@pytest.mark.parametrize("stage, number", [
    ("vision", signal.SIGINT), ("real", signal.SIGTERM), ("real", signal.SIGHUP), ("real", signal.SIGKILL),
])  # fmt: skip
def test_a_run_that_is_stopped_says_how_to_go_on(stage, number, tmp_path):
    flags = ["--vision-steps", 100 if stage == "vision" else 5, "--generations", 900, "--rounds", 1, "--workers", 2]
    folder = tmp_path / "runs" / "stopped"
    settings = (*SMALL, *flags, "--name", "stopped")
    with Started(*settings, cwd=tmp_path, script="worldmodel_carracing") as started:
        started.wait_for(lambda: (folder / "last.pt").exists() and reached(folder / "last.pt", stage))
        workers = started.games()
        assert "belongs to a run that goes on" in run("--resume", folder, cwd=tmp_path, code=2)
        code, said = started.end(number)
    assert workers and not alive(workers)
    told = code == 128 + number and "Traceback" not in said and "--resume runs/stopped" in said
    assert told or number == signal.SIGKILL, said
    assert "There is a run" in run(*SMALL, "--name", "stopped", cwd=tmp_path, code=2)


def reached(path, stage):
    found = load(path)["stage"]
    return found["name"].startswith(stage) and found["step"] > 1


@slow
def test_dreams_are_filmed_and_old_checkpoints_evaluate(tmp_path):
    checkpoint = ROOT / "pretrained" / "carracing.pt"
    run("--dream", checkpoint, "--max-frames", 80, cwd=tmp_path)
    time.sleep(1)  # their folders are named by the second
    run("--evaluate", checkpoint, "--eval-episodes", 1, "--workers", 1, cwd=tmp_path)
    (path,) = (tmp_path / "runs").glob("carracing-*/dream.mp4")
    film, latents = imageio.v3.imread(path), imageio.v3.imread(path.with_name("latents.png"))
    assert film.shape == (40, 320, 960, 3) and film[:, :, :320].std() > 20 and film[38, :, 640:].std() > 5
    assert latents.shape == (16 * 64, 2 * 9 * 64, 3)
    (result,) = (tmp_path / "runs").glob("carracing-*/evaluation.json")
    assert json.loads(result.read_text())["mean"] > 850


@slow
def test_another_run_begins_with_a_checkpoints_weights(whole, tmp_path):
    given = load(whole / "best.pt")
    given["agent"]["controller"] = torch.randn(3, 289, generator=torch.Generator().manual_seed(0)) / 10
    torch.save(given, tmp_path / "given.pt")
    flags = ["--init-from", "given.pt", "--vision-steps", 0, "--memory-steps", 0, "--name", "sequel"]
    run(*SMALL, *flags, "--stages", *"collect vision memory dream".split(), "--rounds", 1, cwd=tmp_path)
    sequel = load(tmp_path / "runs/sequel/dream-1.pt")
    for key, value in given["agent"].items():  # V and M learn no more here; C is searched on
        assert key == "controller" or torch.equal(sequel["agent"][key], value.float())
    assert load(tmp_path / "runs/sequel/collect-1.pt")["stage"]["rows"][:, 6:].std() > 0.1  # C drove


# --- What is typed, and what is found on disk


@pytest.fixture
def folder(whole, tmp_path, monkeypatch):
    """A copy of the run before M has learnt, to spoil."""
    folder = tmp_path / "runs" / "spoilt"
    folder.mkdir(parents=True)
    for file in ("last.pt", "collect-1.pt", "vision-1.pt", "pictures.bin"):
        shutil.copy(whole / file, folder / file)
    monkeypatch.chdir(tmp_path)
    return folder


def another_runs(path):
    checkpoint = load(path)
    stage, name = checkpoint["stage"], "rows" if "rows" in checkpoint["stage"] else "latents"
    stage[name] = stage[name][:-1]
    torch.save(checkpoint, path)


SPOIL = {
    "missing": Path.unlink,
    "truncated": lambda path: os.truncate(path, path.stat().st_size * 2 // 3),
    "random": lambda path: path.write_bytes(os.urandom(5000)),
    "another script's": lambda path: shutil.copy(ROOT / "pretrained" / "scotland.pt", path),
    "another stage's": lambda path: shutil.copy(path.with_name("last.pt"), path),
    "another run's": another_runs,
}
FILES = [(name, kind) for name in ("collect-1.pt", "vision-1.pt") for kind in SPOIL]
FILES += [("last.pt", kind) for kind in SPOIL if "another" not in kind]  # then it goes on from the newest stage


@pytest.mark.parametrize("name, kind", FILES)
def test_no_file_is_made_up(name, kind, folder, monkeypatch, capfd):
    path = folder / name
    SPOIL[kind](path)
    spoilt = path.read_bytes() if path.exists() else None
    code, said = call_main(wm, ["--resume", "runs/spoilt", "--stages", "memory"], monkeypatch, capfd)
    assert code == 2 and ("type" in said or "add" in said), said
    assert spoilt == (path.read_bytes() if path.exists() else None) and not (folder / "memory-1.pt").exists()


def test_pictures_are_not_made_up(folder, monkeypatch, capfd):
    for file in ("pictures.bin", "vision-1.pt"):
        (folder / file).unlink()
    code, said = call_main(wm, ["--resume", "runs/spoilt", "--stages", "vision"], monkeypatch, capfd)
    assert code == 2 and "pictures.bin is not whole: type" in said and not (folder / "pictures.bin").exists()
    (folder / "pictures.bin").write_bytes(bytes(1000))
    code, said = call_main(wm, ["--resume", "runs/spoilt/last.pt", "--stages", "vision"], monkeypatch, capfd)
    assert code == 2 and "pictures.bin is not whole" in said and not (folder / "vision-1.pt").exists()


def test_a_loss_that_is_no_number_is_named(folder, monkeypatch, capfd):
    checkpoint = load(folder / "collect-1.pt")
    checkpoint["agent"]["vision.mu.bias"][0] = math.nan
    torch.save(checkpoint, folder / "collect-1.pt")
    (folder / "vision-1.pt").unlink()
    code, said = call_main(wm, ["--resume", "runs/spoilt", "--stages", "vision"], monkeypatch, capfd)
    assert code.startswith("Loss nan") and "--resume runs/spoilt" in said  # Python prints it, and exits with 1


def test_typed_settings_win(folder, monkeypatch, capfd):
    args = tyro.cli(wm.Args, args=[*wm.QUICK.split(), "--rounds", "3"])
    assert (args.rounds, args.collect_frames, args.tracks) == (3, 8000, 4)
    flags = ["--resume", folder, "--memory-steps", 3, "--stages", "memory", "--eval-seed", 5]
    assert call_main(wm, flags, monkeypatch, capfd)[0] == 0
    saved = load(folder / "memory-1.pt")
    assert saved["stage"]["step"] == saved["args"]["memory_steps"] == 3 and saved["args"]["eval_seed"] == 5
    code, said = call_main(wm, ["--resume", folder, "--controller-input", "z", "--stages", "dream"], monkeypatch, capfd)
    assert code == 2 and "other networks" in said
