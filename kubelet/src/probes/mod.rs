//! Liveness, readiness and startup probes: a task per probe of a running container, which tells the pod's worker only
//! when the answer changes. What follows from the answer is the planner's business.

mod grpc;
mod request;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container as Spec, Pod, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

pub use request::{Answer, ProbeError, http_get};

use crate::events::Level;
use crate::pod::context::NodeContext;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Startup,
    Liveness,
    Readiness,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        }
    }
}

/// A changed answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    pub container_id: String,
    pub kind: Kind,
    pub healthy: bool,
}

/// The probes of one container; dropping it ends them.
pub struct Prober {
    _tasks: JoinSet<()>,
    /// Liveness and readiness begin only when the container has started up.
    pub started: bool,
}

/// What a probe needs to know about its container.
#[derive(Clone)]
pub struct Target {
    pub node: Arc<NodeContext>,
    pub pod: Arc<Pod>,
    pub spec: Arc<Spec>,
    pub container_id: String,
    pub pod_ip: String,
    pub started_at: Timestamp,
}

impl Prober {
    /// Starts the startup probe, or the other two once `started`.
    pub fn start(target: &Target, started: bool, reports: &mpsc::Sender<Report>) -> Self {
        let mut tasks = JoinSet::new();
        let kinds: &[(Kind, &Option<Probe>)] = if started {
            &[(Kind::Liveness, &target.spec.liveness_probe), (Kind::Readiness, &target.spec.readiness_probe)]
        } else {
            &[(Kind::Startup, &target.spec.startup_probe)]
        };
        for (kind, probe) in kinds {
            if let Some(probe) = probe {
                tasks.spawn(run(target.clone(), *kind, probe.clone(), reports.clone()));
            }
        }
        Self { _tasks: tasks, started }
    }
}

fn positive(value: Option<i32>, default: u32) -> u32 {
    value.and_then(|value| u32::try_from(value).ok()).filter(|value| *value > 0).unwrap_or(default)
}

/// Counts equal answers in a row until a threshold is reached. Pure.
#[derive(Debug, PartialEq, Eq)]
struct Tally {
    current: Option<bool>,
    row: u32,
    last: bool,
}

impl Tally {
    fn new(kind: Kind) -> Self {
        // Unready and alive until proven otherwise; of startup nothing is known.
        let current = match kind {
            Kind::Startup => None,
            Kind::Liveness => Some(true),
            Kind::Readiness => Some(false),
        };
        Self { current, row: 0, last: false }
    }

    /// The new state if this answer changes it.
    fn count(&mut self, answer: bool, probe: &Probe) -> Option<bool> {
        self.row = if self.row > 0 && self.last == answer { self.row.saturating_add(1) } else { 1 };
        self.last = answer;
        let needed = if answer { positive(probe.success_threshold, 1) } else { positive(probe.failure_threshold, 3) };
        if self.row < needed || self.current == Some(answer) {
            return None;
        }
        self.current = Some(answer);
        Some(answer)
    }
}

async fn run(target: Target, kind: Kind, probe: Probe, reports: mpsc::Sender<Report>) {
    let delay = Duration::from_secs(u64::from(positive(probe.initial_delay_seconds, 0)));
    let age = Duration::try_from(Timestamp::now().duration_since(target.started_at)).unwrap_or_default();
    tokio::time::sleep(delay.saturating_sub(age)).await;
    let period = Duration::from_secs(u64::from(positive(probe.period_seconds, 10)));
    let mut tally = Tally::new(kind);
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let healthy = match once(&target, &probe).await {
            Ok(()) => true,
            Err(error) => {
                let message = format!("{} probe {error}", kind.name());
                target.node.recorder.container(&target.pod, &target.spec.name, Level::Warning, "Unhealthy", message);
                false
            }
        };
        let Some(healthy) = tally.count(healthy, &probe) else { continue };
        let report = Report { container_id: target.container_id.clone(), kind, healthy };
        // The worker is gone, or the container is about to go: nothing more to find out.
        if reports.send(report).await.is_err() || (kind != Kind::Readiness && (kind == Kind::Startup || !healthy)) {
            return;
        }
    }
}

