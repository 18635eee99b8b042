//! Defaults of services. Address families and cluster addresses depend on the cluster's configuration: the allocator
//! fills them in (`registry/alloc`).

use serde_json::{Value, json};

use super::{default, default_zero, each, existing, is_zero, within};

/// How long a client sticks to one backend: three hours.
const STICKY_SECONDS: i64 = 10_800;

pub fn service(obj: &mut Value) {
    within(obj, "spec", |spec| {
        default_zero(spec, "sessionAffinity", "None");
        session_affinity(spec);
        default_zero(spec, "type", "ClusterIP");
        each(spec, "ports", |port| {
            default_zero(port, "protocol", "TCP");
            let number = port["port"].clone();
            default_zero(port, "targetPort", number);
        });
        let kind = spec["type"].as_str().unwrap_or_default().to_owned();
        if matches!(kind.as_str(), "NodePort" | "LoadBalancer") || !is_zero(&spec["externalIPs"]) && kind == "ClusterIP"
        {
            default_zero(spec, "externalTrafficPolicy", "Cluster");
        }
        if matches!(kind.as_str(), "NodePort" | "LoadBalancer" | "ClusterIP") {
            default(spec, "internalTrafficPolicy", "Cluster");
        }
        if kind == "LoadBalancer" {
            default(spec, "allocateLoadBalancerNodePorts", true);
        }
    });
    if obj["spec"]["type"] == "LoadBalancer" {
        existing(obj, "status", |status| {
            existing(status, "loadBalancer", |balancer| {
                each(balancer, "ingress", |ingress| {
                    if !is_zero(&ingress["ip"]) {
                        default(ingress, "ipMode", "VIP");
                    }
                });
            });
        });
    }
    within(obj, "status", |status| within(status, "loadBalancer", |_| {}));
}

fn session_affinity(spec: &mut Value) {
    if spec["sessionAffinity"] == "None"
        && let Some(map) = spec.as_object_mut()
    {
        map.remove("sessionAffinityConfig");
    }
    if spec["sessionAffinity"] == "ClientIP" && spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"].is_null() {
        spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": STICKY_SECONDS}});
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_of_each_type() {
        let cases = [
            (
                json!({"ports": [{"port": 80}]}),
                json!({"type": "ClusterIP", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
                    "ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}]}),
            ),
            (
                json!({"type": "NodePort", "sessionAffinity": "ClientIP"}),
                json!({"type": "NodePort", "sessionAffinity": "ClientIP", "internalTrafficPolicy": "Cluster",
                    "externalTrafficPolicy": "Cluster",
                    "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10800}}}),
            ),
            (
                json!({"type": "LoadBalancer", "sessionAffinityConfig": {}}),
                json!({"type": "LoadBalancer", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
                    "externalTrafficPolicy": "Cluster", "allocateLoadBalancerNodePorts": true}),
            ),
            (
                json!({"type": "ExternalName", "externalName": "a.b"}),
                json!({"type": "ExternalName", "externalName": "a.b", "sessionAffinity": "None"}),
            ),
            (
                json!({"externalIPs": ["1.2.3.4"], "ports": [{"port": 1, "targetPort": "http"}]}),
                json!({"type": "ClusterIP", "externalIPs": ["1.2.3.4"], "sessionAffinity": "None",
                    "externalTrafficPolicy": "Cluster", "internalTrafficPolicy": "Cluster",
                    "ports": [{"port": 1, "targetPort": "http", "protocol": "TCP"}]}),
            ),
        ];
        for (given, expected) in cases {
            let mut obj = json!({"spec": given});
            service(&mut obj);
            assert_eq!(obj["spec"], expected, "{given}");
            let once = obj.clone();
            service(&mut obj);
            assert_eq!(obj, once);
        }
    }
}
