//! The table: which figures there are, how each is measured, and how many times better than upstream it shall be.

use anyhow::Result;

use super::client::JSON;
use super::load::{self, Cost};
use super::reads::{GetPod, ListPods};
use super::side::{KnownPod, Side};
use super::streams::{self, PROTOBUF_STREAM};
use super::writes::{Apply, CreateConfigMaps, CreateLeases, CreatePods, PatchStatus, RenewLeases};

/// Objects that requests of a kind go round. Multiples of the numbers of workers, so that each has one worker.
const LEASES: usize = 400;
const DEPLOYMENTS: usize = 100;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Row {
    GetPod,
    CreateConfigMap,
    CreatePod,
    PatchStatus,
    Apply,
    RenewLease,
    ListJson,
    ListProtobuf,
    ListSelected,
    WatchList,
    WatchListProtobuf,
    WatchEvent,
    MemoryFresh,
    MemoryWritten,
    MemoryRestarted,
    MemoryListed,
    StartFresh,
    StartSeeded,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Server CPU per request.
    Cpu,
    Mebibytes,
    Seconds,
}

impl Row {
    /// The rows that are measured by requests, in the order in which they can be: what one writes others read.
    pub const REQUESTS: [Self; 12] = [
        Self::CreateConfigMap,
        Self::CreatePod,
        Self::PatchStatus,
        Self::GetPod,
        Self::ListJson,
        Self::ListProtobuf,
        Self::ListSelected,
        Self::WatchList,
        Self::WatchListProtobuf,
        Self::WatchEvent,
        Self::Apply,
        Self::RenewLease,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::GetPod => "get a pod (consistent)",
            Self::CreateConfigMap => "create a config map",
            Self::CreatePod => "create a pod",
            Self::PatchStatus => "patch a pod's status (strategic merge)",
            Self::Apply => "server-side apply, update",
            Self::RenewLease => "renew a lease",
            Self::ListJson => "list all pods, JSON",
            Self::ListProtobuf => "list all pods, protobuf",
            Self::ListSelected => "list with a selector matching 1 %",
            Self::WatchList => "stream all pods as a watch list",
            Self::WatchListProtobuf => "stream all pods as a watch list, protobuf",
            Self::WatchEvent => "one event to one of 500 watchers",
            Self::MemoryFresh => "memory, fresh",
            Self::MemoryWritten => "memory after writing all pods",
            Self::MemoryRestarted => "memory, restarted on all pods",
            Self::MemoryListed => "memory after ten parallel full lists",
            Self::StartFresh => "start to ready, fresh",
            Self::StartSeeded => "start to ready, with all pods",
        }
    }

    /// Upstream's figure shall be this many times ours; `None`: shown only.
    pub fn target(self) -> Option<f64> {
        match self {
            Self::CreateConfigMap | Self::CreatePod | Self::RenewLease => Some(3.0),
            Self::GetPod | Self::PatchStatus | Self::Apply | Self::ListProtobuf | Self::WatchEvent => Some(4.0),
            Self::MemoryRestarted | Self::MemoryListed => Some(6.0),
            Self::MemoryFresh | Self::MemoryWritten => Some(8.0),
            Self::ListJson | Self::ListSelected | Self::WatchList | Self::StartFresh | Self::StartSeeded => Some(10.0),
            Self::WatchListProtobuf => None,
        }
    }

    pub fn unit(self) -> Unit {
        match self {
            Self::MemoryFresh | Self::MemoryWritten | Self::MemoryRestarted | Self::MemoryListed => Unit::Mebibytes,
            Self::StartFresh | Self::StartSeeded => Unit::Seconds,
            _ => Unit::Cpu,
        }
    }

    /// Whether rows after it need what it leaves behind, so that it always runs.
    pub fn seeds(self) -> bool {
        matches!(self, Self::CreatePod | Self::PatchStatus)
    }

    /// How many requests all turns together send.
    pub fn requests(self, pods: usize) -> usize {
        match self {
            Self::CreatePod | Self::PatchStatus => pods,
            Self::CreateConfigMap => 5000,
            Self::GetPod => 10_000,
            Self::Apply => 1500,
            Self::RenewLease => 8000,
            Self::ListJson | Self::ListProtobuf | Self::WatchList | Self::WatchListProtobuf => 9,
            Self::ListSelected => 300,
            Self::WatchEvent => 200,
            _ => 0,
        }
    }

    /// One turn of so many requests.
    pub async fn turn(self, side: &mut Side, requests: usize) -> Result<Cost> {
        match self {
            Self::CreateConfigMap => {
                let first = side.config_maps;
                side.config_maps += requests;
                load::run(side, &CreateConfigMaps, first..first + requests).await
            }
            Self::CreatePod => create_pods(side, requests).await,
            Self::PatchStatus => {
                let first = side.patched;
                side.patched += requests;
                load::run(side, &PatchStatus, first..first + requests).await
            }
            Self::GetPod => load::run(side, &GetPod::new(side).await?, 0..requests).await,
            Self::ListJson => load::run(side, &ListPods::JSON, 0..requests).await,
            Self::ListProtobuf => load::run(side, &ListPods::PROTOBUF, 0..requests).await,
            Self::ListSelected => load::run(side, &ListPods::SELECTED, 0..requests).await,
            Self::WatchList => streams::watch_list(side, JSON, requests).await,
            Self::WatchListProtobuf => streams::watch_list(side, PROTOBUF_STREAM, requests).await,
            Self::WatchEvent => streams::fan_out(side, requests).await,
            Self::Apply => apply(side, requests).await,
            Self::RenewLease => renew_leases(side, requests).await,
            _ => Ok(Cost::default()),
        }
    }
}

