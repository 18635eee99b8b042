//! One side of the comparison: a server, its etcd, and what has been put into it so far.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::answers;
use super::client::{Connection, Endpoint, JSON, Request};
use super::objects::{LEASES, NAMESPACE};
use super::server::{Place, Process};

/// Connections that requests are spread over, as of a few busy clients.
const CONNECTIONS: usize = 4;

/// What the checks know of a pod that was created.
#[derive(Clone, Debug, Default)]
pub struct KnownPod {
    pub name: String,
    pub uid: String,
    pub node: String,
}

pub struct Side {
    pub name: &'static str,
    place: Place,
    etcd: Option<(Process, u16)>,
    server: Option<(Process, Endpoint)>,
    pub connections: Vec<Connection>,
    pub pods: Vec<KnownPod>,
    /// The leases as the server last answered them.
    pub leases: Vec<Value>,
    /// How many config maps were created, status patches sent, and configurations applied.
    pub config_maps: usize,
    pub patched: usize,
    pub applied: usize,
    /// The highest resource version that any answer to a write has told.
    written: AtomicU64,
}

/// Counters at one moment.
#[derive(Clone, Copy)]
pub struct Counters {
    pub server_cpu: Duration,
    pub etcd_cpu: Duration,
    pub received: u64,
    pub at: Instant,
}

impl Side {
    pub fn new(name: &'static str, place: Place) -> Self {
        Self {
            name,
            place,
            etcd: None,
            server: None,
            connections: Vec::new(),
            pods: Vec::new(),
            leases: Vec::new(),
            config_maps: 0,
            patched: 0,
            applied: 0,
            written: AtomicU64::new(0),
        }
    }

    /// Starts the server on an etcd with nothing in it; how long the server took to be ready.
    pub async fn start_fresh(&mut self) -> Result<Duration> {
        self.stop().await?;
        self.etcd = Some(self.place.start_etcd().await?);
        self.start_server().await
    }

    /// Starts the server on what its etcd holds.
    pub async fn restart(&mut self) -> Result<Duration> {
        self.stop_server().await?;
        self.start_server().await
    }

    async fn start_server(&mut self) -> Result<Duration> {
        let (_, port) = self.etcd.as_ref().context("there is no etcd")?;
        let (process, endpoint, took) = self.place.start_server(*port).await?;
        for _ in 0..CONNECTIONS {
            self.connections.push(endpoint.connect().await?);
        }
        self.server = Some((process, endpoint));
        Ok(took)
    }

    async fn stop_server(&mut self) -> Result<()> {
        self.connections.clear();
        match self.server.take() {
            Some((process, _)) => process.stop().await,
            None => Ok(()),
        }
    }

    pub async fn stop(&mut self) -> Result<()> {
        self.stop_server().await?;
        match self.etcd.take() {
            Some((process, _)) => process.stop().await,
            None => Ok(()),
        }
    }

    fn server(&self) -> Result<&(Process, Endpoint)> {
        self.server.as_ref().context("the server does not run")
    }

    pub fn endpoint(&self) -> Result<&Endpoint> {
        Ok(&self.server()?.1)
    }

    pub fn pss(&self) -> Result<f64> {
        self.server()?.0.pss()
    }

    pub fn counters(&self) -> Result<Counters> {
        let (server, endpoint) = self.server()?;
        let (etcd, _) = self.etcd.as_ref().context("there is no etcd")?;
        Ok(Counters {
            server_cpu: server.cpu()?,
            etcd_cpu: etcd.cpu()?,
            received: endpoint.received(),
            at: Instant::now(),
        })
    }

    /// One request outside of any measurement.
    pub async fn ask(&self, request: &Request) -> Result<super::client::Answer> {
        self.connections.first().context("the server does not run")?.ask(request).await
    }

    /// The revision that consistent reads must have reached.
    pub fn floor(&self) -> u64 {
        self.written.load(Ordering::Acquire)
    }

    /// Checks the version in a write's answer against the floor when it was sent, and raises the floor.
    pub fn check_written(&self, floor: u64, version: u64) -> Result<()> {
        ensure!(version > floor, "a write at {version}, but {floor} was answered before it was sent");
        self.written.fetch_max(version, Ordering::AcqRel);
        Ok(())
    }

    /// What the pods and leases need around them. A ready server has its own namespaces.
    pub async fn prepare(&self) -> Result<()> {
        self.ask(&Request::get("/api/v1/namespaces/kube-system")).await?.expect(StatusCode::OK)?;
        self.wait_for(&format!("/api/v1/namespaces/{LEASES}")).await?;
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
        self.create("/api/v1/namespaces", &namespace).await?;
        // The controller manager would make it.
        let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
        self.create(&format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts"), &account).await
    }

    async fn create(&self, path: &str, object: &Value) -> Result<()> {
        let answer = self.ask(&Request::write(Method::POST, path, JSON, object.to_string().into())).await?;
        answer.expect(StatusCode::CREATED)?;
        self.check_written(0, answers::version(&answer.body)?)
    }

    async fn wait_for(&self, path: &str) -> Result<()> {
        for _ in 0..100 {
            if self.ask(&Request::get(path)).await?.status == StatusCode::OK {
                return Ok(());
            }
            sleep(Duration::from_millis(100)).await;
        }
        self.ask(&Request::get(path)).await?.expect(StatusCode::OK)
    }
}
