//! The row of a pod: how many containers are ready, the one word that says what state it is in, and its restarts.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{NONE, age, condition, has_condition, human_duration, text_or, timestamp};
use crate::registry::object::ObjectExt;

/// The cells under `core::pod::COLUMNS`.
pub fn row(pod: &Value, now: Timestamp) -> Vec<Value> {
    let mut state = State::of(pod);
    if !state.initializing || has_condition(pod, "Initialized") {
        state.read_containers(pod);
    }
    let terminal = matches!(pod.str_at(&["status", "phase"]), "Failed" | "Succeeded");
    if pod.is_being_deleted() && pod.str_at(&["status", "reason"]) == "NodeLost" {
        state.reason = "Unknown".into();
    } else if pod.is_being_deleted() && !terminal {
        state.reason = "Terminating".into();
    }
    vec![
        pod.name().into(),
        format!("{}/{}", state.ready, state.total).into(),
        state.reason.as_str().into(),
        state.restarts.cell(now).into(),
        age(pod, now),
        pod["status"]["podIPs"][0]["ip"].as_str().filter(|ip| !ip.is_empty()).unwrap_or(NONE).into(),
        text_or(pod, &["spec", "nodeName"], NONE),
        text_or(pod, &["status", "nominatedNodeName"], NONE),
        readiness_gates(pod).into(),
    ]
}

/// A finished pod's row says so, for tools that hide such rows.
pub fn row_conditions(pod: &Value) -> Option<Value> {
    let (reason, message) = match pod.str_at(&["status", "phase"]) {
        "Succeeded" => ("Succeeded", "The pod has completed successfully."),
        "Failed" => ("Failed", "The pod failed."),
        _ => return None,
    };
    Some(json!([{"type": "Completed", "status": "True", "reason": reason, "message": message}]))
}

/// How often containers were restarted, and when the last one was.
#[derive(Clone, Default)]
struct Restarts {
    count: i64,
    last: Option<Timestamp>,
}

impl Restarts {
    fn add(&mut self, status: &Value) {
        self.count += status.i64_at(&["restartCount"]).unwrap_or(0);
        self.last = self.last.max(timestamp(&status["lastState"]["terminated"]["finishedAt"]));
    }

    fn cell(&self, now: Timestamp) -> String {
        match self.last {
            Some(last) if self.count != 0 => {
                format!("{} ({} ago)", self.count, human_duration(now.as_second() - last.as_second()))
            }
            _ => self.count.to_string(),
        }
    }
}

struct State {
    ready: usize,
    total: usize,
    reason: String,
    restarts: Restarts,
    /// Those of sidecars only: they stay part of the pod after it is initialized.
    sidecar_restarts: Restarts,
    initializing: bool,
}

impl State {
    /// What the pod's own status and its init containers say.
    fn of(pod: &Value) -> Self {
        let init = pod.list_at(&["spec", "initContainers"]);
        let is_sidecar = |name: &str| init.iter().any(|c| c["name"] == name && c["restartPolicy"] == "Always");
        let reason = match pod.str_at(&["status", "reason"]) {
            "" => pod.str_at(&["status", "phase"]),
            reason => reason,
        };
        let gated = condition(pod, "PodScheduled").is_some_and(|c| c["reason"] == "SchedulingGated");
        let mut state = Self {
            ready: 0,
            total: pod.list_at(&["spec", "containers"]).len()
                + init.iter().filter(|c| c["restartPolicy"] == "Always").count(),
            reason: if gated { "SchedulingGated".into() } else { reason.into() },
            restarts: Restarts::default(),
            sidecar_restarts: Restarts::default(),
            initializing: false,
        };
        for (index, status) in pod.list_at(&["status", "initContainerStatuses"]).iter().enumerate() {
            let sidecar = is_sidecar(status.str_at(&["name"]));
            state.restarts.add(status);
            if sidecar {
                state.sidecar_restarts.add(status);
            }
            let terminated = &status["state"]["terminated"];
            if terminated.is_object() && terminated.i64_at(&["exitCode"]).unwrap_or(0) == 0 {
                continue;
            }
            if sidecar && status["started"] == true {
                state.ready += usize::from(status["ready"] == true);
                continue;
            }
            state.initializing = true;
            state.reason = match status.str_at(&["state", "waiting", "reason"]) {
                _ if terminated.is_object() => format!("Init:{}", exit_reason(terminated)),
                "" | "PodInitializing" => format!("Init:{index}/{}", init.len()),
                waiting => format!("Init:{waiting}"),
            };
            break;
        }
        state
    }

