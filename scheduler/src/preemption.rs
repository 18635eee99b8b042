//! DefaultPreemption: when a pod fits nowhere, finds the node where it would fit after ending pods of lower priority,
//! with the least harm done. Deciding only; the scheduler ends the victims.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;

use crate::cache::{NodeInfo, Snapshot};
use crate::cycle::{Filters, Unfit, histogram};
use crate::pod_info::PodInfo;
use crate::selectors::Selector;

/// Where to put the pod, and who has to go.
#[derive(Debug)]
pub struct Preemption {
    pub node: String,
    pub victims: Vec<Arc<PodInfo>>,
}

/// A node that would do, with what it costs.
struct Candidate {
    node: String,
    /// Most important first.
    victims: Vec<Arc<PodInfo>>,
    violations: usize,
}

/// A disruption budget as far as preemption needs it.
struct Budget {
    namespace: String,
    selector: Selector,
    allowed: i32,
}

/// Looks for a way to fit the pod. The error is the end of the message that users read.
pub fn preempt(
    pod: &Arc<PodInfo>,
    snapshot: &Snapshot,
    filters: &Filters,
    unfit: &Unfit,
    budgets: &[Arc<PodDisruptionBudget>],
) -> Result<Preemption, String> {
    let nodes = unfit.nodes;
    if pod.pod.spec.as_ref().and_then(|s| s.preemption_policy.as_deref()) == Some("Never") {
        return Err("not eligible due to preemptionPolicy=Never.".to_owned());
    }
    if let Some(node) = pod.nominated_node().and_then(|name| snapshot.node(name))
        && node.pods.iter().any(|other| other.is_terminating() && other.priority < pod.priority)
    {
        return Err("not eligible due to a terminating pod on the nominated node.".to_owned());
    }
    let budgets: Vec<Budget> = budgets.iter().map(|budget| Budget::new(budget)).collect();
    let mut reasons = Vec::new();
    let mut candidates = Vec::new();
    for (name, rejections) in &unfit.by_node {
        if rejections.iter().any(|rejection| !rejection.resolvable) {
            reasons.push("Preemption is not helpful for scheduling");
            continue;
        }
        let Some(node) = snapshot.node(name) else { continue };
        match victims(pod, node, filters, &budgets) {
            Some(candidate) => candidates.push(candidate),
            None => reasons.push("No preemption victims found for incoming pod"),
        }
    }
    let best = candidates.into_iter().min_by(|a, b| cost(a).cmp(&cost(b)));
    match best {
        Some(best) => Ok(Preemption { node: best.node, victims: best.victims }),
        None => Err(format!("0/{nodes} nodes are available: {}.", histogram(reasons.into_iter()))),
    }
}

impl Budget {
    fn new(budget: &PodDisruptionBudget) -> Self {
        Self {
            namespace: budget.metadata.namespace.clone().unwrap_or_default(),
            selector: Selector::compile(budget.spec.as_ref().and_then(|s| s.selector.as_ref())),
            allowed: budget.status.as_ref().map_or(0, |s| s.disruptions_allowed.unwrap_or(0)),
        }
    }

    fn covers(&self, pod: &PodInfo) -> bool {
        self.namespace == pod.key.namespace && self.selector.matches(&pod.labels)
    }
}

/// The fewest pods that have to leave the node: all of lower priority leave, then as many as possible come back, those
/// under an exhausted budget and the important ones first.
fn victims(pod: &Arc<PodInfo>, node: &NodeInfo, filters: &Filters, budgets: &[Budget]) -> Option<Candidate> {
    let (mut node_info, mut filters) = (node.clone(), filters.clone());
    let mut leaving: Vec<Arc<PodInfo>> = node.pods.iter().filter(|p| p.priority < pod.priority).cloned().collect();
    if leaving.is_empty() {
        return None;
    }
    for victim in &leaving {
        filters.remove_pod(victim, &mut node_info);
    }
    filters.check(&node_info).ok()?;
    leaving.sort_by_key(|p| importance(p));
    let (violating, harmless) = split_by_budgets(leaving, budgets);
    let mut victims = Vec::new();
    let mut violations = 0;
    for (group, violates) in [(violating, true), (harmless, false)] {
        for victim in group {
            filters.add_pod(&victim, &mut node_info);
            if filters.check(&node_info).is_err() {
                filters.remove_pod(&victim, &mut node_info);
                violations += usize::from(violates);
                victims.push(victim);
            }
        }
    }
    victims.sort_by_key(|p| importance(p));
    Some(Candidate { node: node.name.clone(), victims, violations })
}

