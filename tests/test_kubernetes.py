"""The manifests of cluster/ against Kubernetes's, KubeRay's and Ray's own ideas of them, and their laws."""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.event_logger import AutoscalerEventLogger
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.core.generated.autoscaler_pb2 import ResourceRequest, ResourceRequestByCount

from raybert.checks import check_config
from raybert.cli import parse_train

ROOT = Path(__file__).parent.parent
KUBERNETES = "1.37"  # the schemas that kubernetes_validate is asked for
KUBERAY = json.loads((ROOT / "tests/data/kuberay/ray.io-v1.json").read_text())
DEFAULT_DRAIN_S = 30  # Ray's, where RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S says nothing


def load(name):
    return list(yaml.safe_load_all((ROOT / "cluster" / name).read_text()))


NAMESPACE = load("namespace.yaml")
(CLUSTER,), (JOB,) = load("raycluster.yaml"), load("rayjob.yaml")
OBJECTS = [*NAMESPACE, CLUSTER, JOB]
HEAD = CLUSTER["spec"]["headGroupSpec"]
WORKERS = {group["groupName"]: group for group in CLUSTER["spec"]["workerGroupSpecs"]}
RUN = parse_train(shlex.split(JOB["spec"]["entrypoint"])[3:]).config
AUTOSCALING = _derive_autoscaling_config_from_ray_cr(CLUSTER)  # by which Ray also checks it
NODE_TYPES = AUTOSCALING["available_node_types"]


def only(kind):
    (found,) = [each for each in NAMESPACE if each["kind"] == kind]
    return found


def with_autoscaler(template):
    """A head as KubeRay makes it: with a container of what autoscalerOptions say, in the head's image."""
    template = copy.deepcopy(template)
    containers = template["spec"]["containers"]
    options = {
        name: value
        for name, value in CLUSTER["spec"]["autoscalerOptions"].items()
        if name not in ("version", "idleTimeoutSeconds")
    }
    containers.append({"name": "autoscaler", "image": containers[0]["image"], **options})
    return template


TEMPLATES = {
    "head": with_autoscaler(HEAD["template"]),
    "submitter": JOB["spec"]["submitterPodTemplate"],
    **{name: group["template"] for name, group in WORKERS.items()},
}
PODS = {name: template["spec"] for name, template in TEMPLATES.items()}
CONTAINERS = {f"{pod}/{each['name']}": each for pod in PODS for each in PODS[pod]["containers"]}


def each(objects):
    return pytest.mark.parametrize("each", objects.values(), ids=objects.keys())


def check_kubernetes(resource):
    kubernetes_validate.validate(resource, KUBERNETES, strict=True)


def check_kuberay(resource):
    schema = {**KUBERAY, "$ref": f"#/$defs/{resource['kind']}"}
    jsonschema.Draft202012Validator(schema).validate(resource)


@each({resource["kind"]: resource for resource in NAMESPACE})
def test_kubernetes_knows_every_field(each):
    check_kubernetes(each)


@each(TEMPLATES)
def test_kubernetes_knows_every_field_of_a_pod(each):
    check_kubernetes({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": each})


@each({"cluster": CLUSTER, "job": JOB})
def test_kuberay_knows_every_field(each):
    check_kuberay(each)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda spec: spec.update(enableInTreeAutoScaling=True),
        lambda spec: spec["authOptions"].update(mode="tokens"),
        lambda spec: spec["autoscalerOptions"].update(version="2"),
        lambda spec: spec["headGroupSpec"].pop("template"),
        lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 4}),
        lambda spec: spec["workerGroupSpecs"][0].update(maxReplica=8),
        lambda spec: spec["workerGroupSpecs"][0].pop("minReplicas"),
    ],
)
def test_a_mistake_outside_the_pods_is_refused(spoil):
    cluster, job = copy.deepcopy(CLUSTER), copy.deepcopy(JOB)
    for resource, spec in ((cluster, cluster["spec"]), (job, job["spec"]["rayClusterSpec"])):
        spoil(spec)
        with pytest.raises(jsonschema.ValidationError):
            check_kuberay(resource)


