"""What torchrun's ranks bring, and what they cost: python tests/bench/ranks.py --out ranks.json

Trains for some iterations with every number of ranks and games given, in turns; the table gives medians of decisions/s
(all ranks together) and of the seconds that an iteration samples and learns. Then times one all-reduce of the network's
gradient, and of one number, between processes of this machine (gloo), and says with the usual model of a ring,

    seconds(bytes, n) = 2 (n - 1) latency + 2 (n - 1) / n * bytes / bandwidth,

from how many machines on, each with all of these cores, communication takes 10% of an iteration: with what was
measured here, and with the latency and bandwidth of some networks.
"""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
import torch.multiprocessing
import tyro
from processes import end_all

import ppo_tuxkart

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = {
    "1 Gbit/s, 100 us": (1e-4, 1.25e8),
    "10 Gbit/s, 50 us": (5e-5, 1.25e9),
    "100 Gbit/s, 10 us": (1e-5, 1.25e10),
}


@dataclasses.dataclass
class Ranks:
    points: tuple[str, ...] = ("1x8", "2x4", "1x16", "2x8")
    """ranks x games of each"""
    iterations: int = 24
    """iterations of each training; the first four do not count, and 32 would reload the games"""
    rounds: int = 3
    """trainings of each"""
    messages: int = 200
    """all-reduces that are timed"""
    processes: tuple[int, ...] = (2, 4)
    """processes that all-reduce; 2 are needed for the model"""
    out: Path | None = None
    """JSON file to write"""


def train(settings, ranks, games):
    """Medians over the iterations of one training."""
    args = ppo_tuxkart.Args()
    total = settings.iterations * ranks * games * args.num_steps
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(ROOT / "ppo_tuxkart.py"), "--num-envs", str(games), "--eval-interval", "0", "--name", "ranks"]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
        try:
            subprocess.run([*command, "--total-timesteps", str(total)], cwd=folder, check=True, env=environment,
                           capture_output=True)  # fmt: skip
        finally:
            end_all()
        lines = (Path(folder) / "runs" / "ranks" / "metrics.jsonl").read_text().splitlines()[4:]
    rows = [json.loads(line) for line in lines]
    rate, sampling, learning = (
        statistics.median(row[f"charts/{key}"] for row in rows) for key in ("SPS", "sampling_SPS", "update_seconds")
    )
    return {"rate": rate, "sampling_seconds": total / settings.iterations / sampling, "update_seconds": learning}


def all_reduce(rank, world, file, sizes, messages, found):
    """One of the processes: rank 0 puts the median seconds for each size, in numbers of 4 bytes, into `found`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    for size in sizes:
        tensor, seconds = torch.ones(size), []
        for _ in range(messages):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(tensor)
            seconds.append(time.perf_counter() - started)
            tensor.fill_(1)
        if rank == 0:
            found[size] = statistics.median(seconds)
    dist.destroy_process_group()


def communication(machines, minibatches, numbers, latency, bandwidth):
    """Seconds of an iteration that all-reduces take, around a ring of machines.

    For each minibatch the gradient, and the advantages' mean and variance: three messages, one after the other.
    """
    size = 4 * (numbers + 1 + 1)
    return minibatches * (3 * 2 * (machines - 1) * latency + 2 * (machines - 1) / machines * size / bandwidth)


def main(settings):
    args = ppo_tuxkart.Args()
    made_on = ppo_tuxkart.describe_setting(args)
    agent = ppo_tuxkart.Agent(made_on["observation"], made_on["actions"])
    numbers = sum(parameter.numel() for parameter in agent.parameters())
    points = {point: [int(number) for number in point.split("x")] for point in settings.points}
    trainings = {point: [] for point in points}
    for number in range(settings.rounds):
        for point, (ranks, games) in points.items():
            trainings[point].append(train(settings, ranks, games))
            print(f"round {number + 1}, {point}: {trainings[point][-1]['rate']:.0f} decisions/s", flush=True)
    reduced = {}
    for world in settings.processes:
        with tempfile.TemporaryDirectory() as folder, torch.multiprocessing.Manager() as manager:
            found = manager.dict()
            work = (world, f"{folder}/meet", (1, numbers), settings.messages, found)
            torch.multiprocessing.spawn(all_reduce, work, nprocs=world)
            reduced[world] = {"one_number": found[1], "gradient": found[numbers]}

    medians = {}
    for point, rows in trainings.items():
        medians[point] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    print(f"\n{os.cpu_count()} cores, medians of {settings.rounds}")
    for point, row in medians.items():
        print(f"{point:8}{row['rate']:6.0f} decisions/s, an iteration samples for {row['sampling_seconds']:.2f} s and "
              f"learns for {row['update_seconds']:.2f} s")  # fmt: skip
    for world, row in reduced.items():
        print(f"all-reduce between {world} processes here: one number {1000 * row['one_number']:.2f} ms, "
              f"the gradient ({numbers} numbers) {1000 * row['gradient']:.2f} ms")  # fmt: skip
    whole = medians["1x16"] if "1x16" in medians else next(iter(medians.values()))
    iteration, minibatches = whole["sampling_seconds"] + whole["update_seconds"], args.epochs * args.num_minibatches
    pair = reduced[2]
    here = (pair["one_number"] / 2, 4 * numbers / max(pair["gradient"] - pair["one_number"], 1e-9))
    limits = {}
    for name, network in {"as measured here": here, **NETWORKS}.items():
        spent = [communication(machines, minibatches, numbers, *network) for machines in range(2, 100_000)]
        limits[name] = next((2 + i for i, seconds in enumerate(spent) if seconds > 0.1 * (iteration + seconds)), None)
        print(f"{name:20}two machines: {spent[0]:.3f} s of an iteration of {iteration + spent[0]:.2f} s, "
              f"{spent[0] / (iteration + spent[0]):.1%}; 10% at {limits[name]} machines")  # fmt: skip
    if settings.out:
        result = {
            "trainings": trainings, "medians": medians, "all_reduce_seconds": reduced, "numbers": numbers,
            "latency": here[0], "bandwidth": here[1], "iteration_seconds": iteration, "minibatches": minibatches,
            "machines_at_10_percent": limits, "setting": made_on,
            "settings": {key: str(value) for key, value in dataclasses.asdict(settings).items()},
            "machine": {"cores": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        }  # fmt: skip
        settings.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Ranks, description=__doc__))