/// Important pods sort first: higher priority, then longer running.
fn importance(pod: &PodInfo) -> (std::cmp::Reverse<i32>, Timestamp) {
    (std::cmp::Reverse(pod.priority), start_time(pod))
}

fn start_time(pod: &PodInfo) -> Timestamp {
    pod.pod.status.as_ref().and_then(|s| s.start_time.as_ref()).map_or_else(Timestamp::now, |time| time.0)
}

fn split_by_budgets(pods: Vec<Arc<PodInfo>>, budgets: &[Budget]) -> (Vec<Arc<PodInfo>>, Vec<Arc<PodInfo>>) {
    let mut left: Vec<i32> = budgets.iter().map(|budget| budget.allowed).collect();
    pods.into_iter().partition(|pod| {
        let mut violates = false;
        for (budget, left) in budgets.iter().zip(&mut left) {
            if budget.covers(pod) {
                *left -= 1;
                violates |= *left < 0;
            }
        }
        violates
    })
}

/// What is compared between candidates, smaller is better: broken budgets, the most important victim's priority, the
/// sum of priorities, the number of victims, and last how long ago the most important victim started.
fn cost(candidate: &Candidate) -> (usize, i32, i64, usize, std::cmp::Reverse<Timestamp>) {
    let highest = candidate.victims.first().map_or(i32::MIN, |p| p.priority);
    let sum = candidate.victims.iter().map(|p| i64::from(p.priority) + i64::from(i32::MAX)).sum();
    let youngest = candidate
        .victims
        .iter()
        .filter(|p| p.priority == highest)
        .map(|p| start_time(p))
        .min()
        .unwrap_or(Timestamp::MAX);
    (candidate.violations, highest, sum, candidate.victims.len(), std::cmp::Reverse(youngest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cycle::Cycle;
    use crate::plugins::default_plugins;
    use crate::testing::{node, pod, snapshot};
    use std::collections::BTreeMap;

    fn try_preempt(new: &Arc<PodInfo>, cluster: &Snapshot) -> Result<(String, Vec<String>), String> {
        let plugins = default_plugins();
        let cycle =
            Cycle { plugins: &plugins, snapshot: cluster, pod: new, nominated: &BTreeMap::new(), start: 0, chance: 0 };
        let unfit = cycle.run().unwrap_err();
        let filters = cycle.prepare().unwrap();
        preempt(new, cluster, &filters, &unfit, &[])
            .map(|p| (p.node, p.victims.iter().map(|v| v.uid.clone()).collect()))
    }

    #[test]
    fn ends_as_few_and_as_unimportant_pods_as_possible() {
        let mut one = node("a", 1000).info();
        one.add_pod(pod("a5").cpu(900).priority(5).info());
        let mut two = node("b", 1000).info();
        two.add_pod(pod("b1").cpu(500).priority(1).info());
        two.add_pod(pod("b2").cpu(400).priority(2).info());
        let cluster = snapshot(vec![one, two]);
        let new = pod("new").cpu(500).priority(10).info();
        assert_eq!(try_preempt(&new, &cluster), Ok(("b".to_owned(), vec!["b1".to_owned()])));
    }

    #[test]
    fn says_why_it_does_not_help() {
        let mut one = node("a", 1000).info();
        one.add_pod(pod("vip").cpu(900).priority(50).info());
        let cluster = snapshot(vec![one, node("b", 100).info()]);
        let new = pod("new").cpu(500).priority(10).info();
        assert_eq!(
            try_preempt(&new, &cluster),
            Err("0/2 nodes are available: 1 No preemption victims found for incoming pod, 1 Preemption is not helpful for scheduling.".to_owned())
        );
    }
}
