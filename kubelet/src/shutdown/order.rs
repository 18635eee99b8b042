//! Which pods end when the machine goes down, in which order, and how long each may take. Pure.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;

use crate::config::{KubeletConfiguration, ShutdownPeriod};

/// Pods of this priority and above are critical.
const CRITICAL: i32 = 2_000_000_000;

/// The periods of the configuration, the lowest priority first; none when the node does not wait for its pods.
pub fn periods(config: &KubeletConfiguration) -> Vec<ShutdownPeriod> {
    let mut periods = config.shutdown_grace_period_by_pod_priority.clone();
    let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    let (all, critical) = (config.shutdown_grace_period.0, config.shutdown_grace_period_critical_pods.0);
    if periods.is_empty() && !all.is_zero() && critical <= all {
        periods = vec![
            ShutdownPeriod { priority: 0, shutdown_grace_period_seconds: seconds(all - critical) },
            ShutdownPeriod { priority: CRITICAL, shutdown_grace_period_seconds: seconds(critical) },
        ];
    }
    periods.sort_by_key(|period| period.priority);
    periods
}

/// All periods together: how long the machine has to be kept from going down.
pub fn total(periods: &[ShutdownPeriod]) -> Duration {
    let seconds = periods.iter().map(|period| u64::try_from(period.shutdown_grace_period_seconds).unwrap_or(0));
    Duration::from_secs(seconds.sum())
}

/// Pods that end together.
#[derive(Clone, Debug, PartialEq)]
pub struct Group<'a> {
    pub period: ShutdownPeriod,
    pub pods: Vec<&'a Pod>,
}

impl Group<'_> {
    pub fn time(&self) -> Duration {
        total(std::slice::from_ref(&self.period))
    }

    /// Seconds that the pod has: the group's, or fewer if it asks for fewer.
    pub fn grace(&self, pod: &Pod) -> i64 {
        let group = self.period.shutdown_grace_period_seconds;
        let own = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
        own.map_or(group, |own| own.min(group))
    }
}

/// Each pod belongs to the highest priority that is not above its own, or else to the lowest. Groups without pods are
/// left out: nobody waits for them.
pub fn groups<'a>(periods: &[ShutdownPeriod], pods: &[&'a Pod]) -> Vec<Group<'a>> {
    let mut groups: Vec<Group<'a>> = periods.iter().map(|period| Group { period: *period, pods: Vec::new() }).collect();
    for pod in pods {
        let priority = pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0);
        let index = groups.iter().rposition(|group| group.period.priority <= priority).unwrap_or(0);
        if let Some(group) = groups.get_mut(index) {
            group.pods.push(pod);
        }
    }
    groups.retain(|group| !group.pods.is_empty());
    groups
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::GoDuration;

    fn pod(name: &str, priority: i32, grace: i64) -> Pod {
        let spec = json!({"containers": [], "priority": priority, "terminationGracePeriodSeconds": grace});
        serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec})).unwrap()
    }

    fn period(priority: i32, shutdown_grace_period_seconds: i64) -> ShutdownPeriod {
        ShutdownPeriod { priority, shutdown_grace_period_seconds }
    }

    #[test]
    fn periods_come_from_either_form() {
        let mut config = KubeletConfiguration::default();
        assert!(periods(&config).is_empty());
        config.shutdown_grace_period = GoDuration::seconds(30);
        config.shutdown_grace_period_critical_pods = GoDuration::seconds(10);
        assert_eq!(periods(&config), [period(0, 20), period(CRITICAL, 10)]);
        config.shutdown_grace_period_by_pod_priority = vec![period(100, 5), period(-1, 7)];
        assert_eq!(periods(&config), [period(-1, 7), period(100, 5)]);
        assert_eq!(total(&periods(&config)), Duration::from_secs(12));
    }

    #[test]
    fn pods_end_with_their_like() {
        let periods = [period(10, 60), period(100, 5), period(1000, 1)];
        let pods =
            [pod("low", 0, 30), pod("edge", 100, 30), pod("middle", 999, 2), pod("ten", 10, 90), pod("just", 99, 30)];
        let groups = groups(&periods, &pods.iter().collect::<Vec<_>>());
        let shown: Vec<(i32, Vec<(&str, i64)>)> = groups
            .iter()
            .map(|group| {
                let pods = group.pods.iter().map(|pod| (pod.metadata.name.as_deref().unwrap(), group.grace(pod)));
                (group.period.priority, pods.collect())
            })
            .collect();
        let want = [(10, vec![("low", 30), ("ten", 60), ("just", 30)]), (100, vec![("edge", 5), ("middle", 2)])];
        assert_eq!(shown, want);
        assert!(super::groups(&[], &[&pods[0]]).is_empty());
    }
}