def test_ray_derives_the_node_types():
    numbers = {
        name: (found["min_workers"], found["max_workers"], found["resources"]["CPU"], found["resources"].get("GPU", 0))
        for name, found in NODE_TYPES.items()
    }
    assert numbers == {
        "headgroup": (0, 0, 4, 0),
        "spot-h100": (0, 8, 6, 1),
        "spot-a100": (0, 8, 6, 1),
        "spot-l4": (0, 8, 6, 1),
    }


@pytest.mark.parametrize(
    ("num_workers", "exhausted", "launched"),
    [
        (1, [], {"spot-h100": 1}),
        (8, [], {"spot-h100": 8}),
        (12, [], {"spot-h100": 8, "spot-a100": 4}),
        (8, ["spot-h100"], {"spot-a100": 8}),
        (8, ["spot-h100", "spot-a100"], {"spot-l4": 8}),
    ],
)
def test_ray_takes_the_fastest_gpus_that_there_are(num_workers, exhausted, launched):
    worker = ResourceRequest(resources_bundle={"CPU": RUN.cluster.cpus_per_worker, "GPU": 1})
    availability = dict.fromkeys(exhausted, 0.0)
    reply = ResourceDemandScheduler(AutoscalerEventLogger(None)).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=AutoscalingConfig(AUTOSCALING, skip_content_hash=True).get_node_type_configs(),
            max_num_nodes=AUTOSCALING["max_workers"] + 1,
            resource_requests=[ResourceRequestByCount(request=worker, count=num_workers)],
            cloud_resource_availabilities=availability,
            recoverable_resource_availabilities=availability,
        )
    )
    assert {launch.instance_type: launch.count for launch in reply.to_launch} == launched


# The job.


def test_a_job_brings_the_cluster_of_raycluster_yaml():
    assert JOB["spec"]["rayClusterSpec"] == CLUSTER["spec"]


def test_raybert_accepts_the_command_of_the_job():
    assert shlex.split(JOB["spec"]["entrypoint"])[:3] == ["python", "run.py", "train"]
    check_config(RUN)


def test_no_shell_finds_files_for_a_pattern_of_the_job():
    patterns = [word for word in shlex.split(JOB["spec"]["entrypoint"]) if re.search(r"[*?\[]", word)]
    assert patterns and all(re.match(r"--[\w.]+=", word) for word in patterns)


def test_each_worker_group_alone_can_hold_the_job():
    assert RUN.cluster.use_gpu
    assert all(RUN.cluster.worker_range()[1] <= NODE_TYPES[name]["max_workers"] for name in WORKERS)


def test_workers_leave_cpus_to_the_feed():
    for name in WORKERS:
        resources = NODE_TYPES[name]["resources"]
        assert resources["CPU"] - resources["GPU"] * RUN.cluster.cpus_per_worker >= 1, name


def test_the_head_has_room_for_the_feed_and_for_no_worker():
    assert NODE_TYPES["headgroup"]["resources"]["CPU"] >= 1
    assert "GPU" not in NODE_TYPES["headgroup"]["resources"]


