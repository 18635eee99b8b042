//! Requests that change something: creates, a kubelet's status patches, server-side apply, renewals of leases.

use anyhow::{Context, Result, ensure};
use http::{Method, StatusCode};
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::Value;

use super::answers;
use super::client::{APPLY, Answer, JSON, Request, STRATEGIC};
use super::load::Requests;
use super::objects::{self, LEASES, NAMESPACE};
use super::side::{KnownPod, Side};

pub fn pods() -> String {
    format!("/api/v1/namespaces/{NAMESPACE}/pods")
}

fn post(path: String, object: &Value) -> Request {
    Request::write(Method::POST, path, JSON, object.to_string().into())
}

/// Checks the version in the answer to a write.
fn check_version(side: &Side, floor: u64, answer: &Answer) -> Result<()> {
    side.check_written(floor, answers::version(&answer.body)?)
}

/// What the server adds to an object must be there.
fn has(answer: &Answer, marks: &[&str]) -> Result<()> {
    let text = std::str::from_utf8(&answer.body).context("the answer is no text")?;
    for mark in marks {
        ensure!(text.contains(mark), "no {mark} in {text:.2000}");
    }
    Ok(())
}

pub struct CreateConfigMaps;

impl Requests for CreateConfigMaps {
    const WORKERS: usize = 8;

    fn request(&self, _: &Side, index: usize) -> Request {
        post(format!("/api/v1/namespaces/{NAMESPACE}/configmaps"), &objects::config_map(index))
    }

    fn check(&self, side: &Side, index: usize, floor: u64, answer: &Answer) -> Result<()> {
        answer.expect(StatusCode::CREATED)?;
        let sequence = format!("\"seq\":\"{index}\"");
        has(answer, &[&sequence, "\"uid\":\"", "\"creationTimestamp\":\"2", "\"managedFields\":["])?;
        check_version(side, floor, answer)
    }
}

/// Collects what is created.
#[derive(Default)]
pub struct CreatePods {
    pub created: Mutex<Vec<(usize, KnownPod)>>,
}

impl Requests for CreatePods {
    const WORKERS: usize = 8;

    fn request(&self, _: &Side, index: usize) -> Request {
        post(pods(), &objects::pod(index))
    }

    fn check(&self, side: &Side, index: usize, floor: u64, answer: &Answer) -> Result<()> {
        answer.expect(StatusCode::CREATED)?;
        // Defaults, admission, the pod's class and field management.
        has(
            answer,
            &[
                "\"managedFields\":[",
                "\"creationTimestamp\":\"2",
                "\"qosClass\":\"Burstable\"",
                "\"phase\":\"Pending\"",
                "\"terminationMessagePath\":\"/dev/termination-log\"",
                "\"successThreshold\":1",
                "\"schedulerName\":\"default-scheduler\"",
                "\"enableServiceLinks\":true",
                "\"preemptionPolicy\":\"PreemptLowerPriority\"",
                "\"priority\":0",
                "\"tolerationSeconds\":300",
                "/var/run/secrets/kubernetes.io/serviceaccount",
                "\"defaultMode\":420",
            ],
        )?;
        let item = answers::item(JSON, &answer.body)?;
        ensure!(item.name == objects::pod_name(index), "the pod is {}", item.name);
        ensure!(item.node == objects::node_name(index), "the pod is on {}", item.node);
        ensure!(!item.uid.is_empty(), "the pod has no uid");
        side.check_written(floor, item.version)?;
        let known = KnownPod { name: item.name, uid: item.uid, node: item.node };
        self.created.lock().push((index, known));
        Ok(())
    }
}

pub struct PatchStatus;

#[derive(Deserialize)]
struct PatchedPod {
    spec: PatchedSpec,
    status: PatchedStatus,
}

#[derive(Deserialize)]
struct PatchedSpec {
    containers: Vec<serde::de::IgnoredAny>,
}

#[derive(Deserialize, Debug)]
#[serde(rename_all = "camelCase")]
struct PatchedStatus {
    phase: String,
    #[serde(rename = "podIP")]
    pod_ip: String,
    qos_class: String,
    conditions: Vec<serde::de::IgnoredAny>,
    container_statuses: Vec<PatchedContainer>,
}

#[derive(Deserialize, Debug)]
#[serde(rename_all = "camelCase")]
struct PatchedContainer {
    restart_count: usize,
}

impl PatchStatus {
    /// The pod that request `index` is about, and which patch of it this is.
    fn place(side: &Side, index: usize) -> (usize, usize) {
        (index % side.pods.len(), index / side.pods.len() + 1)
    }
}

impl Requests for PatchStatus {
    const WORKERS: usize = 8;

    fn request(&self, side: &Side, index: usize) -> Request {
        let (pod, round) = Self::place(side, index);
        let known = &side.pods[pod];
        let patch = objects::status_patch(&known.uid, pod, round).to_string();
        Request::write(Method::PATCH, format!("{}/{}/status", pods(), known.name), STRATEGIC, patch.into())
    }

