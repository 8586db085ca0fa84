"""Faults over real processes under load: every token is compared with an undisturbed run.

usage: run [FAULT ...] [--count N | --seconds N] [--seed N] [--streams N] [--heartbeat-timeout S] [--etcd] [--network] [--binary PATH]

One fault, those of a list in turn, or, without names, a random mix. Prints a line for each fault, and what all of them came to:
exactness, errors by kind, gaps, and how memory grew. Needs Python alone; exits with 1 if a token was wrong or
there was an error that FAULTS do not allow: answers may break off with UNAVAILABLE only when a coordinator is lost. FAULTS_LOG=FILE
keeps what the processes log.
"""
import argparse
import collections
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from cluster import LEASE, MODEL, MODELS, ROOT, WORKERS, Cluster, Etcd, Load, damaged_models, generate
from network import Network


def kill(cluster, chance):
    victim = chance.choice(cluster.healthy())
    victim.kill()
    cluster.healthy(without=[victim])
    victim.start()


def kill_two(cluster, chance):
    victims = chance.sample(cluster.healthy(), 2)
    for victim in victims:
        victim.kill()
    cluster.healthy(without=victims)
    for victim in victims:
        victim.start()


def stop(cluster, chance):
    victim = chance.choice(cluster.healthy())
    victim.signal(signal.SIGSTOP)
    cluster.healthy(without=[victim])
    victim.signal(signal.SIGCONT)


def stop_spare(cluster, chance):
    """A stage is killed while a spare is stopped."""
    stages = cluster.healthy()
    spare = chance.choice([worker for worker in cluster.workers if worker not in stages])
    victim = chance.choice(stages)
    spare.signal(signal.SIGSTOP)
    victim.kill()
    cluster.healthy(without=[victim, spare])
    spare.signal(signal.SIGCONT)
    victim.start()


def restart(cluster, chance):
    """A worker is told to end, hands its layers over, and is started again."""
    victim = chance.choice(cluster.healthy())
    victim.signal(signal.SIGTERM)
    victim.process.wait(60)
    cluster.healthy(without=[victim])
    victim.start()


def once(fault):
    def break_link(cluster, chance):
        target = chance.choice(cluster.healthy()[1:])
        target.proxy.set(fault, chance.choice(["forth", "back"]))
        time.sleep(0.5)
        target.proxy.set(None, "forth", "back")
        cluster.healthy()
    return break_link


def half_open(*ways):
    def fall_silent(cluster, chance):
        target = chance.choice(cluster.healthy()[1:])
        target.proxy.set("blackhole", *ways)
        cluster.healthy(without=[target])
        target.proxy.set(None, "forth", "back")
    return fall_silent


def bad_spare(cluster, chance):
    """Both spares: one holds damaged weights. A stage is killed."""
    stages = cluster.healthy()
    spare = chance.choice([worker for worker in cluster.workers if worker not in stages])
    with tempfile.TemporaryDirectory() as folder:
        spare.kill()
        spare.start_with(damaged_models(pathlib.Path(folder)))
        spare.wait()
        victim = chance.choice(stages)
        victim.kill()
        cluster.healthy(without=[victim, spare])
        spare.kill()
        spare.start()
        victim.start()


def coordinator_kill(cluster, _):
    leader = cluster.leader
    leader.kill()
    cluster.turn_from(leader)
    cluster.healthy()
    leader.start()


def coordinator_stop(cluster, _):
    leader = cluster.leader
    leader.signal(signal.SIGSTOP)
    cluster.turn_from(leader)
    cluster.healthy()
    leader.signal(signal.SIGCONT)


def restart_all(cluster, _):
    """A new version of every worker, one after the other."""
    for worker in cluster.workers:
        worker.signal(signal.SIGTERM)
        worker.process.wait(60)
        cluster.healthy(without=[worker])
        worker.start()
        worker.wait()
        cluster.healthy()


def coordinator_restart(cluster, _):
    """A new version of both coordinators, one after the other: whatever they have begun to answer is answered."""
    for coordinator in sorted(cluster.coordinators, key=lambda c: c is cluster.leader):
        coordinator.signal(signal.SIGTERM)
        coordinator.process.wait(60)
        cluster.turn_from(coordinator)
        cluster.healthy()
        coordinator.start()
        cluster.answers(coordinator)


