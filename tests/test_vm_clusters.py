"""The cluster launcher's configurations: Ray takes them, workers are spot and come from none, and doors are closed.

For AWS, Ray's own provider prepares the configuration, and makes and ends instances, on a local server that plays AWS
(moto, over loopback HTTP). For Google Cloud and Azure there is no such server: schema, preparation and what Ray itself
reads from the configuration are all that is tested.
"""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import ray
import requests
import yaml
from botocore.exceptions import ClientError
from cfnlint.decode import decode
from moto.server import ThreadedMotoServer
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws import utils as aws_utils
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.sdk import get_docker_host_mount_location
from ray.autoscaler.v2.event_logger import AutoscalerEventLogger
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.core.generated.autoscaler_pb2 import ResourceRequest, ResourceRequestByCount
from ray.scripts.scripts import start

import raybert
from raybert import agent
from raybert.cluster import Node, check_nodes
from raybert.config import ClusterConfig
from raybert.notice import HOST

CLUSTER = Path(raybert.__file__).parent.parent / "cluster"
CLOUDS = ("aws", "gcp", "azure")
FILES = sorted(path.name for path in CLUSTER.iterdir() if re.match("aws|gcp|azure", path.name))
PLACEHOLDER = re.compile(r"YOUR_([A-Z_]+)")
WORKER = {"CPU": 4, "GPU": 1}  # as README.md runs it: --cluster.cpus_per_worker 4 --cluster.use_gpu true
EVERYBODY = re.compile(r"0\.0\.0\.0/0|::/0|\bInternet\b")
SECRET = re.compile(r"AKIA|PRIVATE KEY|ssh-(rsa|ed25519) |\b[0-9a-f]{32,}\b|[A-Za-z0-9+]{40,}")
SECRET_NAME = re.compile(r"^\s*[\w-]*(password|secret|credential|access_key|api_key)[\w-]*:", re.I | re.M)


def read(cloud, values=None):
    """A configuration as `ray up` reads it, with values (or their own names) for what YOUR_... stands for."""
    text = (CLUSTER / f"{cloud}.yaml").read_text()
    return yaml.safe_load(PLACEHOLDER.sub(lambda match: values[match[1]] if values else match[1].lower(), text))


@pytest.fixture(params=CLOUDS)
def config(request, tmp_path, monkeypatch):
    """A configuration as Ray prepares it before it asks a cloud anything."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "raybert").touch()  # Ray hashes the key that gcp.yaml names
    return prepare_config(read(request.param))


def workers(config):
    return {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}


def head(config):
    return config["available_node_types"][config["head_node_type"]]


def is_spot(config, kind):
    node = kind["node_config"]
    return {
        "aws": lambda: node.get("InstanceMarketOptions") == {"MarketType": "spot"},
        "gcp": lambda: node.get("scheduling", {}).get("provisioningModel") == "SPOT",
        "azure": lambda: node["azure_arm_parameters"].get("priority") == "Spot",
    }[config["provider"]["type"]]()


def commands(config, *kinds):
    """All commands that run on nodes, or those of some kinds."""
    names = [name for name in config if name.endswith("_commands") and (not kinds or name in kinds)]
    return [command for name in names for command in config[name]]


def lint(tool, name):
    subprocess.run([Path(sys.executable).parent / tool, CLUSTER / name], check=True)


# --- Ray takes them ---------------------------------------------------------------------------------------------------


def test_ray_accepts_the_configuration(config):
    validate_config(config)
    assert not PLACEHOLDER.search(json.dumps(config))


def test_ray_understands_the_start_commands(config):
    """They are one command each, which Ray's command line parses."""
    for command in commands(config, "head_start_ray_commands", "worker_start_ray_commands"):
        if " notice " in command:
            continue
        ray_, name, *arguments = command.split()
        assert ray_ == "ray" and name in ("start", "stop") and not (name == "stop" and arguments)
        if name == "start":
            options = start.make_context(name, arguments).params
            assert not options["block"], "the launcher would wait for its end"
            assert options["head"] or options["address"] == "$RAY_HEAD_IP:6379"


