//! The algorithm on upstream's own cases, and the status that rounds end with.

use super::decide::Replicas;
use super::metric::Samples;
use super::replicas::{
    Goal, Missing, PodMetric, PodMetrics, Proposal, Scaled, Tolerances, by_pods, by_share, by_value,
};
use super::*;
use serde_json::{Value, json};

const TENTH: Tolerances = Tolerances { down: 0.1, up: 0.1 };
const ONE_PERCENT_UP: Tolerances = Tolerances { down: 0.1, up: 0.01 };

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn parse<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

/// Pods named `0`, `1`, … that request a CPU each, one for every letter: ready, unready, hot (started just now),
/// pending, failed, deleted.
fn pods(letters: &str) -> Vec<Arc<Pod>> {
    let pod = |(index, letter): (usize, char)| {
        let phase = match letter {
            'p' => "Pending",
            'f' => "Failed",
            _ => "Running",
        };
        let started = if letter == 'h' { at(10_000) } else { at(0) };
        let ready = if matches!(letter, 'r' | 'h') { "True" } else { "False" };
        Arc::new(parse(json!({
            "metadata": {"name": index.to_string(), "namespace": "ns", "labels": {"app": "web"},
                "deletionTimestamp": (letter == 'd').then(|| at(0).to_string())},
            "spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}]},
            "status": {"phase": phase, "startTime": started.to_string(),
                "conditions": [{"type": "Ready", "status": ready, "lastTransitionTime": at(0).to_string()}]},
        })))
    };
    letters.chars().enumerate().map(pod).collect()
}

fn figures(levels: &[i64]) -> PodMetrics {
    let metric = |value: &i64| PodMetric { value: *value, timestamp: at(0), window: Duration::from_secs(60) };
    levels.iter().enumerate().map(|(index, value)| (index.to_string(), metric(value))).collect()
}

fn scaled(pods: &[Arc<Pod>], current: i32, tolerances: Tolerances) -> Scaled<'_> {
    Scaled {
        pods,
        current,
        tolerances,
        cpu_initialization: Duration::from_secs(120),
        initial_readiness: Duration::from_secs(10),
        now: at(10_000),
    }
}

#[test]
fn utilization_of_a_resource() {
    for (name, letters, current, levels, percent, replicas, utilization, usage) in [
        ("up", "rrr", 3, &[300, 500, 700][..], 30, 5, 50, 500),
        ("up: an unready pod dampens", "urr", 3, &[300, 500, 700], 30, 4, 60, 600),
        ("up: a hot pod dampens", "hrr", 3, &[300, 500, 700], 30, 4, 60, 600),
        ("unready pods are ignored", "ruu", 3, &[400, 500, 700], 30, 3, 40, 400),
        ("up: failed pods are ignored", "rrff", 2, &[500, 700], 30, 4, 60, 600),
        ("up: deleted pods are ignored", "rrdd", 2, &[500, 700], 30, 4, 60, 600),
        ("down", "rrrrr", 5, &[100, 300, 500, 250, 250], 50, 3, 28, 280),
        ("down: unready pods do not count", "rrruu", 5, &[100, 300, 500, 250, 250], 50, 2, 30, 300),
        ("down: hot pods do not count", "rrrhh", 5, &[100, 300, 500, 250, 250], 50, 2, 30, 300),
        ("down: pending pods do not count", "rpppp", 5, &[100], 50, 1, 10, 100),
        ("down: deleted pods are ignored", "rrrrrdd", 5, &[100, 300, 500, 250, 250], 50, 3, 28, 280),
        ("within the tolerance", "rrr", 3, &[1010, 1030, 1020], 100, 3, 102, 1020),
        ("figures of unknown pods", "rrrr", 4, &[4000, 9500, 3000, 7000, 3200, 2000], 100, 24, 587, 5875),
        ("down: missing figures count fully", "rrrr", 4, &[400, 95], 100, 3, 24, 247),
        ("missing, at the target", "rr", 2, &[1000], 100, 2, 100, 1000),
        ("missing, above the target", "rr", 2, &[1900], 100, 2, 190, 1900),
        ("missing, below the target", "rr", 2, &[600], 100, 2, 60, 600),
        ("unready and missing", "urr", 3, &[100, 450], 50, 3, 45, 450),
        ("up: unready and missing", "urr", 3, &[100, 2000], 50, 4, 200, 2000),
        ("down: unready and missing", "urrr", 4, &[100, 100, 100], 50, 3, 10, 100),
        ("a surge of a rollout without figures", "rrr", 2, &[100, 100], 50, 2, 10, 100),
    ] {
        let pods = pods(letters);
        let goal = Goal::Utilization { percent, resource: "cpu", container: "" };
        let proposal = by_pods(&scaled(&pods, current, TENTH), Some("cpu"), &goal, figures(levels)).unwrap();
        assert_eq!(proposal, Proposal { replicas, utilization: Some(utilization), usage }, "{name}");
    }
}

