"""What each part of the world model is worth: `python tests/bench/ablations.py pretrained/carracing.pt --json FILE`.

The controller is searched anew, from zero and on real tracks alone, with the checkpoint's V and M as they are and with
a part of them taken away; every search may drive the same number of frames. The settings are the checkpoint's own, so
that the candidates, the tracks and the validation are those of the script. FastCarRacing, as in learning.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import worldmodel_carracing as wm  # noqa: E402


def make_agent(path, controller_input="zh", sample_z=False, learnt_memory=True):
    """A checkpoint's V and M, or V alone and an M that has learnt nothing, without a controller."""
    checkpoint = wm.load_checkpoint(path)
    agent = wm.Agent("zh", checkpoint["args"]["action_repeat"], sample_z)
    torch.manual_seed(0)
    untrained = wm.Memory()
    wm.load_weights(agent, checkpoint, path)
    if not learnt_memory:
        agent.memory = untrained
    agent.controller_input = controller_input
    agent.controller = torch.zeros(3, 1 + wm.LATENTS + (wm.HIDDEN if controller_input == "zh" else 0))
    return agent, wm.Args(**checkpoint["args"])


def search(workers, agent, args, frames, interval, say):
    """Validations of the mean controller as [generation, frames, seconds, mean, spread], until so many frames."""
    workers.load(agent)
    shape = agent.controller.shape
    cmaes = wm.CMAES(np.zeros(shape.numel()), args.sigma, args.population, seed=args.seed)
    driven, curve, started = 0, [], time.time()

    def returns(vectors, seeds, abort):
        nonlocal driven
        controllers = torch.from_numpy(vectors).float().view(-1, *shape)
        jobs = [
            {"seed": seed, "controller": candidate, "limit": args.max_frames, "abort": abort}
            for seed in seeds
            for candidate in range(len(controllers))
        ]
        results = workers.drive(controllers, jobs)
        driven += abort * sum(result["frames"] for result in results)  # validations are not counted
        return np.array([result["return"] for result in results]).reshape(len(seeds), -1)

    while True:
        over = driven >= frames
        if cmaes.generation % interval == 0 or over:
            first = wm.VALIDATION_TRACKS
            scores = returns(cmaes.mean[None], range(first, first + args.validation_tracks), abort=False)
            curve.append([cmaes.generation, driven, time.time() - started, float(scores.mean()), float(scores.std())])
            say(f"generation {cmaes.generation}, {driven} frames: mean controller {scores.mean():.1f}")
        if over:
            return curve
        first = wm.TRAIN_TRACKS + args.seed * 10_000_000 + cmaes.generation * args.tracks
        cmaes.tell(-returns(cmaes.ask(), range(first, first + args.tracks), abort=True).mean(0))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--first-round", type=Path, help="checkpoint whose V and M have seen random driving alone")
    parser.add_argument("--frames", type=int, default=2_000_000, help="frames that each search may drive")
    parser.add_argument("--interval", type=int, default=5, help="generations between validations")
    parser.add_argument("--seeds", type=int, default=1, help="searches of each kind")
    parser.add_argument("--json", type=Path, help="file to write the curves to, after each search")
    options = parser.parse_args()
    kinds = {
        "all of it": (options.checkpoint, {}),
        "z alone": (options.checkpoint, {"controller_input": "z"}),
        "untrained M": (options.checkpoint, {"learnt_memory": False}),
        "sampled z": (options.checkpoint, {"sample_z": True}),
    }
    if options.first_round:
        kinds["V and M of the first round"] = (options.first_round, {})
    workers, curves = wm.Workers(os.cpu_count() or 1), {kind: [] for kind in kinds}
    for seed in range(1, options.seeds + 1):
        for kind, (path, settings) in kinds.items():
            agent, args = make_agent(path, **settings)
            args.seed = seed

            def say(text, kind=kind, seed=seed):
                print(f"{kind}, seed {seed}: {text}", flush=True)

            curves[kind].append(search(workers, agent, args, options.frames, options.interval, say))
            if options.json:
                versions = {name: importlib.metadata.version(name) for name in ("gymnasium", "torch", "box2d")}
                about = {"checkpoint": str(options.checkpoint), "settings": wm.args_to_plain(args)} | versions
                options.json.write_text(json.dumps(about | {"curves": curves}) + "\n")
    workers.close()
    print(f"\n{'':28}{'generations':>12}{'frames':>10}{'validation':>12}")
    for kind, of in curves.items():
        for curve in of:
            generation, driven, _, mean, _ = curve[-1]
            print(f"{kind:28}{generation:12}{driven:10}{mean:12.1f}")


if __name__ == "__main__":
    main()