def test_every_worker_asks_its_cloud_for_notices_and_no_head_does(config):
    """In the background, once, and so that a node is set up without it too."""
    cloud = config["provider"]["type"]
    (command,) = [command for command in commands(config) if " notice " in command]
    before, words = command.split(" run.py notice " if cloud == "azure" else "run.py notice ")
    found = agent._parser().parse_args(re.sub("[;}<].*", "", words).replace('"', "").split())
    assert (found.cloud, found.endpoint) == (cloud, HOST)
    if cloud == "azure":  # whose node's container may not ask the metadata service
        where = "initialization_commands"
        token = f"{get_docker_host_mount_location('raybert')}/home/ray/.ray/auth_token:/home/ray/.ray/auth_token:ro"
        assert before.startswith('test -z "$RAY_HEAD_IP" || ') and command.endswith(" || true")
        assert f"--volume {token} {config['docker']['worker_image']} python" in before and "--user 0 " in before
        assert found.address == "$RAY_HEAD_IP:6379" and " --detach " in before
    else:
        where = "worker_start_ray_commands"
        assert before == "setsid --fork flock --nonblock /tmp/notice.lock python /home/ray/app/"
        assert words.endswith(" < /dev/null >> /tmp/ray/session_latest/logs/notice.log 2>&1")
    assert command == config[where][-1]


def test_a_shell_understands_every_command(config):
    for command in commands(config):
        subprocess.run(["bash", "-n", "-c", f"export A=b; ({command})"], check=True)


def test_rays_defaults_install_nothing(config):
    """They would fetch another Ray, unpinned."""
    assert commands(config, "setup_commands", "head_setup_commands", "worker_setup_commands") == []


def test_image_is_of_this_version(config):
    version = re.search(r'version = "(.+)"', (CLUSTER.parent / "pyproject.toml").read_text())[1]
    images = {key: value for key, value in config["docker"].items() if key.endswith("image")}
    assert images == {
        "head_image": f"registry/raybert:{version}-cpu",
        "worker_image": f"registry/raybert:{version}-cuda",
    }


def test_shared_memory_is_sized_by_ray(config):
    docker = config["docker"]
    assert not docker.get("disable_shm_size_detection") and "--shm-size" not in json.dumps(docker)


# --- Nodes ------------------------------------------------------------------------------------------------------------


def test_head_is_on_demand_and_workers_are_spot_from_none(config):
    assert not is_spot(config, head(config)) and head(config)["max_workers"] == 0
    assert head(config)["labels"]["ray.io/market-type"] == "on-demand"
    assert len(workers(config)) > 1
    for name, kind in workers(config).items():
        assert is_spot(config, kind) and kind["min_workers"] == 0, name
        assert kind["labels"]["ray.io/market-type"] == "spot"
        assert kind["labels"]["ray.io/accelerator-type"]
    assert 0 < config["max_workers"] <= 16 and 0 < config["idle_timeout_minutes"] <= 10
    assert all(kind["max_workers"] <= config["max_workers"] for kind in workers(config).values())


def test_training_stays_off_the_head_and_leaves_the_feed_a_cpu(config):
    assert head(config)["resources"].get("GPU", 0) == 0
    for name, kind in workers(config).items():
        num_gpus = kind["resources"]["GPU"]
        every_cpu = kind["resources"]["CPU"] // num_gpus
        assert every_cpu > WORKER["CPU"], name
        nodes = [Node(found["CPU"], found.get("GPU", 0)) for found in (head(config)["resources"], kind["resources"])]
        run = ClusterConfig(num_workers=str(num_gpus), use_gpu=True, cpus_per_worker=every_cpu)
        check_nodes(nodes, run)  # the head's CPUs feed even where the workers take all of their node