#[test]
fn tolerances_of_both_directions() {
    for (down, up, levels, replicas) in [
        (0.0, 0.0, [909, 1010, 1111], 4),
        (0.1, 2.0, [1890, 1910, 1900], 3),
        (0.2, 0.08, [1100, 1080, 1090], 4),
        (0.36, 0.1, [660, 640, 650], 3),
        (0.34, 0.1, [660, 640, 650], 2),
    ] {
        let pods = pods("rrr");
        let goal = Goal::Utilization { percent: 100, resource: "cpu", container: "" };
        let scaled = scaled(&pods, 3, Tolerances { down, up });
        assert_eq!(by_pods(&scaled, Some("cpu"), &goal, figures(&levels)).unwrap().replicas, replicas, "{down} {up}");
    }
}

#[test]
fn amounts_per_pod() {
    for (name, letters, current, tolerances, levels, goal, replicas, usage) in [
        ("up", "rrr", 3, TENTH, &[20_000, 10_000, 30_000][..], 15_000, 4, 20_000),
        ("up: readiness is a matter of CPU", "rru", 3, TENTH, &[50_000, 10_000, 30_000], 15_000, 6, 30_000),
        ("down", "rrrrr", 5, TENTH, &[12_000; 5], 20_000, 3, 12_000),
        ("within", "rrr", 3, TENTH, &[20_000, 21_000, 21_000], 20_000, 3, 20_666),
        ("outside of one percent", "rrr", 3, ONE_PERCENT_UP, &[20_000, 21_000, 21_000], 20_000, 4, 20_666),
        ("missing", "rrrrr", 5, TENTH, &[20_000, 19_000, 21_000], 20_000, 5, 20_000),
        ("a surge without figures", "rrr", 2, TENTH, &[10_000, 10_000], 17_000, 2, 10_000),
    ] {
        let pods = pods(letters);
        let proposal =
            by_pods(&scaled(&pods, current, tolerances), None, &Goal::Amount(goal), figures(levels)).unwrap();
        assert_eq!((proposal.replicas, proposal.usage), (replicas, usage), "{name}");
    }
}

#[test]
fn values_of_the_whole() {
    for (letters, current, tolerances, goal, usage, replicas) in [
        ("rrr", 3, TENTH, 15_000, 20_000, 4),
        ("rrr", 3, TENTH, 1, i64::MAX, i32::MAX),
        ("uru", 3, TENTH, 10_000, 50_000, 5),
        ("rrrrr", 5, TENTH, 20_000, 12_000, 3),
        ("rrr", 3, TENTH, 20_000, 20_666, 3),
        ("rrr", 3, ONE_PERCENT_UP, 20_000, 20_666, 4),
        ("uru", 3, TENTH, 4400, 8600, 2),
        ("", 0, TENTH, 20_000, 0, 0),
        ("", 0, TENTH, 20_000, 41_000, 3),
    ] {
        let pods = pods(letters);
        let proposal = by_value(&scaled(&pods, current, tolerances), goal, usage).unwrap();
        assert_eq!((proposal.replicas, proposal.usage), (replicas, usage), "{letters} {goal} {usage}");
    }
    for (have, tolerances, goal, usage, replicas, mean) in [
        (3, TENTH, 5000, 20_000, 4, 6667),
        (5, TENTH, 2000, 6000, 3, 1200),
        (4, TENTH, 5000, 20_166, 4, 5042),
        (4, ONE_PERCENT_UP, 5000, 20_208, 5, 5052),
        (1, TENTH, 1, i64::MAX, i32::MAX, i64::MAX),
        (1, TENTH, i64::MAX, i64::MAX, 1, i64::MAX),
        (0, TENTH, 100, 250, 3, 250),
    ] {
        let proposal = by_share(have, tolerances, goal, usage);
        assert_eq!((proposal.replicas, proposal.usage), (replicas, mean), "{have} {goal} {usage}");
    }
}

