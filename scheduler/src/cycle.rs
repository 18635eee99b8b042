//! One scheduling cycle: filters and scores the nodes of a snapshot for one pod. Pure: nothing is written, time does not
//! pass, and chance is passed in.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use crate::cache::{NodeInfo, Snapshot};
use crate::framework::{Filter, MAX_SCORE, Plugin, PreFilter, Rejection};
use crate::pod_info::PodInfo;

/// Below so many nodes all are looked at; above, a share that shrinks with the cluster, but never fewer than this.
const MIN_FEASIBLE: usize = 100;

/// Why no node can take the pod.
#[derive(Debug, Default, Clone)]
pub struct Unfit {
    pub nodes: usize,
    /// Set when a plugin rejected the pod before looking at nodes.
    pub before_nodes: Vec<Rejection>,
    pub by_node: BTreeMap<String, Vec<Rejection>>,
}

impl Unfit {
    pub fn plugins(&self) -> HashSet<&'static str> {
        self.before_nodes.iter().chain(self.by_node.values().flatten()).map(|r| r.plugin).collect()
    }

    /// As users read it in events: `0/3 nodes are available: 1 node(s) were unschedulable, 2 Insufficient cpu.`
    pub fn message(&self) -> String {
        let mut text = format!("0/{} nodes are available:", self.nodes);
        if self.nodes == 0 && self.before_nodes.is_empty() {
            return "no nodes available to schedule pods".to_owned();
        }
        if !self.before_nodes.is_empty() {
            let reasons: Vec<&str> = self.before_nodes.iter().map(|r| r.reason.as_str()).collect();
            text.push_str(&format!(" {}.", reasons.join(", ")));
            return text;
        }
        text.push_str(&format!(" {}.", histogram(self.by_node.values().flatten().map(|r| r.reason.as_str()))));
        text
    }
}

/// `1 some reason, 2 other reason`, sorted as text, as upstream prints it.
pub fn histogram<'a>(reasons: impl Iterator<Item = &'a str>) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for reason in reasons {
        *counts.entry(reason).or_default() += 1;
    }
    let mut lines: Vec<String> = counts.into_iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    lines.sort();
    lines.join(", ")
}

/// The filters of one cycle, prepared for the pod.
pub struct Filters(Vec<Box<dyn Filter>>);

impl Clone for Filters {
    fn clone(&self) -> Self {
        Self(self.0.iter().map(|filter| filter.clone_box()).collect())
    }
}

impl Filters {
    pub fn check(&self, node: &NodeInfo) -> Result<(), Vec<Rejection>> {
        self.0.iter().try_for_each(|filter| filter.filter(node))
    }

    pub fn add_pod(&mut self, pod: &Arc<PodInfo>, node: &mut NodeInfo) {
        self.0.iter_mut().for_each(|filter| filter.add_pod(pod, node));
        node.add_pod(pod.clone());
    }

    pub fn remove_pod(&mut self, pod: &PodInfo, node: &mut NodeInfo) {
        node.remove_pod(&pod.uid);
        self.0.iter_mut().for_each(|filter| filter.remove_pod(pod, node));
    }
}

/// What a cycle needs.
pub struct Cycle<'a> {
    pub plugins: &'a [Arc<dyn Plugin>],
    pub snapshot: &'a Snapshot,
    pub pod: &'a Arc<PodInfo>,
    /// Pods for which room was made, by node.
    pub nominated: &'a BTreeMap<String, Vec<Arc<PodInfo>>>,
    /// Where to start looking, so that large clusters are used evenly.
    pub start: usize,
    /// A random number that decides between equally good nodes.
    pub chance: u64,
}