def to_launch(config, num_workers, unavailable=()):
    """Which nodes Ray's scheduler would ask a cloud for, from a head alone."""
    kinds = AutoscalingConfig(config, skip_content_hash=True).get_node_type_configs()
    request = ResourceRequest(resources_bundle=WORKER)
    scores = dict.fromkeys(unavailable, 0.0)
    reply = ResourceDemandScheduler(AutoscalerEventLogger(None)).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=kinds,
            max_num_nodes=config["max_workers"] + 1,
            resource_requests=[ResourceRequestByCount(request=request, count=num_workers)],
            cloud_resource_availabilities=scores,
            recoverable_resource_availabilities=scores,
        )
    )
    assert not reply.infeasible_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def check_replaced(config):
    """What the cloud has none of is replaced by the other type of its size."""
    sizes = {}
    for name, kind in workers(config).items():
        sizes.setdefault(kind["resources"]["GPU"], []).append(name)
    assert sorted(sizes) == [1, 8] and all(len(names) > 1 for names in sizes.values())
    for size, names in sizes.items():
        used = copy.deepcopy(config)
        for name, kind in workers(used).items():
            kind["max_workers"] = 16 if name in names else 0
        for num_workers in (1, 8):
            for name in names:
                launched = to_launch(used, num_workers, unavailable=[name])
                assert name not in launched, (size, num_workers)
                assert sum(launched.values()) * size >= num_workers


def test_autoscaler_takes_what_there_is(config):
    assert sum(to_launch(config, 8).values()) == 8
    check_replaced(config)


# --- Closed doors -----------------------------------------------------------------------------------------------------


def test_every_process_of_ray_asks_for_the_token(config):
    """Whatever runs in a container runs with RAY_AUTH_MODE=token, and finds the token there."""
    docker = config["docker"]
    for kind in ("head", "worker"):
        options = docker["run_options"] + docker[f"{kind}_run_options"]
        run = docker_start_cmds(
            "ubuntu", docker[f"{kind}_image"], config["file_mounts"], "raybert", options, "raybert", "/root", "docker"
        )
        assert run.split().count("RAY_AUTH_MODE=token") == run.count("RAY_AUTH_MODE") == 1
        assert re.search(r" -v \S+:/home/ray/\.ray/auth_token ", run)
        assert ("RAY_enable_autoscaler_v2=1" in run) == (kind == "head")
        assert ("--gpus all" in run) == (kind == "worker")
        assert not re.search(r"--privileged|--publish|-p |seccomp=unconfined", run)
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert not any("RAY_AUTH" in command for command in commands(config))
    assert 'test "$(id -u)" = 1000' in commands(config, "initialization_commands")  # else the container cannot read it


def test_dashboard_is_on_loopback(config):
    starts = [command for command in commands(config, "head_start_ray_commands") if "--head" in command]
    assert starts
    for command in starts:
        assert start.make_context("start", command.split()[2:]).params["dashboard_host"] == "127.0.0.1"


def test_nodes_have_no_public_address(config):
    provider = config["provider"]
    assert provider["use_internal_ips"] is True and provider["cache_stopped_nodes"] is False
    nodes = [kind["node_config"] for kind in config["available_node_types"].values()]
    if provider["type"] == "gcp":
        assert all("accessConfigs" not in port for node in nodes for port in node["networkInterfaces"])
        assert all(node["networkInterfaces"] for node in nodes)  # else Ray adds a public one
    assert not any(re.search("public", key, re.I) for node in nodes for key in node.get("azure_arm_parameters", node))


def test_ray_makes_no_key_for_a_whole_google_project():
    """Named in the configuration, the key opens these instances only."""
    config = read("gcp")
    assert config["auth"]["ssh_private_key"]
    for kind in config["available_node_types"].values():
        items = {item["key"]: item["value"] for item in kind["node_config"]["metadata"]["items"]}
        assert items == {"ssh-keys": "ubuntu:public_key", "block-project-ssh-keys": "true", "enable-oslogin": "false"}


def test_google_accounts_are_ours():
    config = read("gcp")
    for name, kind in config["available_node_types"].items():
        (account,) = kind["node_config"]["serviceAccounts"]
        assert account["email"].startswith("raybert-head@" if name == "head" else "raybert-worker@")


def test_azure_network_is_ours():
    """Ray keeps a subnet, with its rules, whose names are those it would give; azure-account.sh makes it."""
    config = read("azure")
    provider = config["provider"]
    names = f"ray-{config['cluster_name']}-{provider['unique_id']}"
    template = json.loads(azure_template("azure-config-template.json"))["variables"]
    for key in ("vnetName", "subnetName"):
        assert template[key].startswith("[concat('ray-', parameters('clusterId'), '-")
    script = (CLUSTER / "azure-account.sh").read_text()
    subnet = script[script.index("az network vnet subnet create") :].split("\nsubnet=")[0]
    assert f"--vnet-name {names}-vnet " in subnet and f"--name {names}-subnet " in subnet
    assert f"--address-prefixes {provider['subnet_mask']} --network-security-group raybert-door" in subnet