#[test]
fn what_cannot_be_computed() {
    let goal = |container| Goal::Utilization { percent: 100, resource: "cpu", container };
    let error = |letters: &str, levels: &[i64], container| {
        let pods = pods(letters);
        by_pods(&scaled(&pods, 1, TENTH), Some("cpu"), &goal(container), figures(levels)).unwrap_err()
    };
    assert_eq!(error("", &[100], ""), Missing::Pods);
    assert_eq!(error("u", &[100], ""), Missing::Metrics);
    assert_eq!(error("r", &[100], "d").to_string(), "container d not found in Pod 0");
    let bare: Pod = parse(
        json!({"metadata": {"name": "0"}, "spec": {"containers": [{"name": "c"}]}, "status": {"phase": "Running"}}),
    );
    let bare = [Arc::new(bare)];
    let error = requests::requests(&bare, "memory", "").unwrap_err();
    assert_eq!(error.to_string(), "missing request for memory in container c of Pod 0");
}

#[test]
fn a_pods_own_requests_go_before_those_of_its_containers() {
    let pod = |spec: Value| [Arc::new(parse::<Pod>(json!({"metadata": {"name": "0"}, "spec": spec})))];
    let container = |name: &str, cpu: &str| json!({"name": name, "resources": {"requests": {"cpu": cpu}}});
    let mut sidecar = container("s", "50m");
    sidecar["restartPolicy"] = json!("Always");
    let containers = json!([container("a", "100m"), container("b", "200m")]);
    let summed = pod(json!({"containers": containers, "initContainers": [sidecar, container("i", "1")]}));
    let own =
        pod(json!({"containers": containers, "resources": {"requests": {"cpu": "1"}}, "overhead": {"cpu": "10m"}}));
    for (pods, whose, expected) in [(&summed, "", 350), (&summed, "s", 50), (&own, "", 1010), (&own, "b", 200)] {
        assert_eq!(requests::requests(pods, "cpu", whose).unwrap()["0"], expected);
    }
}

fn settings() -> Settings {
    Settings {
        sync_period: Duration::from_secs(15),
        downscale_stabilization: Duration::from_secs(300),
        tolerance: 0.1,
        cpu_initialization_period: Duration::from_secs(120),
        initial_readiness_delay: Duration::from_secs(10),
        concurrent_syncs: 5,
    }
}