    fn check(&self, side: &Side, index: usize, floor: u64, answer: &Answer) -> Result<()> {
        answer.expect(StatusCode::OK)?;
        let pod: PatchedPod = answers::json(&answer.body)?;
        let status = &pod.status;
        let restarts = status.container_statuses.first().map(|c| c.restart_count);
        let is_right = status.phase == "Running"
            && !status.pod_ip.is_empty()
            && status.qos_class == "Burstable"
            && status.conditions.len() == 5
            && status.container_statuses.len() == 2
            && restarts == Some(Self::place(side, index).1)
            && pod.spec.containers.len() == 2;
        ensure!(is_right, "the patched pod is {status:?}");
        check_version(side, floor, answer)
    }
}

/// Applies version `index / deployments` of the deployments in turn; the first version creates them.
pub struct Apply {
    pub deployments: usize,
}

#[derive(Deserialize)]
struct AppliedDeployment {
    metadata: AppliedMeta,
    spec: AppliedSpec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AppliedMeta {
    generation: usize,
    managed_fields: Vec<AppliedManager>,
}

#[derive(Deserialize)]
struct AppliedManager {
    manager: String,
    operation: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AppliedSpec {
    replicas: usize,
    revision_history_limit: usize,
    template: Value,
}

impl Requests for Apply {
    const WORKERS: usize = 4;

    fn request(&self, _: &Side, index: usize) -> Request {
        let (deployment, version) = (index % self.deployments, index / self.deployments);
        let name = objects::deployment_name(deployment);
        let path = format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{name}?fieldManager=bench&force=true");
        Request::write(Method::PATCH, path, APPLY, objects::deployment(deployment, version).to_string().into())
    }

    fn check(&self, side: &Side, index: usize, floor: u64, answer: &Answer) -> Result<()> {
        let version = index / self.deployments;
        answer.expect(if version == 0 { StatusCode::CREATED } else { StatusCode::OK })?;
        let deployment: AppliedDeployment = answers::json(&answer.body)?;
        let managers = &deployment.metadata.managed_fields;
        let is_managed = matches!(&managers[..], [one] if one.manager == "bench" && one.operation == "Apply");
        ensure!(is_managed, "the managers are not the one who applied: {}", answer.start());
        let generation = deployment.metadata.generation;
        ensure!(generation == version + 1, "generation {generation} after {version} changes");
        let spec = &deployment.spec;
        ensure!(spec.replicas == objects::replicas(version) && spec.revision_history_limit == 10, "the spec is wrong");
        let container = &spec.template["spec"]["containers"][0];
        let level = format!("level-{version}");
        let is_applied = container["image"] == objects::image(version) && container["env"][0]["value"] == *level;
        ensure!(is_applied, "version {version} is not what was applied: {container}");
        check_version(side, floor, answer)
    }
}

fn lease_path(index: usize) -> String {
    format!("/apis/coordination.k8s.io/v1/namespaces/{LEASES}/leases/{}", objects::lease_name(index))
}

#[derive(Default)]
pub struct CreateLeases {
    pub created: Mutex<Vec<(usize, Value)>>,
}

impl Requests for CreateLeases {
    const WORKERS: usize = 8;

    fn request(&self, _: &Side, index: usize) -> Request {
        post(format!("/apis/coordination.k8s.io/v1/namespaces/{LEASES}/leases"), &objects::lease(index))
    }

    fn check(&self, side: &Side, index: usize, floor: u64, answer: &Answer) -> Result<()> {
        answer.expect(StatusCode::CREATED)?;
        check_version(side, floor, answer)?;
        self.created.lock().push((index, answers::json(&answer.body)?));
        Ok(())
    }
}

/// Puts the lease that was last answered back with a new time, as a kubelet does.
pub struct RenewLeases {
    leases: Vec<Mutex<Value>>,
}

impl RenewLeases {
    /// The number of leases is one of the number of workers, so that each lease has one worker.
    pub fn new(leases: Vec<Value>) -> Self {
        Self { leases: leases.into_iter().map(Mutex::new).collect() }
    }

    pub fn into_leases(self) -> Vec<Value> {
        self.leases.into_iter().map(Mutex::into_inner).collect()
    }
}

impl Requests for RenewLeases {
    const WORKERS: usize = 8;

    fn request(&self, _: &Side, index: usize) -> Request {
        let index = index % self.leases.len();
        let mut lease = self.leases[index].lock();
        lease["spec"]["renewTime"] = objects::micro_time().into();
        Request::write(Method::PUT, lease_path(index), JSON, lease.to_string().into())
    }

    fn check(&self, side: &Side, index: usize, floor: u64, answer: &Answer) -> Result<()> {
        answer.expect(StatusCode::OK)?;
        check_version(side, floor, answer)?;
        let renewed: Value = answers::json(&answer.body)?;
        let mut sent = self.leases[index % self.leases.len()].lock();
        for path in ["/metadata/uid", "/spec/renewTime", "/spec/holderIdentity"] {
            ensure!(renewed.pointer(path) == sent.pointer(path), "{path} is {:?}", renewed.pointer(path));
        }
        *sent = renewed;
        Ok(())
    }
}