def azure_template(name):
    return (Path(ray.__file__).parent / "autoscaler" / "_private" / "_azure" / name).read_text()


def test_azure_parameters_are_those_of_rays_template():
    template = json.loads(azure_template("azure-vm-template.json"))["parameters"]
    types = {"string": str, "int": int, "object": dict, "bool": bool}
    for kind in read("azure")["available_node_types"].values():
        for name, value in kind["node_config"]["azure_arm_parameters"].items():
            assert isinstance(value, types[template[name]["type"]]), name


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_open_to_everybody(name):
    """A network's own way out aside, which opens nothing."""
    lines = [line for line in (CLUSTER / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in lines:
        assert not EVERYBODY.search(line) or "DestinationCidrBlock" in line or line.strip() == "*/0 | '*' | Internet)"
    for sources in re.findall(r"source-ranges=(\S+)", "\n".join(lines)):
        assert sources in ("10.20.0.0/16", "35.235.240.0/20")  # the network itself, the Identity-Aware Proxy


@pytest.mark.parametrize("name", FILES)
def test_no_secret_is_written_down(name):
    text = (CLUSTER / name).read_text()
    assert not SECRET.search(re.sub(r"https?://\S+|--\S+", "", text))
    assert not SECRET_NAME.search(text)


@pytest.mark.parametrize("admin", ["0.0.0.0/0", "*", "Internet", "::/0"])
def test_azure_script_opens_ssh_to_nobody_at_large(admin):
    script = ["bash", str(CLUSTER / "azure-account.sh"), "westeurope", admin, "storage", "registry"]
    found = subprocess.run(script, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert found.returncode == 2 and "everybody" in found.stderr


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".sh")])
def test_script_is_clean(name):
    lint("shellcheck", name)


# --- AWS --------------------------------------------------------------------------------------------------------------