    /// What the containers say; the last in the list has the first word.
    fn read_containers(&mut self, pod: &Value) {
        self.restarts = self.sidecar_restarts.clone();
        let (mut running, mut error) = (false, None);
        for status in pod.list_at(&["status", "containerStatuses"]).iter().rev() {
            self.restarts.add(status);
            let terminated = &status["state"]["terminated"];
            let waiting = status.str_at(&["state", "waiting", "reason"]);
            if !waiting.is_empty() {
                self.reason = waiting.to_owned();
            } else if terminated.is_object() {
                self.reason = exit_reason(terminated);
                if terminated.i64_at(&["exitCode"]).unwrap_or(0) != 0 {
                    error = Some(self.reason.clone());
                }
            } else if status["ready"] == true && status["state"]["running"].is_object() {
                running = true;
                self.ready += 1;
            }
        }
        if self.reason == "Completed" {
            if running && has_condition(pod, "Ready") {
                self.reason = "Running".into();
            } else if let Some(error) = error {
                self.reason = error;
            } else if running {
                self.reason = "NotReady".into();
            }
        }
    }
}

fn exit_reason(terminated: &Value) -> String {
    match (terminated.str_at(&["reason"]), terminated.i64_at(&["signal"]).unwrap_or(0)) {
        ("", 0) => format!("ExitCode:{}", terminated.i64_at(&["exitCode"]).unwrap_or(0)),
        ("", signal) => format!("Signal:{signal}"),
        (reason, _) => reason.to_owned(),
    }
}

fn readiness_gates(pod: &Value) -> String {
    let gates = pod.list_at(&["spec", "readinessGates"]);
    if gates.is_empty() {
        return NONE.into();
    }
    let met = gates.iter().filter(|gate| has_condition(pod, gate.str_at(&["conditionType"]))).count();
    format!("{met}/{}", gates.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(pod: &Value) -> (String, String, String) {
        let now: Timestamp = "2026-01-01T01:00:00Z".parse().unwrap();
        let cells = row(pod, now);
        let cell = |index: usize| cells[index].as_str().unwrap().to_owned();
        (cell(1), cell(2), cell(3))
    }

    #[test]
    fn one_word_says_what_state_a_pod_is_in() {
        let running = json!({"name": "c", "ready": true, "state": {"running": {}}});
        let crashed = json!({"name": "c", "restartCount": 3, "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"finishedAt": "2026-01-01T00:59:00Z"}}});
        let done = json!({"name": "d", "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}});
        let failed = json!({"name": "d", "state": {"terminated": {"exitCode": 2}}});
        let spec = json!({"containers": [{"name": "c"}]});
        let two = json!({"containers": [{"name": "c"}, {"name": "d"}]});
        let ready = json!([{"type": "Ready", "status": "True"}]);
        let cases = [
            (json!({"spec": spec, "status": {"phase": "Pending"}}), "0/1", "Pending", "0"),
            (
                json!({"spec": spec, "status": {"phase": "Running", "containerStatuses": [running]}}),
                "1/1",
                "Running",
                "0",
            ),
            (
                json!({"spec": spec, "status": {"phase": "Running", "containerStatuses": [crashed]}}),
                "0/1",
                "CrashLoopBackOff",
                "3 (60s ago)",
            ),
            (
                json!({"spec": two, "status": {"phase": "Running", "containerStatuses": [done, running], "conditions": ready}}),
                "1/2",
                "Running",
                "0",
            ),
            (
                json!({"spec": two, "status": {"phase": "Running", "containerStatuses": [done, running]}}),
                "1/2",
                "NotReady",
                "0",
            ),
            (
                json!({"spec": spec, "status": {"phase": "Failed", "containerStatuses": [failed]}}),
                "0/1",
                "ExitCode:2",
                "0",
            ),
            (json!({"spec": spec, "status": {"phase": "Failed", "reason": "Evicted"}}), "0/1", "Evicted", "0"),
            (
                json!({"metadata": {"deletionTimestamp": "x"}, "spec": spec, "status": {"phase": "Running"}}),
                "0/1",
                "Terminating",
                "0",
            ),
        ];
        for (pod, ready, status, restarts) in cases {
            assert_eq!(shown(&pod), (ready.into(), status.into(), restarts.into()), "{pod}");
        }
    }

    #[test]
    fn init_containers_and_sidecars_are_counted() {
        let spec = json!({"containers": [{"name": "c"}], "initContainers": [{"name": "a"}, {"name": "s", "restartPolicy": "Always"}]});
        let waiting = json!({"phase": "Pending", "initContainerStatuses": [{"name": "a", "state": {"running": {}}}]});
        assert_eq!(shown(&json!({"spec": spec, "status": waiting})), ("0/2".into(), "Init:0/2".into(), "0".into()));
        let failed = json!({"phase": "Pending", "initContainerStatuses": [{"name": "a", "state": {"terminated": {"exitCode": 1, "reason": "Error"}}}]});
        assert_eq!(shown(&json!({"spec": spec, "status": failed})).1, "Init:Error");
        let up = json!({"phase": "Running",
            "initContainerStatuses": [
                {"name": "a", "state": {"terminated": {"exitCode": 0}}, "restartCount": 5},
                {"name": "s", "started": true, "ready": true, "state": {"running": {}}, "restartCount": 1}],
            "containerStatuses": [{"name": "c", "ready": true, "state": {"running": {}}}]});
        assert_eq!(shown(&json!({"spec": spec, "status": up})), ("2/2".into(), "Running".into(), "1".into()));
    }
}