impl Cycle<'_> {
    /// Asks every plugin once; an error says that no node will do.
    pub fn prepare(&self) -> Result<Filters, Unfit> {
        let mut filters = Vec::new();
        for plugin in self.plugins {
            match plugin.pre_filter(self.pod, self.snapshot) {
                PreFilter::Skip => {}
                PreFilter::Check(filter) => filters.push(filter),
                PreFilter::Reject(rejections) => {
                    return Err(Unfit {
                        nodes: self.snapshot.nodes.len(),
                        before_nodes: rejections,
                        ..Unfit::default()
                    });
                }
            }
        }
        Ok(Filters(filters))
    }

    /// The best node for the pod.
    pub fn run(&self) -> Result<Arc<NodeInfo>, Unfit> {
        let filters = self.prepare()?;
        let (feasible, unfit) = self.filter(&filters);
        match feasible.as_slice() {
            [] => Err(unfit),
            [only] => Ok(only.clone()),
            _ => Ok(self.best(&feasible)),
        }
    }

    fn filter(&self, filters: &Filters) -> (Vec<Arc<NodeInfo>>, Unfit) {
        let nodes = &self.snapshot.nodes;
        let mut unfit = Unfit { nodes: nodes.len(), ..Unfit::default() };
        let mut feasible = Vec::new();
        let enough = feasible_nodes_to_find(nodes.len());
        // The node where room was made for the pod is looked at first and taken when it fits.
        if let Some(node) = self.pod.nominated_node().and_then(|name| self.snapshot.node(name))
            && self.check_with_nominated(filters, node).is_ok()
        {
            return (vec![node.clone()], unfit);
        }
        for index in 0..nodes.len() {
            let node = &nodes[(self.start + index) % nodes.len()];
            match self.check_with_nominated(filters, node) {
                Ok(()) => {
                    feasible.push(node.clone());
                    if feasible.len() >= enough {
                        break;
                    }
                }
                Err(rejections) => {
                    unfit.by_node.insert(node.name.clone(), rejections);
                }
            }
        }
        (feasible, unfit)
    }

    /// A node must fit with the more important pods that are nominated to it, and without them as well: they may never
    /// come, and a rule such as pod affinity must not depend on them.
    fn check_with_nominated(&self, filters: &Filters, node: &NodeInfo) -> Result<(), Vec<Rejection>> {
        let waiting = self.nominated.get(&node.name).map(Vec::as_slice).unwrap_or_default();
        let more_important: Vec<&Arc<PodInfo>> =
            waiting.iter().filter(|other| other.uid != self.pod.uid && other.priority >= self.pod.priority).collect();
        if !more_important.is_empty() {
            let (mut filters, mut node) = (filters.clone(), node.clone());
            for other in more_important {
                filters.add_pod(other, &mut node);
            }
            filters.check(&node)?;
        }
        filters.check(node)
    }

    fn best(&self, nodes: &[Arc<NodeInfo>]) -> Arc<NodeInfo> {
        let mut totals = vec![0_i64; nodes.len()];
        for plugin in self.plugins {
            let Some(score) = plugin.pre_score(self.pod, self.snapshot, nodes) else { continue };
            let mut scores: Vec<i64> = nodes.iter().map(|node| score.score(node)).collect();
            score.normalize(&mut scores, nodes);
            for (total, score) in totals.iter_mut().zip(scores) {
                *total += plugin.weight() * score.clamp(0, MAX_SCORE);
            }
        }
        let max = totals.iter().copied().max().unwrap_or(0);
        let best: Vec<&Arc<NodeInfo>> = nodes.iter().zip(&totals).filter(|(_, t)| **t == max).map(|(n, _)| n).collect();
        let index = usize::try_from(self.chance % best.len() as u64).unwrap_or(0);
        best[index].clone()
    }
}

/// How many feasible nodes are enough: all in small clusters, then 50 % minus one for every 125 nodes, at least 5 %.
fn feasible_nodes_to_find(nodes: usize) -> usize {
    if nodes < MIN_FEASIBLE {
        return nodes;
    }
    let percent = 50_usize.saturating_sub(nodes / 125).max(5);
    (nodes * percent / 100).max(MIN_FEASIBLE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugins::default_plugins;
    use crate::testing::{node, pod, snapshot};

    fn run(pod: &Arc<PodInfo>, cluster: &Snapshot) -> Result<String, String> {
        let cycle = Cycle {
            plugins: &default_plugins(),
            snapshot: cluster,
            pod,
            nominated: &BTreeMap::new(),
            start: 0,
            chance: 0,
        };
        cycle.run().map(|node| node.name.clone()).map_err(|unfit| unfit.message())
    }

    #[test]
    fn says_why_no_node_fits() {
        let cluster = snapshot(vec![
            node("a", 1000).taint("node-role.kubernetes.io/control-plane", "NoSchedule").info(),
            node("b", 1000).info(),
            node("c", 1000).info(),
        ]);
        assert_eq!(
            run(&pod("p").cpu(2000).info(), &cluster),
            Err("0/3 nodes are available: 1 node(s) had untolerated taint(s), 2 Insufficient cpu.".to_owned())
        );
        assert_eq!(
            run(&pod("p").claim("data").info(), &cluster),
            Err(r#"0/3 nodes are available: persistentvolumeclaim "data" not found."#.to_owned())
        );
        assert_eq!(run(&pod("p").info(), &Snapshot::default()), Err("no nodes available to schedule pods".to_owned()));
    }

    #[test]
    fn prefers_the_emptier_node() {
        let mut used = node("a", 1000).info();
        used.add_pod(pod("q").cpu(500).info());
        let cluster = snapshot(vec![used, node("b", 1000).info()]);
        assert_eq!(run(&pod("p").cpu(100).info(), &cluster), Ok("b".to_owned()));
    }

    #[test]
    fn room_made_for_an_important_pod_is_not_taken() {
        let cluster = snapshot(vec![node("a", 1000).info()]);
        let nominated = BTreeMap::from([("a".to_owned(), vec![pod("vip").cpu(800).priority(10).info()])]);
        let low = pod("low").cpu(500).info();
        let cycle = Cycle {
            plugins: &default_plugins(),
            snapshot: &cluster,
            pod: &low,
            nominated: &nominated,
            start: 0,
            chance: 0,
        };
        assert!(cycle.run().is_err());
    }

    #[test]
    fn large_clusters_are_sampled() {
        assert_eq!(feasible_nodes_to_find(50), 50);
        assert_eq!(feasible_nodes_to_find(1000), 420);
        assert_eq!(feasible_nodes_to_find(6000), 300);
    }
}