def test_template_is_clean():
    lint("cfn-lint", "aws-account.yaml")


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    """An account with the stack of aws-account.yaml, and the configuration as Ray finishes it there."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "user",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "eu-west-1",
        "HOME": str(tmp_path_factory.mktemp("home")),  # Ray writes its SSH key there
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        forget_clients()
        yield Account()
    forget_clients()
    server.stop()


def forget_clients():
    """Ray keeps its clients, and their addresses, for the life of the process."""
    for cached in (aws_utils.resource_cache, aws_utils.client_cache, aws_config._get_subnets_or_die):
        cached.cache_clear()
    boto3.DEFAULT_SESSION = None


class Account:
    """AWS after README.md's steps up to `ray up`, and its provider."""

    def __init__(self):
        self.ec2, self.iam, self.sts = (boto3.client(name) for name in ("ec2", "iam", "sts"))
        image = self.ec2.describe_images(Owners=["099720109477"])["Images"][0]["ImageId"]
        boto3.client("ssm").put_parameter(Name="/raybert/image", Value=image, Type="String")
        cloudformation = boto3.client("cloudformation")
        cloudformation.create_stack(
            StackName="raybert",
            TemplateBody=(CLUSTER / "aws-account.yaml").read_text(),
            Parameters=[{"ParameterKey": "Image", "ParameterValue": "/raybert/image"}],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )
        (stack,) = cloudformation.describe_stacks(StackName="raybert")["Stacks"]
        assert stack["StackStatus"] == "CREATE_COMPLETE"
        self.outputs = {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}
        self.before = self.inventory()
        config = prepare_config(read("aws", self.outputs))
        config = AWSNodeProvider.fillout_available_node_types_resources(config)
        validate_config(config)
        self.config = AWSNodeProvider.bootstrap_config(config)

    def inventory(self):
        """What Ray would make of its own, were it not named."""
        groups = sorted(group["GroupId"] for group in self.ec2.describe_security_groups()["SecurityGroups"])
        roles = sorted(role["RoleName"] for role in self.iam.list_roles()["Roles"])
        profiles = [profile["InstanceProfileName"] for profile in self.iam.list_instance_profiles()["InstanceProfiles"]]
        return groups, roles, sorted(profiles)

    def role(self, kind):
        """Of the instance profile of a kind of node."""
        (role,) = self.iam.get_instance_profile(InstanceProfileName=f"raybert-{kind}")["InstanceProfile"]["Roles"]
        return role

    def statements(self, kind):
        """All that a kind of node is allowed."""
        name = self.role(kind)["RoleName"]
        assert not self.iam.list_role_policies(RoleName=name)["PolicyNames"]
        found = []
        for policy in self.iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"]:
            arn = policy["PolicyArn"]
            version = self.iam.get_policy(PolicyArn=arn)["Policy"]["DefaultVersionId"]
            document = self.iam.get_policy_version(PolicyArn=arn, VersionId=version)["PolicyVersion"]["Document"]
            found += document["Statement"]
        return found

    def credentials(self, kind):
        """Those of a role with the actions of a kind of node, under the names by which Ray hands them on.

        On everything: the server knows neither the resource nor the conditions of a request.
        """
        name = f"actions-of-{kind}"
        actions = [action for statement in self.statements(kind) for action in listed(statement["Action"])]
        document = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": actions, "Resource": "*"}]}
        arn = self.iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")["Role"]["Arn"]
        self.iam.put_role_policy(RoleName=name, PolicyName=name, PolicyDocument=json.dumps(document))
        found = self.sts.assume_role(RoleArn=arn, RoleSessionName="test")["Credentials"]
        return {
            "aws_access_key_id": found["AccessKeyId"],
            "aws_secret_access_key": found["SecretAccessKey"],
            "aws_session_token": found["SessionToken"],
        }

    def provider(self, **settings):
        return AWSNodeProvider({**self.config["provider"], **settings}, self.config["cluster_name"])

    def create(self, provider, name):
        """A node of a type, tagged as the launcher and the autoscaler tag theirs."""
        kind = "head" if name == self.config["head_node_type"] else "worker"
        node = {
            **(self.config["head_node"] if kind == "head" else {}),
            **copy.deepcopy(self.config["available_node_types"][name]["node_config"]),
        }
        tags = {
            "ray-node-kind": kind,
            "ray-user-node-type": name,
            "ray-node-name": f"ray-raybert-{kind}",
            "ray-launch-config": "hash",
            "ray-node-status": "uninitialized",
        }
        (instance,) = provider.create_node(node, tags, 1)
        return instance

    def instance(self, instance):
        return self.ec2.describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0]


def listed(value):
    return value if isinstance(value, list) else [value]


def test_ray_makes_nothing_of_its_own_on_aws(aws):
    """No group that is open to everybody, and no role that may do everything."""
    assert aws.inventory() == aws.before


def test_aws_instances_are_as_the_configuration_says(aws):
    provider = aws.provider()
    for name, kind in aws.config["available_node_types"].items():
        found = aws.instance(aws.create(provider, name))
        role = "head" if name == "head" else "worker"
        assert found["InstanceType"] == kind["node_config"]["InstanceType"]
        assert found.get("InstanceLifecycle") == (None if name == "head" else "spot")
        assert found["IamInstanceProfile"]["Arn"].endswith(f"instance-profile/raybert-{role}")
        options = found["MetadataOptions"]
        assert (options["HttpTokens"], options["HttpPutResponseHopLimit"]) == ("required", 2)
        volumes = [disk["Ebs"]["VolumeId"] for disk in found["BlockDeviceMappings"]]
        assert volumes and all(disk["Encrypted"] for disk in aws.ec2.describe_volumes(VolumeIds=volumes)["Volumes"])
        assert {tag["Key"]: tag["Value"] for tag in found["Tags"]}["ray-cluster-name"] == "raybert"
    assert sorted(provider.non_terminated_nodes({"ray-node-kind": "worker"})) != []