def drain(cluster, chance):
    """An operator drains a stage's worker, and takes it back."""
    victim = chance.choice(cluster.healthy())
    cluster.operate("drain", victim.name)
    cluster.healthy(without=[victim])
    cluster.operate("undrain", victim.name)


def rebalance(cluster, _):
    cluster.healthy()
    cluster.operate("rebalance")
    cluster.healthy()


def apply(cluster, chance):
    """Another split is applied."""
    cluster.healthy()
    split = chance.choice(["2,2,2", "1,3,2", "3,2,1"])
    cluster.operate("apply", "-", text=f"model = '{MODEL}'\ndtype = 'f32'\nsplit = '{split}'\n")
    cluster.healthy()


def etcd_stop(cluster, _):
    """As machines that hang, for longer than leases live."""
    for member in cluster.etcd.members:
        member.signal(signal.SIGSTOP)
    time.sleep(5)
    for member in cluster.etcd.members:
        member.signal(signal.SIGCONT)
    # A lease that is lost is noticed by then.
    time.sleep(2 * LEASE)
    cluster.healthy()


def etcd_kill(cluster, _):
    for member in cluster.etcd.members:
        member.kill()
    time.sleep(2)
    for member in cluster.etcd.members:
        member.start()
    time.sleep(2 * LEASE)
    cluster.healthy()


def etcd_restart(cluster, _):
    """A new version of every member, one after the other."""
    for member in cluster.etcd.members:
        member.signal(signal.SIGTERM)
        member.process.wait(60)
        member.start()
        cluster.etcd.wait(member)
    cluster.healthy()


def unplug(cluster, chance):
    """A machine's cable is pulled: nobody is told."""
    victim = chance.choice(cluster.healthy())
    cluster.network.plug(victim.number, False)
    cluster.healthy(without=[victim])
    cluster.network.plug(victim.number, True)


def lost(direction):
    def lose(cluster, chance):
        victim = chance.choice(cluster.healthy())
        pairs = [(victim.number, other)[::direction] for other in cluster.network.others(victim.number)]
        for pair in pairs:
            cluster.network.lose(*pair)
        cluster.healthy(without=[victim])
        for pair in pairs:
            cluster.network.find(*pair)
    return lose


def narrow(cluster, chance):
    """A link gets slow: everybody waits, and nothing else."""
    victim = chance.choice(cluster.healthy())
    cluster.network.narrow(victim.number, "2mbit")
    time.sleep(5)
    cluster.network.narrow(victim.number, None)
    cluster.healthy()


FAULTS = {
    "kill": kill, "kill-two": kill_two, "stop": stop, "stop-spare": stop_spare, "restart": restart,
    "restart-all": restart_all,
    "cut": once("cut"), "flip": once("flip"), "truncate": once("truncate"),
    "half-open-forth": half_open("forth"), "half-open-back": half_open("back"), "half-open": half_open("forth", "back"),
    "bad-spare": bad_spare, "coordinator-kill": coordinator_kill, "coordinator-stop": coordinator_stop,
    "coordinator-restart": coordinator_restart, "drain": drain, "rebalance": rebalance, "apply": apply,
    "net-unplug": unplug, "net-mute": lost(1), "net-deaf": lost(-1), "net-narrow": narrow,
    "etcd-stop": etcd_stop, "etcd-kill": etcd_kill, "etcd-restart": etcd_restart,
}


def is_allowed(name, code, begun):
    """Answers may break off when a coordinator is lost; one that ends in good order refuses what it has not begun."""
    return code == "UNAVAILABLE" and name.startswith("coordinator") and not (begun and name == "coordinator-restart")