fn hpa(spec: Value) -> HorizontalPodAutoscaler {
    let mut full = json!({"minReplicas": 2, "maxReplicas": 10, "scaleTargetRef": {"kind": "Deployment", "name": "web"},
        "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 30}}}]});
    for (key, value) in spec.as_object().unwrap() {
        full[key] = value.clone();
    }
    parse(json!({"metadata": {"name": "hpa", "namespace": "ns", "generation": 7}, "spec": full}))
}

fn condition<'a>(round: &'a Round<'_>, type_: &str) -> (&'a str, &'a str) {
    let condition = round.status.conditions.iter().flatten().find(|condition| condition.type_ == type_).unwrap();
    (&condition.status, condition.reason.as_deref().unwrap())
}

#[test]
fn a_round_from_the_metrics_to_the_status() {
    let (hpa, settings, pods) = (hpa(json!({})), settings(), pods("rrr"));
    let mut round = Round::new(&hpa, &settings, at(10_000));
    assert_eq!(round.glance(3), Glance::Measure);
    let samples = vec![Ok(Samples::Pods(figures(&[300, 500, 700])))];
    let mut history = History::default();
    let change = round.measured(&Replicas { wanted: 3, there: 3 }, &pods, samples, &mut history).unwrap().unwrap();
    assert_eq!(
        (change.replicas, change.reason.as_str()),
        (5, "cpu resource utilization (percentage of request) above target")
    );
    round.changed(3, &change);
    let status = &round.status;
    assert_eq!((status.current_replicas, status.desired_replicas, status.observed_generation), (Some(3), 5, Some(7)));
    assert_eq!(status.last_scale_time.as_ref().map(|time| time.0), Some(at(10_000)));
    let metric = &json!(status.current_metrics)[0];
    assert_eq!(metric["resource"]["current"], json!({"averageUtilization": 50, "averageValue": "500m"}));
    assert_eq!(condition(&round, "AbleToScale"), ("True", "SucceededRescale"));
    assert_eq!(condition(&round, "ScalingActive"), ("True", "ValidMetricFound"));
    assert_eq!(condition(&round, "ScalingLimited"), ("False", "DesiredWithinRange"));
    let message = "New size: 5; reason: cpu resource utilization (percentage of request) above target";
    assert_eq!(round.events.iter().map(|event| event.message.as_str()).collect::<Vec<_>>(), [message]);
}

#[test]
fn numbers_out_of_bounds_need_no_metrics() {
    let settings = settings();
    let (hpa, zero) = (hpa(json!({})), hpa(json!({"minReplicas": 0})));
    let set = |replicas, reason: &str| Glance::Set(Change { replicas, reason: reason.to_owned() });
    for (hpa, current, expected) in [
        (&hpa, 11, set(10, "Current number of replicas above Spec.MaxReplicas")),
        (&hpa, 1, set(2, "Current number of replicas below Spec.MinReplicas")),
        (&hpa, 0, Glance::Disabled),
        (&zero, 0, Glance::Disabled),
        (&zero, 1, Glance::Measure),
    ] {
        assert_eq!(Round::new(hpa, &settings, at(0)).glance(current), expected, "{current}");
    }
}

#[test]
fn missing_metrics_prevent_fewer_replicas_only() {
    let external =
        json!({"type": "External", "external": {"metric": {"name": "q"}, "target": {"type": "Value", "value": "10"}}});
    let cpu = json!({"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 30}}});
    let (hpa, settings, pods) = (hpa(json!({"metrics": [cpu, external]})), settings(), pods("rrr"));
    let look = |levels: &[i64]| {
        let mut round = Round::new(&hpa, &settings, at(10_000));
        let samples = vec![Ok(Samples::Pods(figures(levels))), Err("nobody knows".to_owned())];
        let replicas = Replicas { wanted: 3, there: 3 };
        let change = round.measured(&replicas, &pods, samples, &mut History::default());
        let reason = condition(&round, "ScalingActive").1.to_owned();
        (change.map(|change| change.map(|change| change.replicas)), reason, round.events.len())
    };
    assert_eq!(look(&[300, 500, 700]), (Ok(Some(5)), "ValidMetricFound".to_owned(), 1));
    let account = "invalid metrics (1 invalid out of 2), first error is: failed to get q external metric value: failed to \
                   get external metric q: unable to get external metric ns/q/nil: nobody knows";
    assert_eq!(look(&[30, 50, 70]), (Err(account.to_owned()), "FailedGetExternalMetric".to_owned(), 1));
}

#[test]
fn only_what_was_scaled_to_zero_here_comes_back() {
    let external = json!([{"type": "External", "external": {"metric": {"name": "q"}, "target": {"type": "Value", "value": "10"}}}]);
    let (mut hpa, settings) = (hpa(json!({"minReplicas": 0, "metrics": external})), settings());
    let measured = |hpa: &HorizontalPodAutoscaler, wanted, there, value| {
        let mut round = Round::new(hpa, &settings, at(10_000));
        assert_eq!(round.glance(wanted), Glance::Measure);
        let samples = vec![Ok(Samples::Values(vec![value]))];
        let mut history = History::default();
        let change = round.measured(&Replicas { wanted, there }, &pods("r"), samples, &mut history).unwrap();
        if let Some(change) = &change {
            round.changed(wanted, change);
        }
        (change.map(|change| change.replicas), round.status)
    };
    let (change, status) = measured(&hpa, 1, 1, 0);
    assert_eq!(change, Some(0));
    hpa.status = Some(status);
    assert_eq!(measured(&hpa, 0, 0, 0).0, None);
    let (change, status) = measured(&hpa, 0, 0, 25_000);
    assert_eq!(change, Some(3));
    let zero = status.conditions.iter().flatten().find(|condition| condition.type_ == "ScaledToZero").unwrap();
    assert_eq!(zero.reason.as_deref(), Some("NotScaledToZero"));
}

#[test]
fn failures_are_told_in_conditions_and_events() {
    let (hpa, settings) = (hpa(json!({})), settings());
    let mut round = Round::new(&hpa, &settings, at(0));
    round.no_scale("deployments.apps \"web\" not found");
    assert_eq!(condition(&round, "AbleToScale"), ("False", "FailedGetScale"));
    let mut round = Round::new(&hpa, &settings, at(0));
    round.unchanged(3, &Change { replicas: 5, reason: "why".to_owned() }, "no");
    assert_eq!(condition(&round, "AbleToScale"), ("False", "FailedUpdateScale"));
    assert_eq!(round.events[0].message, "New size: 5; reason: why; error: no");
    assert_eq!((round.status.current_replicas, round.status.desired_replicas), (Some(3), 0));
}