@each({name: PODS[name] for name in ("head", *WORKERS)})
def test_data_and_runs_are_on_the_shared_volume(each):
    claim = only("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (place,) = [mount for mount in each["containers"][0]["volumeMounts"] if mount["mountPath"] == "/runs"]
    (volume,) = [volume for volume in each["volumes"] if volume["name"] == place["name"]]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert all(path.startswith("/runs/") for path in (RUN.run_dir, RUN.data.input_files, RUN.data.vocab_file))


def test_a_lost_run_begins_again_and_a_finished_one_costs_nothing():
    assert JOB["spec"]["backoffLimit"] > 0
    assert JOB["spec"]["shutdownAfterJobFinishes"] and JOB["spec"]["ttlSecondsAfterFinished"] <= 600
    assert "activeDeadlineSeconds" not in JOB["spec"]


# Where pods run, and how they end.

GKE, KARPENTER, AKS = "cloud.google.com/gke-spot", "karpenter.sh/capacity-type", "kubernetes.azure.com/scalesetpriority"
EKS = "eks.amazonaws.com/capacityType"  # managed node groups
GKE_GPU, KARPENTER_GPU = "cloud.google.com/gke-accelerator", "karpenter.k8s.aws/instance-gpu-name"
MACHINE = "node.kubernetes.io/instance-type"
ON_DEMAND = [{}, {KARPENTER: "on-demand"}, {EKS: "ON_DEMAND"}, {AKS: "regular"}]
SPOT = [{GKE: "true"}, {KARPENTER: "spot"}, {EKS: "SPOT"}, {AKS: "spot"}]
GPUS = {
    "spot-h100": [
        {GKE: "true", GKE_GPU: "nvidia-h100-80gb"},
        {KARPENTER: "spot", KARPENTER_GPU: "h100"},
        {AKS: "spot", MACHINE: "Standard_NC40ads_H100_v5"},
    ],
    "spot-a100": [
        {GKE: "true", GKE_GPU: "nvidia-tesla-a100"},
        {GKE: "true", GKE_GPU: "nvidia-a100-80gb"},
        {KARPENTER: "spot", KARPENTER_GPU: "a100"},
        {AKS: "spot", MACHINE: "Standard_NC24ads_A100_v4"},
    ],
    "spot-l4": [{GKE: "true", GKE_GPU: "nvidia-l4"}, {KARPENTER: "spot", KARPENTER_GPU: "l4"}],
}
TAINTS = [(GKE, "true"), (KARPENTER, "spot"), (AKS, "spot"), ("nvidia.com/gpu", "present")]


def admits(pod, labels):
    """Whether node affinity lets a pod onto a node of these labels; terms are alternatives."""
    holds = {
        "In": lambda key, values: labels.get(key) in values,
        "NotIn": lambda key, values: labels.get(key) not in values,
        "DoesNotExist": lambda key, values: key not in labels,
    }
    required = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    return any(
        all(holds[one["operator"]](one["key"], one.get("values")) for one in term["matchExpressions"])
        for term in required["nodeSelectorTerms"]
    )


def tolerates(pod, key, value):
    return any(
        one["key"] == key and one["effect"] == "NoSchedule" and one.get("value", value) == value
        for one in pod.get("tolerations", [])
    )


def test_the_head_is_on_demand():
    assert all(admits(PODS["head"], labels) for labels in ON_DEMAND)
    assert not any(admits(PODS["head"], labels) for labels in SPOT)
    assert not any(tolerates(PODS["head"], *taint) for taint in TAINTS)


@each(WORKERS)
def test_workers_are_on_spot_nodes_with_their_gpu(each):
    pod = each["template"]["spec"]
    for name, nodes in GPUS.items():
        assert [admits(pod, labels) for labels in nodes] == [name == each["groupName"]] * len(nodes), name
    for labels in GPUS[each["groupName"]]:
        assert not admits(pod, {key: labels[key] for key in labels if key not in (GKE, KARPENTER, AKS)})
    assert all(tolerates(pod, *taint) for taint in TAINTS)


@each(WORKERS)
def test_workers_come_and_go(each):
    assert each["minReplicas"] == 0 < each["maxReplicas"]
    assert "replicas" not in each  # the autoscaler's number, which applying the file again must not reset


@each({name: PODS[name] for name in ("head", *WORKERS)})
def test_a_pod_that_is_ended_has_longer_than_its_drain(each):
    environment = {one["name"]: one["value"] for one in each["containers"][0].get("env", [])}
    drain_s = float(environment.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", DEFAULT_DRAIN_S))
    assert each["terminationGracePeriodSeconds"] >= drain_s + 10


def test_ray_reads_the_times_that_are_set():
    reading = """
from ray._private.ray_constants import RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S as drain_s
from ray.autoscaler.v2.instance_manager.config import InstanceReconcileConfig
print(drain_s, InstanceReconcileConfig().allocate_status_timeout_s)
"""
    containers = (CONTAINERS["head/autoscaler"], CONTAINERS["spot-l4/ray-worker"])
    variables = {one["name"]: one["value"] for each in containers for one in each["env"]}
    assert len(variables) == 2
    found = subprocess.run([sys.executable, "-c", reading], env={**os.environ, **variables}, capture_output=True)
    assert found.stdout.split() == [b"90.0", b"900"]


@each(CONTAINERS)
def test_a_container_gets_what_it_asks_for(each):
    assert each["resources"]["requests"] == each["resources"]["limits"]


@each({name: PODS[name] for name in ("head", *WORKERS)})
def test_the_object_store_and_nccl_share_dev_shm(each):
    (place,) = [mount for mount in each["containers"][0]["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
    (volume,) = [volume for volume in each["volumes"] if volume["name"] == place["name"]]
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    assert all(int(one["rayStartParams"]["object-store-memory"]) <= 4 * 2**30 for one in (HEAD, *WORKERS.values()))


def test_an_upgrade_of_nodes_waits_for_the_head():
    budget = only("PodDisruptionBudget")["spec"]
    assert budget["minAvailable"] == 1 and budget["selector"]["matchLabels"] == {"ray.io/node-type": "head"}


# Closed doors.


def test_ray_asks_for_a_token():
    assert CLUSTER["spec"]["authOptions"] == {"mode": "token"}


def test_the_autoscaler_is_v2():
    assert CLUSTER["spec"]["enableInTreeAutoscaling"] is True
    assert CLUSTER["spec"]["autoscalerOptions"]["version"] == "v2"


def test_nothing_is_reachable_from_outside():
    assert HEAD["serviceType"] == "ClusterIP"
    assert not {"headService", "enableIngress", "ingressOptions"} & HEAD.keys()
    assert not {"Service", "Ingress", "Gateway", "HTTPRoute"} & {resource["kind"] for resource in OBJECTS}
    assert not any("hostPort" in port for each in CONTAINERS.values() for port in each.get("ports", []))


def test_the_network_is_closed_but_for_the_namespace_and_the_operator():
    policy = only("NetworkPolicy")["spec"]
    assert policy["podSelector"] == {} and sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    within, operator = policy["ingress"]
    assert within == {"from": [{"podSelector": {}}]}
    (peer,) = operator["from"]
    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "kuberay-operator"}
    assert [port["port"] for port in operator["ports"]] == [8265]
    within, *beyond = policy["egress"]
    assert within == {"to": [{"podSelector": {}}]}
    assert sorted(port["port"] for rule in beyond for port in rule["ports"]) == [53, 53, 443, 6443]


def test_everything_is_in_a_namespace_that_refuses_privileges():
    namespace = only("Namespace")["metadata"]
    assert namespace["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    places = {resource["metadata"]["namespace"] for resource in OBJECTS if resource["kind"] != "Namespace"}
    assert places == {namespace["name"]}


@each(PODS)
def test_a_pod_has_no_privileges(each):
    context = each["securityContext"]
    assert context["runAsNonRoot"] is True and context["runAsUser"] == 1000
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & each.keys()
    kinds = {kind for volume in each.get("volumes", []) for kind in volume if kind != "name"}
    assert kinds <= {"emptyDir", "persistentVolumeClaim", "projected"}


@each(CONTAINERS)
def test_a_container_has_no_privileges(each):
    assert each["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_only_the_autoscaler_may_ask_kubernetes():
    accounts = [only("ServiceAccount"), *PODS.values()]
    assert all(account["automountServiceAccountToken"] is False for account in accounts)
    tokens = {
        volume["name"]
        for pod in PODS.values()
        for volume in pod.get("volumes", [])
        if any("serviceAccountToken" in source for source in volume.get("projected", {}).get("sources", []))
    }
    mounts = {name: {mount["name"] for mount in each.get("volumeMounts", [])} for name, each in CONTAINERS.items()}
    assert [name for name in mounts if mounts[name] & tokens] == ["head/autoscaler"]


@each(CONTAINERS)
def test_no_secret_is_written_down(each):
    for variable in each.get("env", []):
        assert "value" not in variable or not re.search("TOKEN|SECRET|PASSWORD|KEY|CREDENTIAL", variable["name"])
    assert "Secret" not in {resource["kind"] for resource in OBJECTS}


# Versions.


@each(CONTAINERS)
def test_an_image_is_of_this_version(each):
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    kind = "cuda" if "nvidia.com/gpu" in each["resources"]["limits"] else "cpu"
    assert each["image"] == f"YOUR_REGISTRY/raybert:{version}-{kind}"


def test_the_cluster_runs_the_tested_ray():
    assert f"ray=={CLUSTER['spec']['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