async fn once(target: &Target, probe: &Probe) -> Result<(), ProbeError> {
    let limit = Duration::from_secs(u64::from(positive(probe.timeout_seconds, 1)));
    let host = |host: &Option<String>| host.clone().filter(|host| !host.is_empty()).unwrap_or(target.pod_ip.clone());
    let check = async {
        if let Some(exec) = &probe.exec {
            let command = exec.command.clone().unwrap_or_default();
            let answer = target.node.state.runtime.exec_sync(&target.container_id, &command, Some(limit)).await;
            let answer = answer.map_err(ProbeError::Exec)?;
            return match answer.exit_code {
                0 => Ok(()),
                _ => Err(ProbeError::Failed(output(&[answer.stdout, answer.stderr].concat()))),
            };
        }
        if let Some(action) = &probe.http_get {
            let answer = http_get(action, &target.spec, &target.pod_ip, "kube-probe").await?;
            let status = answer.status;
            if status.is_success() || status.is_redirection() {
                return Ok(());
            }
            return Err(ProbeError::Failed(format!("HTTP probe failed with statuscode: {}", status.as_u16())));
        }
        if let Some(action) = &probe.tcp_socket {
            let port = port(&action.port, &target.spec)?;
            return request::connect(&host(&action.host), port).await.map(drop);
        }
        if let Some(action) = &probe.grpc {
            let port = u16::try_from(action.port).map_err(|_| ProbeError::Port(action.port.to_string()))?;
            return grpc::check(&target.pod_ip, port, action.service.as_deref().unwrap_or_default()).await;
        }
        Ok(())
    };
    // The runtime ends a command by itself; a little more here lets its own words through.
    let limit = if probe.exec.is_some() { limit + Duration::from_secs(2) } else { limit };
    tokio::time::timeout(limit, check).await.unwrap_or(Err(ProbeError::Timeout))
}

fn output(bytes: &[u8]) -> String {
    const LIMIT: usize = 10 << 10;
    String::from_utf8_lossy(&bytes[..bytes.len().min(LIMIT)]).into_owned()
}

/// A port by number or by the name that the container gives it.
pub(crate) fn port(port: &IntOrString, spec: &Spec) -> Result<u16, ProbeError> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => {
            let named = spec.ports.iter().flatten().find(|port| port.name.as_deref() == Some(name));
            named.map(|port| port.container_port).or_else(|| name.parse().ok())
        }
    };
    number.and_then(|number| u16::try_from(number).ok()).filter(|number| *number > 0).ok_or_else(|| {
        ProbeError::Port(match port {
            IntOrString::Int(number) => number.to_string(),
            IntOrString::String(name) => name.clone(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds() {
        let probe = Probe { failure_threshold: Some(2), success_threshold: Some(2), ..Probe::default() };
        let run = |kind, answers: &[bool]| -> Vec<Option<bool>> {
            let mut tally = Tally::new(kind);
            answers.iter().map(|answer| tally.count(*answer, &probe)).collect()
        };
        assert_eq!(run(Kind::Readiness, &[true, true, true]), [None, Some(true), None]);
        assert_eq!(run(Kind::Readiness, &[true, false, true, true]), [None, None, None, Some(true)]);
        assert_eq!(run(Kind::Liveness, &[true, true, false, false]), [None, None, None, Some(false)]);
        assert_eq!(run(Kind::Startup, &[false, false]), [None, Some(false)]);
    }

    #[test]
    fn ports_by_name() {
        let spec: Spec = serde_json::from_value(serde_json::json!({
            "name": "c", "ports": [{"name": "web", "containerPort": 80}]
        }))
        .unwrap();
        assert_eq!(port(&IntOrString::String("web".into()), &spec).unwrap(), 80);
        assert_eq!(port(&IntOrString::String("81".into()), &spec).unwrap(), 81);
        assert!(port(&IntOrString::String("no".into()), &spec).is_err());
        assert!(port(&IntOrString::Int(70000), &spec).is_err());
    }
}