async fn create_pods(side: &mut Side, requests: usize) -> Result<Cost> {
    let first = side.pods.len();
    let work = CreatePods::default();
    let cost = load::run(side, &work, first..first + requests).await?;
    side.pods.resize(first + requests, KnownPod::default());
    for (index, known) in work.created.into_inner() {
        side.pods[index] = known;
    }
    Ok(cost)
}

/// The first turn creates the deployments, unmeasured.
async fn apply(side: &mut Side, requests: usize) -> Result<Cost> {
    let work = Apply { deployments: DEPLOYMENTS };
    if side.applied == 0 {
        load::run(side, &work, 0..DEPLOYMENTS).await?;
        side.applied = DEPLOYMENTS;
    }
    let first = side.applied;
    side.applied += requests;
    load::run(side, &work, first..first + requests).await
}

/// The first turn creates the leases, unmeasured.
async fn renew_leases(side: &mut Side, requests: usize) -> Result<Cost> {
    if side.leases.is_empty() {
        let work = CreateLeases::default();
        load::run(side, &work, 0..LEASES).await?;
        let mut created = work.created.into_inner();
        created.sort_by_key(|(index, _)| *index);
        side.leases = created.into_iter().map(|(_, lease)| lease).collect();
    }
    let work = RenewLeases::new(std::mem::take(&mut side.leases));
    let cost = load::run(side, &work, 0..requests).await;
    side.leases = work.into_leases();
    cost
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::api::load::Requests;

    #[test]
    fn objects_that_are_gone_round_have_one_worker_each() {
        assert_eq!(LEASES % RenewLeases::WORKERS, 0);
        assert_eq!(DEPLOYMENTS % Apply::WORKERS, 0);
    }

    #[test]
    fn every_row_of_requests_has_some_and_one_name() {
        for row in Row::REQUESTS {
            assert_eq!(row.unit(), Unit::Cpu, "{row:?}");
            assert!(row.requests(100) > 0, "{row:?}");
            assert_eq!(Row::REQUESTS.iter().filter(|other| other.name() == row.name()).count(), 1, "{row:?}");
        }
    }
}
