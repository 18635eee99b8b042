//! Name resolution inside pods: which servers, search domains and options a pod's `resolv.conf` gets. Pure, but for
//! reading the node's own file.

use std::path::Path;

use k8s_cri::v1 as cri;
use k8s_openapi::api::core::v1::Pod;

const MAX_SERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;

/// The node's side of the question.
#[derive(Clone, Debug, Default)]
pub struct NodeDns {
    pub cluster_servers: Vec<String>,
    pub cluster_domain: String,
    /// Empty for "no file": pods with the Default policy then get an empty configuration.
    pub resolv_conf: String,
}

impl NodeDns {
    /// The configuration of one pod. An unreadable node file counts as empty.
    pub fn of_pod(&self, pod: &Pod) -> cri::DnsConfig {
        let text = match self.resolv_conf.as_str() {
            "" => String::new(),
            path => std::fs::read_to_string(Path::new(path)).unwrap_or_else(|error| {
                tracing::warn!(path, %error, "cannot read the node's resolv.conf");
                String::new()
            }),
        };
        self.compute(pod, parse(&text))
    }

    fn compute(&self, pod: &Pod, node: cri::DnsConfig) -> cri::DnsConfig {
        let spec = pod.spec.clone().unwrap_or_default();
        let host_network = spec.host_network.unwrap_or(false);
        let policy = spec.dns_policy.as_deref().unwrap_or("ClusterFirst");
        let mut config = match policy {
            "None" => cri::DnsConfig::default(),
            "ClusterFirstWithHostNet" if !self.cluster_servers.is_empty() => self.cluster_first(pod, node),
            "ClusterFirst" if !host_network && !self.cluster_servers.is_empty() => self.cluster_first(pod, node),
            _ => node,
        };
        if let Some(extra) = spec.dns_config {
            merge(&mut config.servers, extra.nameservers.unwrap_or_default());
            merge(&mut config.searches, extra.searches.unwrap_or_default());
            for option in extra.options.unwrap_or_default() {
                let Some(name) = option.name else { continue };
                config.options.retain(|old| old.split(':').next() != Some(&name));
                config.options.push(match option.value {
                    Some(value) if !value.is_empty() => format!("{name}:{value}"),
                    _ => name,
                });
            }
        }
        config.servers.truncate(MAX_SERVERS);
        config.searches.truncate(MAX_SEARCHES);
        config
    }

    fn cluster_first(&self, pod: &Pod, node: cri::DnsConfig) -> cri::DnsConfig {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let domain = &self.cluster_domain;
        let mut searches = match domain.as_str() {
            "" => Vec::new(),
            _ => vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()],
        };
        merge(&mut searches, node.searches);
        cri::DnsConfig { servers: self.cluster_servers.clone(), searches, options: vec!["ndots:5".to_owned()] }
    }
}

fn merge(list: &mut Vec<String>, more: Vec<String>) {
    for entry in more {
        if !list.contains(&entry) {
            list.push(entry);
        }
    }
}

fn parse(text: &str) -> cri::DnsConfig {
    let mut config = cri::DnsConfig::default();
    for line in text.lines() {
        let line = line.split(['#', ';']).next().unwrap_or_default();
        let mut words = line.split_whitespace().map(str::to_owned);
        match words.next().as_deref() {
            Some("nameserver") => config.servers.extend(words.next()),
            Some("search") => config.searches = words.map(|word| word.trim_end_matches('.').to_owned()).collect(),
            Some("options") => config.options = words.collect(),
            _ => {}
        }
    }
    config.searches.retain(|search| !search.is_empty());
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies() {
        let dns = NodeDns {
            cluster_servers: vec!["10.96.0.10".into()],
            cluster_domain: "cluster.local".into(),
            resolv_conf: String::new(),
        };
        let file = "# c\nnameserver 192.0.2.1\nsearch corp. x.y\noptions timeout:1\n";
        let cluster = "10.96.0.10 d.svc.cluster.local svc.cluster.local cluster.local corp x.y ndots:5";
        let node = "192.0.2.1 corp x.y timeout:1";
        for (spec, want) in [
            ("{containers: []}", cluster),
            ("{hostNetwork: true, containers: []}", node),
            ("{hostNetwork: true, dnsPolicy: ClusterFirstWithHostNet, containers: []}", cluster),
            ("{dnsPolicy: Default, containers: []}", node),
            (
                "{dnsPolicy: None, dnsConfig: {nameservers: [1.1.1.1], searches: [z], options: [{name: a, value: '1'}, {name: b}]}, containers: []}",
                "1.1.1.1 z a:1 b",
            ),
            (
                "{dnsPolicy: Default, dnsConfig: {options: [{name: timeout, value: '9'}]}, containers: []}",
                "192.0.2.1 corp x.y timeout:9",
            ),
        ] {
            let text = format!("metadata: {{namespace: d}}\nspec: {spec}");
            let pod: Pod = serde_json::from_value(serde_saphyr::from_str(&text).unwrap()).unwrap();
            let config = dns.compute(&pod, parse(file));
            let got: Vec<String> = [config.servers, config.searches, config.options].concat();
            assert_eq!(got.join(" "), want, "{spec}");
        }
    }
}