def undisturbed(binary, prompts):
    """What one process without a fault answers to each prompt."""
    command = [binary, "serve", str(MODELS / MODEL), "--dtype", "f32", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    address = next(line.split()[1] for line in server.stdout if line.startswith("ready "))
    try:
        answers = []
        for prompt in prompts:
            out = subprocess.run(generate(binary, address, prompt), capture_output=True, text=True, check=True)
            answers.append(json.loads(out.stdout.splitlines()[-1])["token_ids"])
        return answers
    finally:
        server.kill()


def kind(said):
    """The code of an error, and what it says."""
    try:
        error = json.loads(said.splitlines()[-1])
        return str(error["code"])
    except (ValueError, IndexError, KeyError):
        return said or "no reason"


def percentile(values, part):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def slope(samples):
    """Growth by least squares: bytes for each fault."""
    count = len(samples)
    middle, mean = (count - 1) / 2, sum(samples) / count
    spread = sum((n - middle) ** 2 for n in range(count))
    return sum((n - middle) * (value - mean) for n, value in enumerate(samples)) / spread if spread else 0.0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--count", type=int, help="so many faults [default: each of the list once, or 20]")
    parser.add_argument("--seconds", type=float, help="faults for so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--heartbeat-timeout", type=int, default=2)
    parser.add_argument("--etcd", action="store_true", help="a cluster by etcd, and faults of it [default: a list of workers]")
    parser.add_argument("--network", action="store_true", help="a network for each worker, and faults of it; needs root")
    parser.add_argument("--binary", default=str(ROOT / "target" / "debug" / "strata"))
    arguments = parser.parse_args()
    names = [name for name in FAULTS if (arguments.etcd or not name.startswith("etcd"))
             and (arguments.network or not name.startswith("net"))]
    unknown = [name for name in arguments.faults if name not in names]
    if unknown:
        parser.error(f"no fault {unknown[0]!r}: expected one of {', '.join(names)}; those of etcd need --etcd, "
                     "those of the network --network")
    if arguments.etcd and not shutil.which("etcd"):
        parser.error("--etcd: there is no etcd; install it (Debian and Ubuntu: apt-get install etcd-server)")
    chance = random.Random(arguments.seed)
    expected = json.loads((MODELS / MODEL / "expected.json").read_text())
    prompts = [prompt["ids"] for prompt in expected["prompts"]]
    answers = undisturbed(arguments.binary, prompts)
    network = Network(WORKERS) if arguments.network else None
    etcd = Etcd(network.host if network else "127.0.0.1") if arguments.etcd else None
    cluster = Cluster(arguments.binary, etcd, arguments.heartbeat_timeout, network)
    load = Load(cluster, prompts, answers, arguments.streams)
    begun, gaps, memory = time.monotonic(), collections.defaultdict(list), []
    allowed, refused = collections.Counter(), collections.Counter()
    count = arguments.count or (None if arguments.seconds else len(arguments.faults) or 20)
    done = 0
    try:
        load.flows(begun)
        while (count is None or done < count) and time.monotonic() - begun < (arguments.seconds or float("inf")):
            name = arguments.faults[done % len(arguments.faults)] if arguments.faults else chance.choice(names)
            since, errors = time.monotonic(), len(load.errors)
            FAULTS[name](cluster, chance)
            load.flows(time.monotonic())
            # What was started again is there again.
            for worker in cluster.workers:
                worker.wait()
            time.sleep(1.5)
            # Streams end with their coordinator: then it is what the service was away.
            measure = load.outage if name.startswith("coordinator") else load.longest
            gap = measure(since, time.monotonic())
            gaps[name].append(gap)
            memory.append(cluster.resident())
            for _, said, begun_to in load.errors[errors:]:
                code = kind(said)
                (allowed if is_allowed(name, code, begun_to) else refused)[(name, code)] += 1
            done += 1
            print(f"{done:4} {name:16} gap {gap:6.2f} s, errors {len(load.errors) - errors}, wrong {len(load.wrong)}",
                  flush=True)
    finally:
        load.close()
        cluster.close()
    print(f"\nseed {arguments.seed}: {done} faults in {time.monotonic() - begun:.0f} s, {load.answers} answers, "
          f"{len(load.gaps)} gaps, wrong {len(load.wrong)}")
    print("| fault | times | gap p50 | p99 | max, s |\n|---|---|---|---|---|")
    for name, values in [*sorted(gaps.items()), ("all", [gap for values in gaps.values() for gap in values])]:
        print(f"| {name} | {len(values)} | {percentile(values, 0.5):.2f} | {percentile(values, 0.99):.2f} | {max(values):.2f} |")
    print(f"memory {memory[-1] / 2**20:.0f} MiB, {slope(memory) / 2**10:+.0f} KiB for each fault")
    for title, errors in (("allowed", allowed), ("not allowed", refused)):
        print(f"errors {title}: {sum(errors.values())}", *(f"{name}: {code} x{n}" for (name, code), n in errors.items()))
    for at, what in load.wrong[:10]:
        print(f"wrong after {at - begun:.0f} s: {what}")
    return 1 if load.wrong or refused else 0


if __name__ == "__main__":
    sys.exit(main())