def test_nobody_reaches_an_aws_instance_from_outside(aws):
    found = aws.instance(aws.create(aws.provider(), "a10g"))
    assert "PublicIpAddress" not in found
    assert [group["GroupId"] for group in found["SecurityGroups"]] == [aws.outputs["GROUP"]]
    (group,) = aws.ec2.describe_security_groups(GroupIds=[aws.outputs["GROUP"]])["SecurityGroups"]
    for rule in group["IpPermissions"]:
        assert not (rule.get("IpRanges") or rule.get("Ipv6Ranges") or rule.get("PrefixListIds"))
        assert [pair["GroupId"] for pair in rule["UserIdGroupPairs"]] == [aws.outputs["GROUP"]]
    assert found["SubnetId"] in (aws.outputs["SUBNETA"], aws.outputs["SUBNETB"])


def test_aws_subnets_give_no_public_address():
    """Read from the template, since the server that plays AWS leaves these properties out."""
    resources = decode(str(CLUSTER / "aws-account.yaml"))[0]["Resources"]
    for name in ("SubnetA", "SubnetB"):
        assert resources[name]["Properties"]["MapPublicIpOnLaunch"] is False
        assert resources[f"{name}Routes"]["Properties"] == {
            "SubnetId": {"Ref": name},
            "RouteTableId": {"Ref": "Routes"},
        }
    routes = [found["Properties"] for found in resources.values() if found["Type"] == "AWS::EC2::Route"]
    (route,) = [found for found in routes if found["RouteTableId"] == {"Ref": "Routes"}]
    assert route["NatGatewayId"] == {"Ref": "Nat"} and "GatewayId" not in route


def test_aws_roles_are_least(aws):
    """Actions are named, and what changes something is bound to this cluster's things."""
    without_resources = {
        "ec2:DescribeInstances",
        "ecr:GetAuthorizationToken",
        "ssm:UpdateInstanceInformation",
        "ssmmessages:CreateControlChannel",
        "ssmmessages:CreateDataChannel",
        "ssmmessages:OpenControlChannel",
        "ssmmessages:OpenDataChannel",
    }
    for kind in ("head", "worker"):
        for statement in aws.statements(kind):
            actions = set(listed(statement["Action"]))
            assert not any("*" in action for action in actions)
            if "*" in listed(statement["Resource"]):
                assert actions <= without_resources
            elif actions & {"ec2:TerminateInstances", "ec2:CreateTags", "iam:PassRole"}:
                assert statement["Condition"]
            if "iam:PassRole" in actions:
                assert listed(statement["Resource"]) == [aws.role("worker")["Arn"]]
            if any(action.startswith("s3:") for action in actions):
                arn = f"arn:aws:s3:::{aws.outputs['BUCKET']}"
                assert set(listed(statement["Resource"])) <= {arn, f"{arn}/*"}
    allowed = {action for statement in aws.statements("worker") for action in listed(statement["Action"])}
    assert {action.partition(":")[0] for action in allowed} == {"s3", "ecr"}


@pytest.fixture
def enforced(aws):
    """Credentials of head and worker, while the server refuses what their policies do not name."""
    as_head, as_worker = aws.credentials("head"), aws.credentials("worker")

    def enforce(after):
        requests.post(f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth", data=after, timeout=10)

    enforce("0")
    yield as_head, as_worker
    enforce("inf")


def test_the_heads_actions_are_enough_for_rays_autoscaler_and_no_more(aws, enforced):
    as_head, as_worker = enforced
    provider = aws.provider(aws_credentials=as_head)
    node = aws.create(provider, "l40s")
    assert node in provider.non_terminated_nodes({"ray-node-kind": "worker"})
    provider.set_node_tags(node, {"ray-node-status": "up-to-date"})
    provider.terminate_node(node)
    assert node not in provider.non_terminated_nodes({})
    for act in (
        lambda: boto3.client("iam", **as_head).create_user(UserName="other"),
        lambda: boto3.client("ec2", **as_head).authorize_security_group_ingress(
            GroupId=aws.outputs["GROUP"], IpProtocol="tcp", FromPort=22, ToPort=22, CidrIp="0.0.0.0/0"
        ),
        lambda: boto3.client("ec2", **as_worker).describe_instances(),
    ):
        with pytest.raises(ClientError, match="not authorized"):
            act()


def test_autoscaler_takes_what_there_is_on_aws(aws):
    """Also with the resources that Ray adds there of its own."""
    config = {key: value for key, value in aws.config.items() if key != "head_node"}
    check_replaced(config)
