"""The Python client: creates, watches, patches, pages and deletes through its typed and its dynamic interface.

It fails at the first thing that is not as a Python program expects it, and uses only objects that need no controller.
"""

import threading

from kubernetes import client, config, dynamic, watch
from kubernetes.client.rest import ApiException

LIMIT = 60


def expect(condition, message):
    if not condition:
        raise AssertionError(message)


def expect_error(reason, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except ApiException as error:
        expect(reason in error.body, f"{error.body}, want {reason}")
        return
    raise AssertionError(f"no error, want {reason}")


def config_map(name, value):
    metadata = client.V1ObjectMeta(name=name, labels={"app": "python"})
    return client.V1ConfigMap(metadata=metadata, data={"value": value})


def typed(core, namespace):
    created = core.create_namespaced_config_map(namespace, config_map("a", "1"))
    expect(created.metadata.uid and created.metadata.creation_timestamp, f"the created object is {created.metadata}")
    version = created.metadata.resource_version
    seen = []

    def follow():
        events = watch.Watch().stream(
            core.list_namespaced_config_map,
            namespace,
            resource_version=version,
            label_selector="app=python",
            timeout_seconds=LIMIT,
        )
        for event in events:
            seen.append((event["type"], event["object"].data.get("value")))
            if event["type"] == "DELETED":
                return

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    expect_error("AlreadyExists", core.create_namespaced_config_map, namespace, config_map("a", "1"))
    patched = core.patch_namespaced_config_map("a", namespace, {"data": {"value": "2"}})
    expect(patched.data == {"value": "2"}, f"after the patch: {patched.data}")
    patched.data["value"] = "3"
    replaced = core.replace_namespaced_config_map("a", namespace, patched)
    expect(replaced.metadata.resource_version != version, "a change keeps the version")
    expect_error("Conflict", core.replace_namespaced_config_map, "a", namespace, patched)
    core.delete_namespaced_config_map("a", namespace)
    expect_error("NotFound", core.read_namespaced_config_map, "a", namespace)
    follower.join(LIMIT)
    expect(seen == [("MODIFIED", "2"), ("MODIFIED", "3"), ("DELETED", "3")], f"the watch saw {seen}")


def pages(core, namespace):
    for index in range(5):
        core.create_namespaced_config_map(namespace, config_map(f"page-{index}", "p"))
    names, token = [], None
    while True:
        page = core.list_namespaced_config_map(namespace, label_selector="app=python", limit=2, _continue=token)
        names += [item.metadata.name for item in page.items]
        token = page.metadata._continue
        if not token:
            break
    expect(names == [f"page-{index}" for index in range(5)], f"the pages have {names}")
    core.delete_collection_namespaced_config_map(namespace, label_selector="app=python")
    left = core.list_namespaced_config_map(namespace, label_selector="app=python").items
    expect(left == [], f"{len(left)} objects are left")


def pods(core, namespace):
    try:
        core.create_namespaced_service_account(namespace, {"metadata": {"name": "default"}})
    except ApiException as error:
        expect("AlreadyExists" in error.body, error.body)
    container = client.V1Container(
        name="c",
        image="example.com/c:1",
        resources=client.V1ResourceRequirements(requests={"cpu": "0.25"}),
        readiness_probe=client.V1Probe(http_get=client.V1HTTPGetAction(port=80)),
    )
    spec = client.V1PodSpec(containers=[container], scheduler_name="none")
    pod = core.create_namespaced_pod(namespace, client.V1Pod(metadata=client.V1ObjectMeta(name="p"), spec=spec))
    expect(pod.spec.containers[0].resources.requests["cpu"] == "250m", f"the pod asks for {pod.spec.containers[0]}")
    expect(pod.status.qos_class == "Burstable", f"the pod's class is {pod.status.qos_class}")
    core.delete_namespaced_pod("p", namespace, grace_period_seconds=0)
    bad = {"metadata": {"name": "q"}, "spec": {"containers": []}}
    expect_error("spec.containers: Required value", core.create_namespaced_pod, namespace, bad)


def anything(api, namespace):
    """The dynamic client finds kinds by discovery, and applies."""
    resources = dynamic.DynamicClient(api).resources
    deployments = resources.get(api_version="apps/v1", kind="Deployment")
    labels = {"app": "python"}
    containers = [{"name": "c", "image": "example.com/c:1"}]
    template = {"metadata": {"labels": labels}, "spec": {"containers": containers}}
    spec = {"replicas": 0, "selector": {"matchLabels": labels}, "template": template}
    body = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": spec}
    applied = deployments.server_side_apply(body=body, namespace=namespace, field_manager="python-test")
    expect(applied.spec.revisionHistoryLimit == 10, f"the deployment is {applied.spec}")
    expect([entry.operation for entry in applied.metadata.managedFields] == ["Apply"], "apply does not manage")
    deployments.delete(name="d", namespace=namespace)


def main():
    config.load_kube_config()
    core = client.CoreV1Api()
    print("server", client.VersionApi().get_code().git_version)
    namespace = core.create_namespace({"metadata": {"generateName": "python-"}}).metadata.name
    try:
        typed(core, namespace)
        pages(core, namespace)
        pods(core, namespace)
        anything(client.ApiClient(), namespace)
    finally:
        core.delete_namespace(namespace)
    print("done")


main()
