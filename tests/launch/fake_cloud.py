"""Fakes of gcloud, kubectl, sky and xpk: their resources are in a JSON file, and one chosen call fails.

`install(folder)` writes it to a folder for PATH under these names; `call` does the same without a process, which
is faster. The state has the number of calls, the call that fails (`fail`, from 1) and how: "before" it has an effect,
or with its effect on the first host only ("half"; what is not of a host is created, as where the connection is lost
behind the request).
"""

import json
import os
import sys

with open(__file__) as file:
    SOURCE = file.read()
NAMES = ("gcloud", "kubectl", "sky", "xpk")
QUEUE = ("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
NEW = {"calls": 0, "fail": 0, "mode": "before", "creates": 0, "queued": None, "hosts": [], "jobset": None, "jobs": []}


def install(folder, **state):
    """Write the programs and the state. Returns the path of the state."""
    path = folder / "state.json"
    path.write_text(json.dumps(NEW | state))
    for name in NAMES:
        program = folder / name
        program.write_text(f"#!{sys.executable} -IS\n{SOURCE}")
        program.chmod(0o755)
    return path


def option(words, name):
    return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), None)


def gcloud(state, words, hosts):
    if words[:2] == ["container", "clusters"]:
        return print("us-east5") if words[2] == "list" else None
    verb = words[3]
    queued = state["queued"]
    if verb == "list":
        if queued and queued["state"] in QUEUE[:-1]:
            queued["state"] = QUEUE[QUEUE.index(queued["state"]) + 1]
        node = queued and {
            "multisliceParams": {"nodeCount": queued["count"]},
            "node": {"acceleratorType": queued["kind"]},
        }
        name = queued and f"projects/p/locations/z/queuedResources/{queued['name']}"
        return print(
            json.dumps(
                [{"name": name, "state": {"state": queued["state"]}, "tpu": {"nodeSpec": [node]}}] if queued else []
            )
        )
    if verb == "create":
        if queued:
            sys.exit("ALREADY_EXISTS")
        state["creates"] += 1
        count = int(option(words, "--node-count") or 1)
        state["queued"] = {
            "name": words[4],
            "state": QUEUE[0],
            "kind": option(words, "--accelerator-type"),
            "count": count,
        }
        state["hosts"] = [{"code": "", "setup": "", "job": "", "active": "inactive", "starts": 0} for _ in range(2)]
        return None
    if verb == "delete":
        state["queued"], state["hosts"] = None, []
        return None
    if not queued or queued["state"] != "ACTIVE":
        sys.exit(f"NOT_FOUND or not ready: {queued}")
    if verb == "scp":
        for host in state["hosts"][:hosts]:
            host["code"] = "copied"
        return None
    command = option(words, "--command")
    for host in state["hosts"][:hosts]:
        if command.startswith("systemctl is-active"):
            print(host["active"])
        elif "launch/setup.sh" in command:
            host |= {"setup": host["code"] and command.partition("setup.sh ")[2], "active": "inactive"}
        elif "launch/service.sh" in command:
            if not host["setup"]:
                sys.exit("setup.sh has not run")
            host |= {"job": command.partition("service.sh ")[2], "active": "active", "starts": host["starts"] + 1}
        elif "systemctl disable --now avocado" in command:
            host["active"] = "failed"  # stopped by SIGTERM: status 75
        else:
            sys.exit(f"unknown: {command}")
    return None


def kubectl(state, words, hosts):
    verb = words[2]
    if verb == "get":
        return print(json.dumps(state["jobset"])) if state["jobset"] else None
    if verb == "delete":
        state["jobset"] = None
    elif verb == "create":
        if state["jobset"]:
            sys.exit("AlreadyExists")
        state["creates"] += 1
        with open(option(words, "--filename")) as file:
            state["jobset"] = json.load(file)
    else:
        sys.exit(f"unknown: {words}")
    return None


def sky(state, words, hosts):
    if words[:2] == ["jobs", "queue"]:
        return print(json.dumps(state["jobs"]))
    state["creates"] += 1
    with open(words[-1]) as file:
        state["jobs"].append({"job_name": option(words, "--name"), "status": "PENDING", "task": file.read()})
    return None


def xpk(state, words, hosts):
    image, command = option(words, "--docker-image"), option(words, "--command")
    selector = {"cloud.google.com/gke-tpu-topology": "4x4x4", "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice"}
    container = {"image": image, "command": ["bash", "-c", f"trap _sigterm SIGTERM;\n\n({command}) & PID=$!;"]}
    hosts = {"template": {"spec": {"nodeSelector": selector, "containers": [container]}}}
    slices = {"replicas": int(option(words, "--num-slices")), "template": {"spec": hosts}}
    with open(option(words, "--output-manifest-file"), "w") as file:
        json.dump({"metadata": {"name": option(words, "--workload")}, "spec": {"replicatedJobs": [slices]}}, file)


def call(path, name, words):
    """Run a program over the state in `path`."""
    with open(path) as file:
        state = json.load(file)
    state["calls"] += 1
    fails = state["calls"] == state["fail"]
    if not fails or state["mode"] == "half":
        {"gcloud": gcloud, "kubectl": kubectl, "sky": sky, "xpk": xpk}[name](state, words, 1 if fails else None)
    with open(path, "w") as file:
        json.dump(state, file)
    if fails:
        sys.exit(f"call {state['calls']} fails: {words}")


if __name__ == "__main__":
    folder, program = os.path.split(os.path.abspath(sys.argv[0]))
    call(os.path.join(folder, "state.json"), program, sys.argv[1:])
