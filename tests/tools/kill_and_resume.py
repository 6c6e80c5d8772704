# SPDX-License-Identifier: Apache-2.0
"""Kill a training run again and again, and hold what comes out against the run left in peace.

    python tests/tools/kill_and_resume.py --kills 20 [--elastic 6] [--seed 0] [--log FILE]

A tiny model is trained once without interruption. Then the same run is started and ended with
SIGKILL at random moments: while it starts, in the middle of steps, and, every third time, while a
checkpoint is half written; some starts use another number of reading threads. In the end every
loss, gradient norm and learning rate, every batch, and the final checkpoint's arrays must be the
same to the last bit. `--elastic` kills a second run, without dropout, and goes on each time on
another mesh (1, 2, 4 or 8 devices): there losses must agree to 1e-6.

Exit code 0 if all of it holds. A start takes some seconds, of which compiling takes none after the
first: compiled programs are kept in the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import simulated  # noqa: E402
from training_tools import mini_model  # noqa: E402

EXACT = ("step", "loss", "grad_norm", "lr", "accuracy", "membership", "real_tokens")
MESHES = ((1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2))


class Ground:
    """A model and data in a folder, and runs on them."""

    def __init__(self, folder: Path, say):
        self.folder, self.say = folder, say
        self.model = mini_model(folder)
        self.cache = folder / "compiled"

    def start(self, output: Path, steps: int, *, mesh=(1, 1, 1), workers=2, **more):
        """Start the command; returns the process."""
        values = {
            "model.path": self.model,
            "model.dtype": "float32",
            "data.path": self.folder / "texts",
            "data.subsets": "Lines",
            "data.num_crops": 1,
            "data.max_len": 64,
            "data.workers": workers,
            "batch_size": 8,
            "steps": steps,
            "optim.warmup_steps": 2,
            "optim.lr": 1e-3,
            "temperature": 0.05,
            "adapter.type": "lora",
            "checkpoint.every": 1,
            "remat": "none",
            "grad_cache": "on",
            "packing.chunk_tokens": 256,
            "output": output,
            **dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh)),
            **more,
        }
        flags = [f"--config.{name}={value}" for name, value in values.items()]
        flags_of_xla = {simulated.COUNT: int(np.prod(mesh)), **simulated.CHEAP}
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": " ".join(f"{name}={value}" for name, value in flags_of_xla.items()),
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        log = (output.parent / f"{output.name}.txt").open("a")
        config = ROOT / "configs" / "mmeb.py"
        argv = [sys.executable, "-m", "vlm2vec_jax.train", "--config", str(config), *flags]
        return subprocess.Popen(argv, cwd=ROOT, env=env, stdout=log, stderr=log)

    def finish(self, output: Path, process: subprocess.Popen) -> None:
        """Wait for the end of a run that must end well."""
        if process.wait(timeout=600):
            text = (output.parent / f"{output.name}.txt").read_text()
            raise SystemExit(f"the run ended with {process.returncode}:\n{text[-4000:]}")


def steps_on_disk(output: Path) -> list[int]:
    folder = output / "checkpoints"
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())


def half_written(output: Path) -> list[str]:
    return [p.name for p in (output / "checkpoints").glob("*tmp*")]


def lines(output: Path) -> list[dict]:
    path = output / "metrics.jsonl"
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # torn by a kill
    return found


def kill_at_random(output: Path, process: subprocess.Popen, how: str, rng: random.Random) -> str:
    """Wait for a random moment and kill; returns what was seen, "" if the run was done before."""
    before = max(steps_on_disk(output), default=0)
    if how == "starting":
        limit = time.monotonic() + rng.uniform(0.1, 6.0)
        while time.monotonic() < limit and process.poll() is None:
            time.sleep(0.01)
    else:
        target = before + rng.randint(1, 3)
        while process.poll() is None:
            steps = steps_on_disk(output)
            if max(steps, default=0) >= target:
                if how == "saving":
                    if half_written(output):
                        break
                else:
                    time.sleep(rng.uniform(0.0, 0.05))
                    break
            time.sleep(0.0005)
    if process.poll() is not None:
        return ""
    process.send_signal(signal.SIGKILL)
    process.wait()
    torn = half_written(output)
    return (
        f"killed while {how}: checkpoints {steps_on_disk(output)}"
        + (f", half written {', '.join(torn)}" if torn else "")
        + f", metrics up to step {max((line['step'] for line in lines(output)), default=0)}"
    )


def torment(ground: Ground, output: Path, steps: int, kills: int, rng, choose) -> int:
    """Kill a run so many times, then let it end; returns how often it was hit while saving."""
    done = hit = 0
    process = None
    while done < kills:
        how = ("stepping", "saving", "starting")[done % 3]
        more = choose(done)
        process = ground.start(output, steps, **more)
        seen = kill_at_random(output, process, how, rng)
        if not seen:
            ground.finish(output, process)
            ground.say(f"the run ended after {done} kills, before the next one: raise --steps")
            return hit
        done += 1
        hit += "half written" in seen
        ground.say(f"{done:3d} {more} {seen}")
    ground.finish(output, ground.start(output, steps, **choose(done)))
    return hit


def compare(expected: Path, found: Path, *, exact: bool) -> list[str]:
    """What differs between two runs."""
    a, b = lines(expected), lines(found)
    if [line["step"] for line in a] != [line["step"] for line in b]:
        return [f"steps {[line['step'] for line in b]} instead of {[line['step'] for line in a]}"]
    wrong = []
    if exact:
        for one, two in zip(a, b):
            wrong += [
                f"step {one['step']}: {name} {two[name]!r}, not {one[name]!r}"
                for name in EXACT
                if one[name] != two[name]
            ]
        last = str(max(steps_on_disk(expected)))
        sums = [
            json.loads((run / "checkpoints" / last / "meta" / "metadata").read_text())["arrays"]
            for run in (expected, found)
        ]
        wrong += [f"array {path} differs" for path in sums[0] if sums[0][path] != sums[1].get(path)]
        return wrong
    for one, two in zip(a, b):
        off = relative(one, two)
        if off > 1e-6:
            wrong.append(
                f"step {one['step']}: loss {two['loss']!r}, not {one['loss']!r}: {off:.1e}"
            )
        if one["membership"] != two["membership"]:
            wrong.append(f"step {one['step']}: another batch")
    return wrong


def relative(one: dict, two: dict) -> float:
    """How far the losses of two lines are apart."""
    return abs(one["loss"] - two["loss"]) / max(abs(one["loss"]), 1e-3)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="kills on one mesh, bit-equal after")
    parser.add_argument("--elastic", type=int, default=0, help="kills with another mesh each time")
    parser.add_argument("--steps", type=int, default=0, help="of the run; by default enough")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one by default")
    parser.add_argument("--log", type=Path, help="write what is printed here, too")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    told = args.log.open("w") if args.log else None

    def say(text: str) -> None:
        print(text, flush=True)
        if told:
            print(text, file=told, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        ground = Ground(folder, say)
        wrong = []
        parts = [("same", args.kills, {}), ("elastic", args.elastic, {"adapter.dropout": 0})]
        for name, kills, more in parts:
            if not kills:
                continue
            steps = args.steps or 4 * kills + 4
            expected, found = folder / f"{name}-whole", folder / f"{name}-killed"
            say(f"{name} mesh: {steps} steps, {kills} kills, seed {args.seed}")
            began = time.monotonic()
            ground.finish(expected, ground.start(expected, steps, **more))
            say(f"left in peace: {time.monotonic() - began:.0f} s")

            def choose(n: int, name=name, more=more) -> dict:
                if name == "same":
                    return {"workers": (2, 0, 4)[n % 3]}
                return {"mesh": MESHES[(n + 1) % len(MESHES)], **more}

            hit = torment(ground, found, steps, kills, rng, choose)
            differences = compare(expected, found, exact=name == "same")
            say(
                f"{name} mesh: {kills} kills, {hit} of them with a half-written checkpoint; "
                + (f"{len(differences)} differences" if differences else "no difference")
                + (" (bit for bit)" if name == "same" else " (losses to 1e-6)")
            )
            if name == "elastic":
                worst = max(map(relative, lines(expected), lines(found)), default=0.0)
                say(f"losses are {worst:.1e} apart at most")
            wrong += differences
    for line in wrong[:20]:
        say(line)
    if told:
        told.close()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
